"""A recipe read for labelling: its rows, its teacher, and what the store will hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from llmkd.data import load_documents, pad_id
from llmkd.data.tokenizer import tokenizer_digest
from llmkd.errors import DataError, RecipeError
from llmkd.labels import AnyEncoding, StorePlan, check_folder
from llmkd.labels.config import LabelConfig
from llmkd.labels.manifest import NAME as MANIFEST
from llmkd.methods.label_run import (
    Labeller,
    autocast_of,
    check_writable,
    labelling_accelerator,
)
from llmkd.methods.recipe import Recipe
from llmkd.methods.salt_config import check_recipe
from llmkd.methods.salt_plan import Plan, make_rows, make_tokenizer
from llmkd.methods.salt_select import choose_rows
from llmkd.methods.salt_teacher import small_lm, taught, teacher_at_hand, teacher_stage
from llmkd.methods.stage import Stage, student_config
from llmkd.methods.steps import longest_run, stage1_rows
from llmkd.teachers import LiveTeacher
from llmkd.teachers.loading import load_config


class LabelJob:
    """A recipe read for labelling: rows, tokenizer, teacher, and what the store will be."""

    def __init__(self, recipe: Recipe, *, writes: bool = True) -> None:
        self.labels: LabelConfig = recipe.build()[5]
        if not self.labels.label_store:
            raise RecipeError.of(
                "label_store", None, "where shall the labels go?", "--label_store runs/my-labels"
            )
        # While writing nothing is read from a store.
        plain = Recipe({**recipe.settings, "label_store": None}, recipe.given, recipe.types)
        check_recipe(plain)
        self.folder, self.writes = Path(self.labels.label_store), writes
        if writes:
            check_folder(self.folder)
            check_writable(self.folder)
        self.plan = Plan.of(plain)
        teacher = plain.build()[2]
        name, revision = teacher.teacher_model_name_or_path, teacher.teacher_model_revision
        if not (name or teacher.teacher_model_config):
            raise RecipeError.of(
                "teacher_model_name_or_path",
                None,
                "no teacher to label with",
                "name a Hub id or folder",
            )
        if name and writes:  # before the text is read: its config is at hand
            self._check_shape(load_config(name, revision, "teacher_model_name_or_path"))
        documents = load_documents(self.plan.data)
        self.plan.tokenizer = make_tokenizer(self.plan, documents)
        self.plan.rows = make_rows(self.plan, documents)
        self.stage: Stage = self.plan.stage("", {})
        self.facts: dict[str, Any] = {}

    @property
    def rows(self) -> Dataset | IterableDataset:
        """The train rows."""
        return self.stage.rows.train

    def find_teacher(self) -> tuple[LiveTeacher, AnyEncoding]:
        """The teacher, its weights not loaded yet, and the encoding.

        A job that writes pretrains it first where the recipe says so; one that does not takes it
        as it stands, and raises MissingFileError where it is gone.
        """
        self.facts = self._train_teacher() if self.writes else teacher_at_hand(self.plan)
        teacher = LiveTeacher(
            self.facts["source"],
            revision=self.facts["revision"],
            dtype=self.stage.settings["teacher_dtype"],
            packed=self.stage.data.packing,
        )
        config = teacher.config()
        assert self.plan.tokenizer is not None
        teacher.check(config.vocab_size, self.plan.tokenizer)
        assert teacher.shared is not None
        return teacher, self._encoding(teacher.shared, config.get_text_config().hidden_size)

    def _train_teacher(self) -> dict[str, Any]:
        small = teacher_stage(self.plan)
        if small is not None:
            self._check_shape(student_config(small))
            self.plan.claim()
            self.plan.claim_stages([small])
        facts = small_lm(self.plan, small)
        assert facts is not None
        return facts

    def _encoding(self, shared: int, width: int) -> AnyEncoding:
        temperature = self.plan.training.teacher_temperature
        return self.labels.encoding(shared=shared, width=width, temperature=temperature)

    def _check_shape(self, config: Any) -> None:
        """Refuse what a teacher of that shape cannot give, and a store of other settings, before
        anything is read, trained or loaded.
        """
        vocab, tokenizer = config.vocab_size, self.plan.tokenizer
        shared = vocab if tokenizer is None else min(vocab, len(tokenizer))
        encoding = self._encoding(shared, config.get_text_config().hidden_size)
        known = {
            "encoding": encoding.settings(),
            "temperature": encoding.temperature,
            "packing": self.plan.data.packing_strategy if self.plan.data.packing else None,
            "max_length": self.plan.data.max_length,
            "vocab": vocab,
            "seed": self.labels.label_seed,
            "rows_per_shard": self.labels.label_rows_per_shard,
        }
        check_folder(self.folder, known, overwrite=self.labels.overwrite_labels)

    def load(self, teacher: LiveTeacher) -> None:
        """Bring the teacher's weights to the device."""
        teacher.load(labelling_accelerator(self.stage.training, self.labels.label_batch_size))

    def store_plan(self, teacher: LiveTeacher, encoding: AnyEncoding) -> StorePlan:
        """All that decides the store's contents."""
        numbers, total = self.wanted_rows()
        stage, tokenizer = self.stage, self.plan.tokenizer
        assert tokenizer is not None
        return StorePlan(
            encoding=encoding,
            teacher={
                "id": self.facts["source"],
                "revision": self.facts["revision"],
                "fingerprint": self.facts["fingerprint"],
                "dtype": stage.settings["teacher_dtype"],
                "autocast": autocast_of(stage.training),
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
        """Numbers of the rows to label, ascending, and how many rows there are.

        Those of stage 1 are what any arm's KD stage trains on. Of a stream nothing else is known;
        DataError where it is shorter than that.
        """
        if isinstance(self.rows, Dataset) and self.labels.label_rows == "all":
            return np.arange(len(self.rows)), len(self.rows)
        arms = [self.plan.stage(name, changes) for name, changes in self.plan.arms.items()]
        arms = [arm for arm in arms if taught(arm)]
        if not arms:
            raise RecipeError.of(
                "label_rows",
                self.labels.label_rows,
                "no arm has a KD stage, so none has rows",
                "--kd_ratio above 0",
                "--label_rows all",
            )
        for arm in arms:
            arm.first, _ = choose_rows(self.plan, arm, self.facts)
        wanted = [stage1_rows(arm) for arm in arms]
        if isinstance(self.rows, IterableDataset):
            longest = max(range(len(arms)), key=lambda place: len(wanted[place]))
            self._check_stream(self.rows, arms[longest], len(wanted[longest]))
            return wanted[longest], len(wanted[longest])
        return np.unique(np.concatenate(wanted)), len(self.rows)

    def _check_stream(self, rows: IterableDataset, arm: Stage, needed: int) -> None:
        """A store of rows that never come could not be finished, so they are counted first. Where
        there is a store they were.
        """
        if (self.folder / MANIFEST).exists():
            return
        self.plan.say(f"counting {needed:,} rows of the stream")
        found = sum(1 for _ in rows.take(needed))
        if found == needed:
            return
        fits = longest_run(arm, found)
        raise DataError.of(
            "max_steps",
            arm.steps,
            f"the KD stage of so many steps (kd_ratio {arm.training.kd_ratio}) takes {needed:,} "
            f"rows, and the stream ends after {found:,} of {arm.data.max_length} tokens",
            *([f"--max_steps {fits} is what they are enough for"] if fits else []),
            "more text, or a smaller kd_ratio",
            "--streaming false: the rows are then trained on again, epoch by epoch",
        )

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
