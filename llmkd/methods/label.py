"""`llmkd label`: a teacher over a dataset, once; the labels kept, verified, shared."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset

from llmkd.data import load_documents, pad_id
from llmkd.data.tokenizer import tokenizer_digest
from llmkd.errors import DataError, RecipeError, RunFolderError
from llmkd.files import write_text
from llmkd.labels import (
    AnyEncoding,
    Store,
    StorePlan,
    StoreWriter,
    describe,
    make_encoding,
    verify_checksums,
)
from llmkd.labels.config import LabelConfig
from llmkd.methods.label_run import Labeller, write_store
from llmkd.methods.label_verify import compare_rows, print_lines
from llmkd.methods.recipe import Recipe, read_recipe
from llmkd.methods.salt_config import TYPES, check_recipe, with_absolute_paths
from llmkd.methods.salt_plan import Plan, make_rows, make_tokenizer
from llmkd.methods.salt_select import choose_rows
from llmkd.methods.salt_teacher import small_lm, teacher_stage
from llmkd.methods.stage import Stage
from llmkd.methods.steps import stage1_rows
from llmkd.teachers import LiveTeacher
from llmkd.teachers.stored import store_folder

RECIPE = "recipe.yaml"


def main(argv: Sequence[str]) -> Path:
    """`llmkd label RECIPE [--key value ...]`; returns the store's folder."""
    recipe = with_absolute_paths(read_recipe(argv, TYPES))
    job = LabelJob(recipe)
    teacher, encoding = job.load_teacher()
    plan = job.store_plan(teacher, encoding)
    state, labels = PartialState(), job.labels
    writer = StoreWriter(
        job.folder, plan, main=state.is_main_process, overwrite=labels.overwrite_labels
    )
    with state.main_process_first():
        entered = writer.__enter__()
    try:
        if entered.done and not entered.missing_shards():
            job.plan.say(f"labels: {job.folder} is finished already (key {plan.key})")
        else:
            _write(job, entered, teacher, encoding)
    finally:
        writer.__exit__(None, None, None)
    if state.is_main_process:
        print_lines(describe(Store.open(job.folder)))
    return job.folder


def _write(job: LabelJob, writer: StoreWriter, teacher: LiveTeacher, encoding: AnyEncoding) -> None:
    state = PartialState()
    if state.is_main_process:
        text = yaml.safe_dump(job.plan.recipe.public(), sort_keys=False)
        write_text(job.folder / RECIPE, text)
    labeller = job.labeller(teacher, encoding)
    with torch.no_grad():
        tokens, seconds = write_store(writer, labeller, job.rows, job.sample(writer.plan))
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
        rate = tokens / max(seconds, 1e-9)
        job.plan.say(f"labelled {tokens:,} tokens on this rank, {rate:,.0f} a second")
    state.wait_for_everyone()


class LabelJob:
    """A recipe read for labelling: rows, tokenizer, teacher, and what the store will be."""

    def __init__(self, recipe: Recipe) -> None:
        self.labels: LabelConfig = recipe.build()[5]
        if not self.labels.label_store:
            raise RecipeError.of(
                "label_store", None, "where shall the labels go?", "--label_store runs/my-labels"
            )
        # While writing nothing is read from a store.
        plain = Recipe({**recipe.settings, "label_store": None}, recipe.given, recipe.types)
        check_recipe(plain)
        self.folder = Path(self.labels.label_store)
        _check_writable(self.folder)
        self.plan = Plan.of(plain)
        teacher = plain.build()[2]
        if not (teacher.teacher_model_name_or_path or teacher.teacher_model_config):
            raise RecipeError.of(
                "teacher_model_name_or_path",
                None,
                "no teacher to label with",
                "name a Hub id or folder",
            )
        documents = load_documents(self.plan.data)
        self.plan.tokenizer = make_tokenizer(self.plan, documents)
        self.plan.rows = make_rows(self.plan, documents)
        self.stage: Stage = self.plan.stage("", {})
        self.facts: dict[str, Any] = {}

    @property
    def rows(self) -> Dataset | IterableDataset:
        """The train rows."""
        return self.stage.rows.train

    def load_teacher(self) -> tuple[LiveTeacher, AnyEncoding]:
        """The teacher in memory (pretrained first where the recipe says so) and the encoding."""
        small = teacher_stage(self.plan)
        if small is not None:
            self.plan.claim()
            self.plan.claim_stages([small])
        facts = small_lm(self.plan, small)
        assert facts is not None and self.plan.tokenizer is not None
        self.facts = facts
        teacher = LiveTeacher(
            facts["source"],
            revision=facts["revision"],
            dtype=self.stage.settings["teacher_dtype"],
            packed=self.stage.data.packing,
        )
        config = teacher.config()
        teacher.check(config.vocab_size, self.plan.tokenizer)
        assert teacher.shared is not None
        encoding = self.encoding(teacher.shared, config.get_text_config().hidden_size)
        teacher.load(self._accelerator())
        return teacher, encoding

    def encoding(self, shared: int, width: int) -> AnyEncoding:
        """The recipe's encoding for a teacher of that vocabulary and hidden size."""
        labels = self.labels
        if labels.label_encoding == "lowrank" and labels.label_rank > width:
            raise RecipeError.of(
                "label_rank",
                labels.label_rank,
                f"the teacher's hidden states have {width} numbers",
                f"1 to {width}",
            )
        return make_encoding(
            labels.label_encoding,
            shared=shared,
            width=width,
            temperature=self.stage.training.teacher_temperature,
            seed=labels.label_seed,
            k=labels.label_k,
            value_bits=labels.label_value_bits,
            draws=labels.label_draws,
            sampling=labels.label_sampling,  # pyright: ignore[reportArgumentType]
            dtype=labels.label_dtype,  # pyright: ignore[reportArgumentType]
            rank=labels.label_rank,
        )

    def _accelerator(self) -> Accelerator:
        # The one of a teacher trained here would be of another precision or plugin.
        AcceleratorState._reset_state()
        args = self.stage.training
        plugin = getattr(args, "deepspeed_plugin", None)
        accelerator = Accelerator(deepspeed_plugin=plugin)
        if (plugin := accelerator.state.deepspeed_plugin) is not None:
            size = self.labels.label_batch_size
            known = {
                "train_micro_batch_size_per_gpu": size,
                "gradient_accumulation_steps": 1,
                "train_batch_size": size * accelerator.num_processes,
                "gradient_clipping": 1.0,
            }
            for key, value in known.items():  # "auto" is filled in by a trainer; here is none
                plugin.deepspeed_config[key] = value
        return accelerator

    def store_plan(self, teacher: LiveTeacher, encoding: AnyEncoding) -> StorePlan:
        """All that decides the store's contents."""
        numbers, total = self.wanted_rows()
        stage, tokenizer = self.stage, self.plan.tokenizer
        assert tokenizer is not None
        args = stage.training
        return StorePlan(
            encoding=encoding,
            teacher={
                "id": self.facts["source"],
                "revision": self.facts["revision"],
                "fingerprint": self.facts["fingerprint"],
                "dtype": stage.settings["teacher_dtype"],
                "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
                "parameters": self.facts["parameters"],
                "forward_flops_per_token": self.facts["forward_flops_per_token"],
            },
            tokenizer=tokenizer_digest(tokenizer),
            data=stage.rows.fingerprint,
            packing=stage.data.packing_strategy if stage.data.packing else None,
            max_length=stage.data.max_length,
            vocab=teacher.config().vocab_size,
            rows=numbers,
            total_rows=total,
            rows_per_shard=self.labels.label_rows_per_shard,
            seed=self.labels.label_seed,
            tail=self.labels.label_tail,  # pyright: ignore[reportArgumentType]
        )

    def wanted_rows(self) -> tuple[np.ndarray, int]:
        """Numbers of the rows to label, ascending, and how many rows there are."""
        if isinstance(self.rows, IterableDataset):
            count = len(stage1_rows(self.stage))
            return np.arange(count), count
        if self.labels.label_rows == "all":
            return np.arange(len(self.rows)), len(self.rows)
        self.stage.first, _ = choose_rows(self.plan, self.stage, self.facts)
        return stage1_rows(self.stage), len(self.rows)

    def sample(self, plan: StorePlan) -> list[dict[str, Any]]:
        """Rows across the store, to fit a head on."""
        count = min(self.labels.label_fit_rows, len(plan.rows))
        if not isinstance(self.rows, Dataset):
            return list(self.rows.take(count))
        places = np.linspace(0, len(plan.rows) - 1, count).astype(int)
        return [self.rows[int(plan.rows[place])] for place in places]

    def labeller(self, teacher: LiveTeacher, encoding: AnyEncoding) -> Labeller:
        """Teacher and encoding at work."""
        assert self.plan.tokenizer is not None
        return Labeller(
            teacher,
            encoding,
            pad_id(self.plan.tokenizer),
            self.labels.label_batch_size,
            self.labels.label_memory_mib,
        )


def _check_writable(folder: Path) -> None:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
        raise RunFolderError.of(
            "label_store", str(folder), f"cannot be written to ({place})", "name another folder"
        )


def info(folder: str) -> None:
    """`llmkd label info STORE`: a table of what is in it."""
    print_lines(describe(Store.open(store_folder(folder))))


def verify(arguments: argparse.Namespace) -> int:
    """`llmkd label verify STORE`: every checksum, and a sample computed again; the exit code."""
    folder = store_folder(arguments.store)
    problems = verify_checksums(folder)
    lines = [("checksums", "whole" if not problems else f"{len(problems)} problem(s)")]
    path = Path(arguments.recipe) if arguments.recipe else folder / RECIPE
    if problems or arguments.checksums_only:
        pass
    elif not path.is_file():
        lines.append(("recomputed", "nothing: no recipe beside the store; give one with --recipe"))
    else:
        found, wrong = _recompute(folder, path, arguments.rows)
        lines += found
        problems += wrong
    print_lines(lines)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _recompute(folder: Path, recipe: Path, rows: int) -> tuple[list[tuple[str, str]], list[str]]:
    argv = [str(recipe), "--label_store", str(folder)]
    job = LabelJob(with_absolute_paths(read_recipe(argv, TYPES)))
    store = Store.open(folder)
    teacher, encoding = job.load_teacher()
    plan = job.store_plan(teacher, encoding)
    if plan.key != store.manifest["key"]:
        from llmkd.labels.manifest import differences

        raise DataError.of(
            "recipe",
            str(recipe),
            "does not make this store:\n    "
            + "\n    ".join(differences(store.manifest, plan.settings)),
            "give the recipe it was made with: --recipe FILE",
        )
    if not isinstance(job.rows, Dataset):
        return [("recomputed", "nothing: the rows are a stream")], []
    if encoding.name == "lowrank":
        from llmkd.labels.heads import read_fit

        encoding = read_fit(folder, encoding)
    with torch.no_grad():
        return compare_rows(store, plan, job.labeller(teacher, encoding), job.rows, rows)
