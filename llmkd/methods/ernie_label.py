"""`llmkd label` of an ERNIE-Tiny recipe: its fine-tuned teacher over the task's rows, once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor

from llmkd.data import TaskCollator, TaskRows, pad_id
from llmkd.data.tokenizer import tokenizer_digest
from llmkd.errors import MissingFileError, RecipeError
from llmkd.files import write_text
from llmkd.labels import (
    Dense,
    Store,
    StorePlan,
    check_folder,
    class_plan,
    describe,
    write_class_store,
)
from llmkd.labels.classes import Row, batches_of, labelled
from llmkd.labels.manifest import read_manifest
from llmkd.methods.ernie_config import PATH_KEYS, TYPES, check_recipe
from llmkd.methods.ernie_plan import Plan
from llmkd.methods.ernie_teacher import check_given, finetuned_teacher, teacher_at_hand
from llmkd.methods.label_run import RECIPE, autocast_of, check_writable, labelling_accelerator
from llmkd.methods.label_verify import (
    Found,
    check_same,
    compare_batches,
    print_lines,
    without_teacher,
)
from llmkd.methods.recipe import Recipe, read_recipe, with_absolute_paths
from llmkd.teachers.inside import Wanted
from llmkd.teachers.latent import LatentTeacher
from llmkd.teachers.stored_classes import StoredClasses


def main(argv: Sequence[str]) -> Path:
    """`llmkd label RECIPE [--key value ...]`; returns the store's folder."""
    job = ClassJob(_recipe(argv))
    check_folder(job.folder)
    check_writable(job.folder)
    job.plan.read_rows(general=False)
    check_given(job.plan)
    job.check_store()
    facts = finetuned_teacher(job.plan)
    job.write(facts)
    if job.plan.main:
        print_lines(describe(Store.open(job.folder)))
    return job.folder


def _recipe(argv: Sequence[str]) -> Recipe:
    return with_absolute_paths(read_recipe(argv, TYPES), PATH_KEYS)


class ClassJob:
    """A recipe read for labelling. Every row a student's task stages may train on is labelled: the
    training rows and those that `augment` adds.
    """

    def __init__(self, recipe: Recipe) -> None:
        check_recipe(recipe)
        if not recipe.settings["label_store"]:
            raise RecipeError.of(
                "label_store", None, "where shall the labels go?", "--label_store runs/my-labels"
            )
        if not recipe.settings["task_dataset"]:
            raise RecipeError.of(
                "task_dataset", None, "no task to label", "--task_dataset PATH_OR_ID"
            )
        self.recipe, self.folder = recipe, Path(recipe.settings["label_store"])
        # While writing nothing is read from a store.
        plain = Recipe({**recipe.settings, "label_store": None}, recipe.given, recipe.types)
        self.plan = Plan.of(plain)
        self.args = self._stage_args(plain)

    def _stage_args(self, recipe: Recipe) -> Any:
        """The training arguments of the first stage that will read the labels; the recipe's where
        none does. A teacher answers there in their precision.
        """
        for specs in self.plan.specs().values():
            for spec in specs:
                if "soft" in spec.losses:
                    return spec.args(recipe, "unused")
        return self.plan.training

    @property
    def rows(self) -> TaskRows:
        """The task."""
        assert self.plan.task_rows is not None
        return self.plan.task_rows

    def store_plan(self, facts: dict[str, Any]) -> StorePlan:
        """All that decides the store's contents; `facts` of the teacher, {} where not known yet."""
        assert self.plan.tokenizer is not None
        config = self.plan.config
        return class_plan(
            label_names=self.rows.output_names,
            teacher={
                "id": facts.get("source"),
                "revision": facts.get("revision"),
                "fingerprint": facts.get("fingerprint"),
                "dtype": config.teacher_dtype,
                "autocast": autocast_of(self.args),
            },
            tokenizer_digest=tokenizer_digest(self.plan.tokenizer),
            rows_fingerprint=self.rows.taught_fingerprint,
            max_length=self.plan.task.task_max_length,
            total_rows=len(self.rows.taught),
            rows_per_shard=config.label_rows_per_shard,
            per="token" if self.rows.kind == "token" else "row",
        )

    def check_store(self) -> None:
        """RunFolderError for a store of other settings, before a teacher is trained for it."""
        settings = self.store_plan({}).settings
        known = {name: value for name, value in settings.items() if name != "teacher"}
        check_folder(self.folder, known, overwrite=self.plan.config.overwrite_labels)

    def write(self, facts: dict[str, Any]) -> None:
        """Label every row that is not labelled yet. The teacher is loaded for the first of them."""
        plan, state = self.store_plan(facts), PartialState()
        known = read_manifest(self.folder) or {}
        whole = known.get("key") == plan.key and known.get("status") == "done"
        asker = Asker(self, facts)
        asked = write_class_store(
            self.folder,
            rows=self.rows.taught,
            answer=asker,
            plan=plan,
            batch_size=self.plan.config.label_batch_size,
            main=self.plan.main,
            overwrite=self.plan.config.overwrite_labels,
            quiet=bool(self.args.disable_tqdm),
            in_step=asker.in_step,
        )
        asker.teacher.release()
        if self.plan.main and not (whole and (self.folder / RECIPE).is_file()):
            text = yaml.safe_dump(self.recipe.public(), sort_keys=False)
            write_text(self.folder / RECIPE, text)
        if asked or not whole:
            self.plan.say(f"labels: this rank labelled {asked:,} of {len(plan.rows):,} rows")
        else:
            self.plan.say(f"labels: {self.folder} is finished already (key {plan.key})")
        state.wait_for_everyone()


class Asker:
    """The teacher as `write_class_store` asks it: rows to logits, in the batches of training."""

    def __init__(self, job: ClassJob, facts: dict[str, Any]) -> None:
        assert job.plan.tokenizer is not None
        self.accelerator = labelling_accelerator(job.args, job.plan.config.label_batch_size)
        self.collate = TaskCollator(pad_id(job.plan.tokenizer), kind=job.rows.kind)
        self.teacher = LatentTeacher(
            facts["source"],
            head=facts["head"],
            wanted=Wanted(logits=True),
            revision=facts["revision"],
            dtype=job.plan.config.teacher_dtype,
            key="finetuned_teacher_name_or_path",
        )

    @property
    def in_step(self) -> bool:
        """Whether ranks may hold parts of the teacher and must ask together."""
        kinds = (DistributedType.DEEPSPEED, DistributedType.FSDP)
        return self.accelerator.distributed_type in kinds

    def __call__(self, rows: list[Row]) -> Tensor:
        """Logits [B, C], or [B, T, C] of a token task."""
        self.teacher.load(self.accelerator)
        device = self.accelerator.device
        batch = {name: value.to(device) for name, value in self.collate(rows).items()}
        return self.teacher.classes(batch).logits_BTV


def recompute(store: Store, recipe: Path, wanted: int) -> Found:
    """About `wanted` rows of a store labelled again, in the batches they were made in; a table and
    problems. Nothing is trained for it. DataError where the recipe makes another store.
    """
    job = ClassJob(_recipe([str(recipe), "--label_store", str(store.folder)]))
    job.plan.read_rows(general=False)
    rows, size = job.rows.taught, job.plan.config.label_batch_size
    try:
        facts = teacher_at_hand(job.plan)
    except MissingFileError as error:
        data = job.rows.taught_fingerprint
        return without_teacher(store, StoredClasses(store), data, rows, error)
    plan = job.store_plan(facts)
    check_same(store, plan, recipe)
    asker, encoding = Asker(job, facts), cast(Dense, plan.encoding)

    def label(place: tuple[int, int]) -> list[Row]:
        shard, batch = place
        numbers, some = list(batches_of(rows, plan, shard, size))[batch]
        return labelled(numbers, some, asker(some), encoding)

    places = [
        (shard, batch)
        for shard in range(plan.shards)
        for batch in range(-(-len(plan.shard_rows(shard)) // size))
    ]
    return compare_batches(store, places, label, -(-wanted // size))
