"""`llmkd <verb>`: every verb has `--help`, every mistake one error without a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from llmkd import __version__
from llmkd.errors import LlmkdError

VERBS = {
    "salt": "pretrain a model with a small model's soft labels (SALT), arm by arm",
    "ernie-tiny": "compress an encoder in four stages (ERNIE-Tiny): general to task-specific",
    "irepo": "align a model by regressing preference logits (iREPO): sample, annotate, regress",
    "deqa": "train a model to rate on score distributions (DeQA-Score), arm by arm",
    "score": "rate texts, chats or images with a trained scorer: a table, plots, agreement",
    "judge": "ask a recipe's annotators about pairs people have rated: agreement, calibration",
    "label": "run a teacher over a dataset once and keep its soft labels; verify, info, push",
    "select": "score the rows of a recipe by a selection and draw the histogram",
    "resume": "go on with an interrupted run, knowing only its folder",
    "eval": "run evaluation-harness tasks on models, side by side",
    "report": "make report.html of a run folder again",
    "push": "push a finished run folder to the Hub, with its card",
}

# Verb of a method: its module, which has `main`, `TYPES` and `check_recipe`.
METHODS = {
    "salt": "llmkd.methods.salt",
    "ernie-tiny": "llmkd.methods.ernie_tiny",
    "irepo": "llmkd.methods.irepo",
    "deqa": "llmkd.methods.deqa",
}
# Verbs that take a method's recipe for something else than a run.
ASIDES = {"judge": "llmkd.methods.judge"}
# The module that labels for a method's recipe: `main` and `TYPES` again.
LABELLERS = {"salt": "llmkd.methods.label", "ernie-tiny": "llmkd.methods.ernie_label"}
# Who writes the report of a kind of run.
REPORTS = {
    "salt": ("llmkd.evaluation.report", "write_report"),
    "ernie-tiny": ("llmkd.evaluation.distill_report", "write_distill_report"),
    "irepo": ("llmkd.evaluation.align_report", "write_align_report"),
    "deqa": ("llmkd.evaluation.deqa_report", "write_deqa_report"),
}

LABEL_VERBS = {
    "info": "print what a label store holds",
    "verify": "read every checksum of a label store and label a sample of its rows again",
    "push": "push a label store to the Hub as a dataset with its card",
}
LABEL_USE = (
    "\n\n`llmkd label RECIPE --label_store FOLDER` takes the recipe that will train on them, of\n"
    "salt or of ernie-tiny, whichever has its keys; `llmkd label RECIPE --help` lists these.\n"
    + "\n".join(f"`llmkd label {name} STORE`: {about}." for name, about in LABEL_VERBS.items())
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 a mistake in the input, 2 wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"llmkd {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"llmkd: no verb {verb!r}{hint}\n\n{_overview()}", file=sys.stderr)
        return 2
    try:
        return _run(verb, rest)
    except LlmkdError as error:
        if os.environ.get("RANK", "0") == "0":  # under a launcher every rank comes here
            print(f"llmkd {verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `llmkd salt --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\nllmkd {verb}: stopped; the same command goes on from the last checkpoint")
        return 130


def _overview() -> str:
    lines = [f"  llmkd {verb:<10} {text}" for verb, text in VERBS.items()]
    return (
        "usage: llmkd VERB ...\n\nDistillation and alignment on soft labels.\n\n"
        + "\n".join(lines)
        + "\n\n`llmkd VERB --help` lists what a verb takes. Recipes that come with llmkd:\n"
        + "\n".join(f"  {path}" for path in _recipes())
    )


def _recipes() -> list[str]:
    from llmkd.shipped import shipped_recipes

    return [os.path.relpath(path) for path in shipped_recipes()]


def _run(verb: str, words: list[str]) -> int:
    handlers: dict[str, Callable[[list[str]], int]] = {
        **{name: partial(_method, name) for name in (*METHODS, *ASIDES)},
        "score": _score,
        "label": _label,
        "select": _select,
        "resume": _resume,
        "eval": _eval,
        "report": _report,
        "push": _push,
    }
    stores = verb == "label" and words[:1] and words[0] in LABEL_VERBS
    if (
        verb in (*METHODS, "score", "label", "select", "resume")
        and not stores
        and not {"-h", "--help", "--help_all"} & set(words)
    ):
        from llmkd.launch import split_launch

        config, processes, words = split_launch(words)
        if config is not None or processes is not None:
            from llmkd.launch import config_path, relaunch

            if config is not None:
                config = str(config_path(config))
            if verb in (*METHODS, "select"):
                _check_before_launch(METHODS.get(verb, METHODS["salt"]), words)
            return relaunch(verb, words, config, processes)
    return handlers[verb](words)


def _check_before_launch(module: str, words: list[str]) -> None:
    # A mistake in the recipe is one error here; in the ranks it would be one a rank and a traceback
    # of the launcher.
    from llmkd.methods.recipe import read_recipe

    method = import_module(module)
    method.check_recipe(read_recipe(words, method.TYPES))


def _quiet_libraries() -> None:
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    import torch

    if not torch.accelerator.is_available():
        # DeepSpeed, where installed, warns at import that there is no GPU unless told so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Writing model shards" and the like; training keeps its bar


def _method(verb: str, words: list[str]) -> int:
    _quiet_libraries()
    method = import_module({**METHODS, **ASIDES}[verb])
    if _wants_help(verb, VERBS[verb], method.TYPES, words):
        return 0
    method.main(words)
    return 0


def _score(words: list[str]) -> int:
    _quiet_libraries()
    from llmkd.methods import score

    score.main(words)
    return 0


def _select(words: list[str]) -> int:
    _quiet_libraries()
    from llmkd.methods.recipe import read_recipe
    from llmkd.methods.salt_config import TYPES, with_absolute_paths
    from llmkd.methods.salt_select import select

    if _wants_help("select", VERBS["select"], TYPES, words):
        return 0
    select(with_absolute_paths(read_recipe(words, TYPES)))
    return 0


def _label(words: list[str]) -> int:
    _quiet_libraries()
    if words[:1] and words[0] in LABEL_VERBS:
        return _label_store(words[0], words[1:])
    from llmkd.methods.recipe import method_of

    labellers = {method: import_module(name) for method, name in LABELLERS.items()}
    chosen = labellers[method_of(words, {name: one.TYPES for name, one in labellers.items()})]
    if _wants_help("label", VERBS["label"] + LABEL_USE, chosen.TYPES, words):
        return 0
    chosen.main(words)
    return 0


def _label_store(verb: str, words: list[str]) -> int:
    """`llmkd label info|verify|push STORE`."""
    from llmkd.methods import label

    parser = argparse.ArgumentParser(f"llmkd label {verb}", description=LABEL_VERBS[verb])
    parser.add_argument("store", help="folder of a label store, or a Hub dataset id")
    if verb == "verify":
        parser.add_argument("--rows", type=int, default=32, help="rows to label again (32)")
        parser.add_argument("--recipe", help="the recipe it was made with (default: the one in it)")
        parser.add_argument("--checksums_only", action="store_true", help="load no teacher")
    if verb == "push":
        parser.add_argument("repo", help="Hub dataset id, owner/name")
        parser.add_argument("--private", action="store_true", help="make a new repo private")
        parser.add_argument("--revision", help="branch to push to (default: main)")
    args = parser.parse_args(words)
    if verb == "info":
        label.info(args.store)
        return 0
    if verb == "verify":
        return label.verify(args)
    from llmkd.hub.datasets import push_store

    url = push_store(args.store, args.repo, private=args.private, revision=args.revision)
    print(f"pushed to {url}")
    return 0


def _wants_help(verb: str, about: str, types: tuple[type, ...], words: list[str]) -> bool:
    from llmkd.methods.recipe import help_text

    if not {"-h", "--help", "--help_all"} & set(words):
        return False
    print(help_text(f"llmkd {verb}", about, types, everything="--help_all" in words))
    return True


def _resume(words: list[str]) -> int:
    parser = argparse.ArgumentParser("llmkd resume", description=VERBS["resume"])
    parser.add_argument("folder", help="run folder (holds recipe.yaml), or one arm of it")
    args = parser.parse_args(words)
    _quiet_libraries()
    from llmkd.methods.run_folder import recipe_to_resume

    kind, words = recipe_to_resume(args.folder)
    import_module(METHODS[kind]).main(words)
    return 0


def _eval(words: list[str]) -> int:
    from llmkd.evaluation import cli

    parser = argparse.ArgumentParser("llmkd eval", description=VERBS["eval"])
    cli.add_arguments(parser)
    args = parser.parse_args(words)
    _check_reads_text(args.model)
    _quiet_libraries()
    code = cli.main(args)
    _remake_report(args.model)
    return code


def _check_reads_text(folder: str) -> None:
    """RecipeError for the run of an image-text scorer: lm_eval, here, asks text alone."""
    from llmkd.errors import RecipeError

    run = _facts_of(Path(folder).expanduser())
    if run.get("kind") == "deqa" and (run.get("student") or {}).get("images"):
        problem = "is an image-text model, and eval runs tasks of text alone"
        way = f"agreement with people: llmkd report {folder}, or llmkd score MODEL rows.jsonl"
        raise RecipeError.of("MODEL", folder, problem, way)


def _remake_report(folder: str) -> None:
    if (Path(folder) / "run.json").is_file() and (Path(folder) / "report.html").is_file():
        _write_report(Path(folder))


def _facts_of(folder: Path) -> dict[str, Any]:
    """The folder's `run.json`; empty where there is none or it is not JSON."""
    from llmkd.files import read_json

    try:
        found = read_json(folder / "run.json")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write_report(folder: Path) -> Path:
    from json import JSONDecodeError

    from llmkd.errors import RecipeError
    from llmkd.files import read_json

    try:
        kind = (read_json(folder / "run.json") or {}).get("kind")
        room, name = REPORTS.get(str(kind), REPORTS["salt"])
        return getattr(import_module(room), name)(folder)
    except JSONDecodeError as error:
        problem = f"a file of the run is not JSON: {error}: {error.doc[:40]!r}"
        raise RecipeError.of("folder", str(folder), problem, "train the run again") from None


def _report(words: list[str]) -> int:
    from llmkd.errors import MissingFileError

    parser = argparse.ArgumentParser("llmkd report", description=VERBS["report"])
    parser.add_argument("folder", help="run folder, of one run or of several arms")
    args = parser.parse_args(words)
    folder = Path(args.folder).expanduser()
    if not (folder / "run.json").is_file():
        raise MissingFileError.of("folder", args.folder, "holds no run.json", "name a run folder")
    page = _write_report(folder)
    if _facts_of(folder).get("kind") == "deqa":
        from llmkd.evaluation.deqa_report import print_deqa_table

        print_deqa_table(folder)
    print(page)
    return 0


def _push(words: list[str]) -> int:
    parser = argparse.ArgumentParser("llmkd push", description=VERBS["push"])
    parser.add_argument("folder", help="finished run folder of one model")
    parser.add_argument("repo", help="Hub id, owner/name")
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    args = parser.parse_args(words)
    from llmkd.hub import push_run

    url = push_run(Path(args.folder), args.repo, private=args.private, revision=args.revision)
    print(f"pushed to {url}")
    return 0


if __name__ == "__main__":
    from llmkd.launch import leave

    leave(main())
