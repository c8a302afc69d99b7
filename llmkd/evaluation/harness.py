"""lm_eval in process: one model on some tasks, or several side by side with *gap closed*.

What a run folder's `eval.json` holds under "lm_eval" (written by `merge_eval_json`):

    {"tasks": {task: record},                    # this folder's own model, see `run_tasks`
     "side_by_side": {"models": {name: source}, "tasks": {task: {metric: row}}}}   # `side_by_side`
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkd.errors import DataError, RecipeError, RunFolderError
from llmkd.evaluation.harness_gap import Score, Scores, compare, scores_of
from llmkd.evaluation.harness_model import ModelSource, check_chat_template, model_source
from llmkd.evaluation.harness_tasks import TaskSet, import_lm_eval, open_tasks
from llmkd.files import read_json, write_json

# Resamples for metrics without a closed form (F1, Matthews); lm_eval's 100,000 take minutes.
BOOTSTRAP = 1000


@dataclass(frozen=True)
class EvalSettings:
    """How to run tasks; checked when made. `limit`: documents a task, or a share of them below 1.

    `batch_size`: sequences a forward pass, or "auto". `device` None: cuda where there is one, else
    cpu. `seed` goes to every generator lm_eval has, as its `--seed N` does.
    """

    limit: int | float | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 8
    device: str | None = None
    dtype: str = "auto"
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limit = self.limit
        if limit is not None and not (limit > 0 and (limit < 1 or float(limit).is_integer())):
            ways = ("a whole number above 0: documents a task", "a share in (0, 1) of each task")
            raise RecipeError.of("limit", limit, "leaves nothing to measure or is no count", *ways)
        if limit is not None and limit >= 1:
            object.__setattr__(self, "limit", int(limit))
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise RecipeError.of("num_fewshot", self.num_fewshot, "must be 0 or more")
        size = str(self.batch_size)
        if not (size.isdigit() and int(size) > 0) and size.split(":")[0] != "auto":
            way = "sequences a forward pass, or auto"
            raise RecipeError.of("batch_size", self.batch_size, "is not a positive number", way)
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            way = "set apply_chat_template too, or leave both out"
            raise RecipeError.of("fewshot_as_multiturn", True, "needs a chat template", way)
        _check_dtype(self.dtype)
        _torch_device(self.device)


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include_path: Sequence[Path] = (),
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    dtype: str = "auto",
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = False,
    seed: int = 0,
    output: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a Hub id, a model folder or a PEFT adapter folder; see `open_tasks` for `tasks`.

    Returns {"model", "adapter", "parameters", "lm_eval", "transformers", "seconds", "tasks": {task:
    record}}; a record holds "metrics": {metric: {"value", "stderr", "higher_is_better"}} and all
    that it takes to read or repeat them. With `output`, also merges them into its `eval.json`.
    Under torch.distributed only rank 0 writes; other ranks may get {} (lm_eval gathers on rank 0).
    Raises RecipeError, MissingFileError, HubError or MissingExtraError before weights are loaded.
    """
    settings = EvalSettings(
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        seed=seed,
    )
    import_lm_eval()
    if output is not None:
        check_output(output)
    source = model_source(model)
    if apply_chat_template:
        check_chat_template(source)
    with open_tasks(tasks, include_path, source.data_roots) as ready:
        result, _ = _measure(source, ready, ready.build(), settings)
    if output is not None and result:
        merge_eval_json(Path(output), {"tasks": result["tasks"]})
    return result


def side_by_side(
    models: Mapping[str, str | Path],
    tasks: Sequence[str],
    *,
    include_path: Sequence[Path] = (),
    settings: EvalSettings | None = None,
    output: Path | None = None,
    outputs: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Evaluate models one after the other on the same documents and compare them.

    `models` maps names to what `run_tasks` takes. "teacher" and "baseline" are the two ends of the
    gap; every other name is a student. Relative data files are looked for beside the first model.
    Returns {"models": {name: source}, "seconds", "tasks": {task: {metric: row}}, "results": {name:
    what `run_tasks` returns}}; see `compare` for a row. `output` gets the comparison in its
    `eval.json`, each folder of `outputs` its own model's records, as soon as they exist.
    Raises as `run_tasks` does, for all models, before the first weights are loaded.
    """
    settings = settings or EvalSettings()
    if not models:
        raise RecipeError.of("models", {}, "is empty", "name a student, a teacher and a baseline")
    import_lm_eval()
    for folder in (output, *(outputs or {}).values()):
        if folder is not None:
            check_output(folder)
    sources = {name: model_source(model) for name, model in models.items()}
    if settings.apply_chat_template:
        for source in sources.values():
            check_chat_template(source)
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, Scores] = {}
    started = time.perf_counter()
    with open_tasks(tasks, include_path, next(iter(sources.values())).data_roots) as ready:
        built = ready.build()
        for name, source in sources.items():
            results[name], scores[name] = _measure(source, ready, built, settings)
            if results[name] and outputs and name in outputs:
                merge_eval_json(Path(outputs[name]), {"tasks": results[name]["tasks"]})
    if not all(results.values()):
        return {}  # not rank 0
    compared = {
        "models": {name: str(model) for name, model in models.items()},
        "seconds": time.perf_counter() - started,
        "tasks": compare(results, scores),
    }
    if output is not None:
        merge_eval_json(Path(output), {"side_by_side": compared})
    return compared | {"results": results}


def merge_eval_json(folder: Path, results: dict[str, Any]) -> Path:
    """Add `results` ({"tasks": ...} and/or {"side_by_side": ...}) under "lm_eval" of the folder's
    `eval.json`, atomically; everything else there stays, and so do tasks not measured this time.

    Raises DataError where the file is there but holds no JSON object.
    """
    path = Path(folder) / "eval.json"
    held = _read_eval_json(path)
    known = held.setdefault("lm_eval", {})
    if "tasks" in results:
        known["tasks"] = known.get("tasks", {}) | results["tasks"]
    if new := results.get("side_by_side"):
        old = known.get("side_by_side", {})
        same = old.get("models") == new["models"]
        known["side_by_side"] = new | {"tasks": (old["tasks"] if same else {}) | new["tasks"]}
    write_json(path, held)
    return path


def check_output(folder: Path) -> None:
    """Find out before hours of work that `folder` cannot take an `eval.json`.

    Raises DataError (an eval.json that is something else), RunFolderError (no permission).
    """
    _read_eval_json(Path(folder) / "eval.json")
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = f"{there} cannot be written"
        raise RunFolderError.of("output", str(folder), problem, "name a folder with --output DIR")


def _read_eval_json(path: Path) -> dict[str, Any]:
    way = "move it away; nothing was overwritten"
    try:
        held = read_json(path) or {}
    except ValueError as error:
        raise DataError.of("eval.json", str(path), f"is not JSON: {error}", way) from error
    if not isinstance(held, dict) or not isinstance(held.get("lm_eval", {}), dict):
        raise DataError.of("eval.json", str(path), "is not the object llmkd writes", way)
    return held


def is_main_process() -> bool:
    """Whether this process may write: rank 0, or no torch.distributed at all."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def _measure(
    source: ModelSource, tasks: TaskSet, built: dict[str, list[Any]], settings: EvalSettings
) -> tuple[dict[str, Any], Scores]:
    """Load the model, run `built` task by task, let go of the model. ({}, {}) on ranks but 0."""
    import transformers

    started = time.perf_counter()
    device = str(_torch_device(settings.device))
    lm = source.load(batch_size=settings.batch_size, device=device, dtype=settings.dtype)
    records: dict[str, dict[str, Any]] = {}
    scores: Scores = {}
    for name in tasks.names:
        begun = time.perf_counter()
        raw = _simple_evaluate(lm, built[name], tasks.manager, settings)
        if raw is None or not is_main_process():
            continue
        seconds = time.perf_counter() - begun
        for task in raw["results"]:
            scores[task] = scores_of(task, raw)
            records[task] = _record(task, raw, scores[task])
            records[task] |= {
                "seconds": round(seconds, 3),  # of all tasks behind the name that was asked for
                "asked_as": name,
                "source": tasks.sources.get(task, "lm_eval"),
                "data_files": tasks.data_files.get(task, []),
                "max_length": lm.max_length,
                "lm_eval": import_lm_eval().__version__,
                **asdict(settings),
                "num_fewshot": raw["n-shot"].get(task),
                "device": str(lm.device),
                "dtype": str(getattr(lm.model, "dtype", "")).removeprefix("torch."),
            }
    parameters = sum(one.numel() for one in lm.model.parameters())
    del lm
    gc.collect()
    if not is_main_process():
        return {}, {}
    return {
        "model": str(source.given),
        "adapter": source.peft,
        "parameters": parameters,
        "lm_eval": import_lm_eval().__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - started, 3),
        "tasks": records,
    }, scores


def _simple_evaluate(lm: Any, built: list[Any], manager: Any, settings: EvalSettings) -> Any:
    import lm_eval

    run: Any = lm_eval.simple_evaluate  # its decorator hides the signature from pyright
    with _no_environment_report():
        return run(
            model=lm,
            tasks=built,
            task_manager=manager,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )


@contextmanager
def _no_environment_report() -> Iterator[None]:
    """`simple_evaluate` runs `pip list` and friends (3 s a call) for a text that is not kept here,
    and a `git` whose complaint lands on the terminal wherever there is no repository.

    There is no argument for it in lm_eval 0.4.13; remove this when there is one.
    """
    from lm_eval import evaluator

    kept = evaluator.add_env_info, evaluator.get_git_commit_hash
    evaluator.add_env_info = lambda storage: None
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = kept


def _record(task: str, raw: Mapping[str, Any], scores: Mapping[str, Score]) -> dict[str, Any]:
    """The part of a task's record that lm_eval knows."""
    from lm_eval.utils import hash_string

    better = raw["higher_is_better"].get(task, {})
    counts = raw["n-samples"].get(task, {})
    parts = [
        one["doc_hash"] + one["prompt_hash"] + one["target_hash"]
        for one in raw.get("samples", {}).get(task, [])
    ]
    return {
        "metrics": {
            metric: {
                "value": score.value,
                "stderr": score.stderr,
                "higher_is_better": better.get(metric.partition(",")[0]),
            }
            for metric, score in scores.items()
        },
        "n": counts.get("effective", raw["results"][task].get("sample_len")),
        "n_total": counts.get("original"),
        "version": raw["versions"].get(task),
        "hash": hash_string("".join(parts)) if parts else None,  # as `lm_eval --log_samples` has it
        "group": raw["group_subtasks"].get(task),
    }


def _check_dtype(dtype: str) -> None:
    known = ("auto", "float32", "bfloat16", "float16", "float64")
    if dtype not in known:
        raise RecipeError.of("dtype", dtype, "is not a floating type", f"one of {', '.join(known)}")


def _torch_device(device: str | None) -> Any:
    """The torch device; RecipeError where this machine has none such. lm_eval would fall back."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise RecipeError.of("device", device, "is no device", "cpu, cuda, cuda:1, mps") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RecipeError.of("device", device, f"torch sees {count} CUDA devices", "--device cpu")
    return wanted
