"""`llmkd eval MODEL --tasks ...`: the flags and what they call."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llmkd.errors import MissingFileError

EPILOG = """examples:
  llmkd eval runs/quickstart --tasks heldout_bpb          every arm of a recipe, side by side
  llmkd eval runs/quickstart/salt --tasks arc_easy,piqa --limit 200
  llmkd eval STUDENT --teacher T --baseline B --tasks my_task.yaml --num_fewshot 5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags on `parser`; their names are lm_eval's where lm_eval has them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id, model folder, PEFT adapter folder or recipe folder")
    add(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="names lm_eval knows, tasks llmkd ships (heldout_bpb), YAML files or folders of them; "
        "separated by commas or spaces",
    )
    add(
        "--include_path",
        action="append",
        default=[],
        type=Path,
        metavar="P",
        help="folder with more task YAMLs; may be given again",
    )
    add("--teacher", metavar="M", help="a second model: the far end of the gap")
    add("--baseline", metavar="M", help="a third model: the near end of the gap")
    add("--limit", type=float, metavar="N", help="documents a task, or a share of them below 1")
    add("--num_fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    add(
        "--batch_size",
        default="8",
        metavar="N",
        help="sequences a forward pass, or auto (8); the logits take N x window x vocabulary x 4 "
        "bytes, twice: 1 for whole documents in a large vocabulary",
    )
    add("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--dtype", default="auto", metavar="T", help="auto (as saved), float32, bfloat16, float16")
    add("--apply_chat_template", action="store_true", help="wrap prompts as chat turns")
    add("--fewshot_as_multiturn", action="store_true", help="each example its own chat turn")
    add("--seed", type=int, default=0, metavar="N", help="seed of all of lm_eval's generators (0)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder whose eval.json gets the results (default: MODEL's, else the current one)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the verb; prints tables and the path written. Raises LlmkdError for all user mistakes."""
    from llmkd.evaluation.harness import EvalSettings, import_lm_eval, is_main_process
    from llmkd.evaluation.harness_model import arms_of

    import_lm_eval()
    size = args.batch_size
    settings = EvalSettings(
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        batch_size=int(size) if size.isdigit() else size,
        device=args.device,
        dtype=args.dtype,
        apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        seed=args.seed,
    )
    folder = Path(args.model).expanduser()
    output = args.output or (folder if folder.is_dir() else Path.cwd())
    arms = arms_of(folder) if folder.is_dir() else []
    if arms:
        written = _several(args, settings, _family(args, folder, arms), output, folder)
    elif args.teacher or args.baseline:
        models = {"student": args.model}
        models |= {n: m for n in ("baseline", "teacher") if (m := getattr(args, n)) is not None}
        written = _several(args, settings, models, output, None)
    else:
        written = _one(args, settings, output)
    if is_main_process():
        print(f"written: {written}")
    return 0


def split_tasks(words: list[str]) -> list[str]:
    """`a,b c.yaml` -> [a, b, c.yaml]; a path that itself has a comma stays whole."""
    tasks: list[str] = []
    for word in words:
        parts = [word] if Path(word).exists() else word.split(",")
        tasks += [part.strip() for part in parts if part.strip()]
    return tasks


def _one(args: argparse.Namespace, settings: Any, output: Path) -> Path:
    from dataclasses import asdict

    from llmkd.evaluation.harness import run_tasks
    from llmkd.evaluation.harness_table import print_results

    results = run_tasks(
        args.model,
        split_tasks(args.tasks),
        include_path=args.include_path,
        output=output,
        **asdict(settings),
    )
    print_results(results)
    return output / "eval.json"


def _several(
    args: argparse.Namespace, settings: Any, models: dict[str, str], output: Path, run: Path | None
) -> Path:
    """`run` is the recipe folder whose arms are measured; each arm's eval.json gets its scores."""
    from llmkd.evaluation.harness import side_by_side
    from llmkd.evaluation.harness_table import print_side_by_side

    mine = {"student": output}
    if run is not None:
        mine = {n: Path(m) for n, m in models.items() if Path(m).parent == run}
    compared = side_by_side(
        models,
        split_tasks(args.tasks),
        include_path=args.include_path,
        settings=settings,
        output=output,
        outputs=mine,
    )
    print_side_by_side(compared)
    return output / "eval.json"


def _family(args: argparse.Namespace, folder: Path, arms: list[str]) -> dict[str, str]:
    """Every arm of a recipe folder and its teacher by name; flags replace either end of the gap."""
    missing = [name for name in arms if not (folder / name).is_dir()]
    if missing:
        raise MissingFileError.of(
            "arms",
            ", ".join(missing),
            f"run.json names them, but {folder} has no such folder",
            "finish the run, or give one arm's folder",
        )
    models = {name: str(folder / name) for name in arms}
    if args.baseline:
        models["baseline"] = args.baseline
    if args.teacher:
        models["teacher"] = args.teacher
    elif (folder / "teacher").is_dir():
        models["teacher"] = str(folder / "teacher")
    return models
