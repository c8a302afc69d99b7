"""`llmkd label`: a teacher over a dataset, once; the labels kept, verified, shared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset

from llmkd.errors import MissingFileError
from llmkd.files import write_text
from llmkd.labels import AnyEncoding, Store, StoreWriter, describe, verify_checksums
from llmkd.methods.label_job import LabelJob
from llmkd.methods.label_run import RECIPE, write_store
from llmkd.methods.label_verify import (
    Found,
    check_same,
    compare_rows,
    print_lines,
    without_teacher,
)
from llmkd.methods.recipe import read_recipe
from llmkd.methods.salt_config import TYPES, with_absolute_paths
from llmkd.teachers import LiveTeacher, StoredTeacher
from llmkd.teachers.stored import store_folder


def main(argv: Sequence[str]) -> Path:
    """`llmkd label RECIPE [--key value ...]`; returns the store's folder."""
    recipe = with_absolute_paths(read_recipe(argv, TYPES))
    job = LabelJob(recipe)
    teacher, encoding = job.find_teacher()
    plan = job.store_plan(teacher, encoding)
    state, labels = PartialState(), job.labels
    writer = StoreWriter(
        job.folder, plan, main=state.is_main_process, overwrite=labels.overwrite_labels
    )
    with state.main_process_first():
        entered = writer.__enter__()
    try:
        if _whole(entered):
            job.plan.say(
                f"labels: {job.folder} is finished already (key {plan.key}); {_read(entered)}"
            )
        else:
            _write(job, entered, teacher, encoding)
    finally:
        writer.__exit__(None, None, None)
    if state.is_main_process:
        print_lines(describe(Store.open(job.folder)))
    return job.folder


def _whole(writer: StoreWriter) -> bool:
    head = writer.plan.encoding.needs != "hidden" or writer.has_head
    return writer.done and head and not writer.missing_shards()


def _read(writer: StoreWriter) -> str:
    """How far a finished store was looked at."""
    if writer.reads_sums:
        return "every file has the SHA-256 written down for it"
    return f"its files have their sizes; `llmkd label verify {writer.folder}` reads every byte"


def _write(job: LabelJob, writer: StoreWriter, teacher: LiveTeacher, encoding: AnyEncoding) -> None:
    state = PartialState()
    job.load(teacher)
    if state.is_main_process:
        text = yaml.safe_dump(job.plan.recipe.public(), sort_keys=False)
        write_text(job.folder / RECIPE, text)
    labeller, quiet = job.labeller(teacher, encoding), job.plan.training.disable_tqdm
    with torch.no_grad():
        tokens, seconds = write_store(
            writer, labeller, job.rows, job.sample(writer.plan), quiet=bool(quiet)
        )
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
        rate = tokens / max(seconds, 1e-9)
        job.plan.say(f"labelled {tokens:,} tokens on this rank, {rate:,.0f} a second")
    state.wait_for_everyone()


def info(folder: str) -> None:
    """`llmkd label info STORE`: a table of what is in it."""
    print_lines(describe(Store.open(store_folder(folder))))


def verify(arguments: argparse.Namespace) -> int:
    """`llmkd label verify STORE`: every checksum, and a sample computed again; the exit code.

    Nothing is trained for it: without its teacher a store's labels cannot be made again, but their
    rows can be compared with the recipe's.
    """
    folder = store_folder(arguments.store)
    problems = verify_checksums(folder)
    print_lines([("checksums", "whole" if not problems else f"{len(problems)} problem(s)")])
    lines: list[tuple[str, str]] = []
    path = Path(arguments.recipe) if arguments.recipe else folder / RECIPE
    if problems or arguments.checksums_only:
        pass
    elif not path.is_file():
        lines.append(("recomputed", "nothing: no recipe beside the store; give one with --recipe"))
    else:
        found, wrong = _recompute(Store.open(folder), path, arguments.rows)
        lines += found
        problems += wrong
    print_lines(lines)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _recompute(store: Store, recipe: Path, rows: int) -> Found:
    if store.manifest["teacher"].get("label_names"):
        from llmkd.methods.ernie_label import recompute

        return recompute(store, recipe, rows)
    argv = [str(recipe), "--label_store", str(store.folder)]
    job = LabelJob(with_absolute_paths(read_recipe(argv, TYPES)), writes=False)
    try:
        teacher, encoding = job.find_teacher()
    except MissingFileError as error:
        made = job.stage.rows
        return without_teacher(store, StoredTeacher(store), made.fingerprint, made.train, error)
    plan = job.store_plan(teacher, encoding)
    check_same(store, plan, recipe)
    if not isinstance(job.rows, Dataset):
        return [("recomputed", "nothing: the rows are a stream")], []
    if encoding.name == "lowrank":
        from llmkd.labels.heads import read_fit

        encoding = read_fit(store.folder, encoding)
    job.load(teacher)
    with torch.no_grad():
        return compare_rows(store, plan, job.labeller(teacher, encoding), job.rows, rows)
