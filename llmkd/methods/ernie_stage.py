"""One stage of one arm: a student that begins where the one before ended, in a folder of its own.

The folder is keyed by all that made the weights in it, this stage and every one before, so that
arms with equal beginnings share them, and runs of different tasks share general distillation.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import nn

from llmkd.errors import RunFolderError
from llmkd.evaluation.task_metrics import task_scores
from llmkd.files import digest, move_into, read_json, write_json
from llmkd.methods.ernie_plan import Plan
from llmkd.methods.ernie_stages import StageSpec
from llmkd.methods.recipe import Recipe
from llmkd.methods.run_folder import RunFolder, check_room, result_settings
from llmkd.methods.steps import global_batch
from llmkd.methods.train_folder import begin_or_reuse, disk_needed, final_scores, train_in
from llmkd.models.latent_student import LatentStudent, new_projections, split_state
from llmkd.models.student import with_task_head
from llmkd.teachers.latent import ClassTeachers, LatentTeacher
from llmkd.teachers.loading import load_model, whole_weights
from llmkd.trainers import LatentDistillTrainer
from llmkd.trainers.bar import quiet_bar
from llmkd.trainers.callbacks import MetricsFile

VERSION = 1  # raise it when a stage's weights would come out differently
PROJECTIONS = "projections.safetensors"
HEADS = {"token": "token"}  # kinds of task whose model is not one of sequences


@dataclass(frozen=True)
class Start:
    """Where a student begins: a key of what made it, and how to get its model (whole, on the CPU).

    `folder` is the stage before; None for a student that is new.
    """

    key: str
    make: Callable[[], Any]
    folder: Path | None = None
    general: bool = True  # no task had a part in it


@dataclass
class DistillStage:
    """A stage to train: its spec, the recipe with the arm's changes, and where it begins."""

    spec: StageSpec
    recipe: Recipe
    plan: Plan
    start: Start
    role: dict[str, Any] | None  # facts of its teacher
    soft: list[dict[str, Any]] = field(default_factory=list)  # entries of `teachers`, or a store
    folder: Path = Path()
    label: str = ""
    rows: Any = None  # instead of the task's own (a control with permuted labels)

    def __post_init__(self) -> None:
        self.general = self.start.general and self.spec.data == "general"
        self.general &= self.spec.teacher in ("pretrained", "none")
        self.args = self.spec.args(self.recipe, "unused")
        self.key = self._key()
        if self.folder == Path():
            root = self.plan.general_folder if self.general else self.plan.folder / "stages"
            self.folder = root / f"{self.spec.name}-{self.key}"
        self.args = self.spec.args(self.recipe, str(self.folder))
        self.run = RunFolder(self.folder, main=self.plan.main)
        self.label = self.label or self.spec.name

    def _key(self) -> str:
        data = self.data_fingerprint()
        settings = result_settings(self.spec.result_settings(self.recipe.settings))
        settings["seed"] = self.args.seed
        teacher = (self.role or {}).get("fingerprint")
        soft = [entry["fingerprint"] for entry in self.soft] if "soft" in self.spec.losses else []
        batch = global_batch(self.args)
        losses = list(self.spec.losses)
        dtype = self.plan.config.teacher_dtype
        if dtype != "auto" and (teacher or soft):  # general stages are shared between recipes
            settings["teacher_dtype"] = dtype
        return digest([VERSION, self.start.key, teacher, soft, data, losses, settings, batch])

    def data_fingerprint(self) -> str:
        """Hash of the rows it trains on; of the general text, or of the task."""
        plan = self.plan
        if self.spec.data == "general":
            assert plan.general_rows is not None
            return plan.general_rows.fingerprint
        assert plan.task_rows is not None
        if self.augmented:
            return plan.task_rows.taught_fingerprint
        return plan.task_rows.fingerprint + ("" if self.rows is None else "-permuted")

    @property
    def augmented(self) -> bool:
        """Whether the rows that `augment` made join the task's: where a teacher has a part."""
        on = self.recipe.settings["augment"] is not None and self.rows is None
        return on and self.spec.data == "task" and self.spec.teacher != "none"

    @property
    def train_rows(self) -> Dataset | IterableDataset:
        """Rows it trains on."""
        source = self.plan.general_rows if self.spec.data == "general" else self.plan.task_rows
        assert source is not None
        if self.augmented:
            assert self.plan.task_rows is not None
            return self.plan.task_rows.taught
        return source.train if self.rows is None else self.rows

    @property
    def held_out(self) -> Dataset:
        """Rows it is scored on."""
        source = self.plan.general_rows if self.spec.data == "general" else self.plan.task_rows
        assert source is not None
        return source.held_out

    def task_scores(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Scores of task outputs, the recipe's metric among them."""
        plan = self.plan
        return task_scores(str(plan.kind), outputs, labels, metric=plan.task.task_metric)

    @property
    def head(self) -> str:
        """The head of the model that comes out: none, sequence or token."""
        if self.spec.predicts:
            return HEADS.get(str(self.plan.kind), "sequence")
        before = None if self.start.folder is None else read_json(self.start.folder / "run.json")
        return before["student"]["head"] if before else "none"

    def facts(self) -> dict[str, Any]:
        """What an arm's `run.json` says of the stage."""
        known, spec = self.run.facts() or {}, self.spec
        names = ("steps", "wall_seconds", "peak_memory_bytes", "tokens")
        return {
            "name": spec.name,
            "folder": str(self.folder),
            "key": self.key,
            "teacher": spec.teacher,
            "data": spec.data,
            "losses": list(spec.losses),
            **{name: known.get(name) for name in names},
        }

    def end(self) -> Start:
        """Where the next stage begins."""
        return Start(self.key, partial(load_student, self.folder), self.folder, self.general)


def train(stage: DistillStage) -> dict[str, Any]:
    """Train, resume or reuse a stage; returns its `run.json`."""
    run, say = stage.run, stage.plan.say
    settings = result_settings(stage.spec.result_settings(stage.recipe.settings))
    with one_at_a_time(stage.folder, main=run.main):
        facts = begin_or_reuse(run, stage.key, settings, name=stage.label, say=say)
        if facts is not None:
            return facts
        return train_in(
            run,
            stage.key,
            name=stage.label,
            facts=_facts(stage, settings),
            recipe={**stage.recipe.public(), **stage.spec.settings},
            make=lambda: make_trainer(stage),
            save=lambda trainer: save(stage, trainer),
            say=say,
        )


@contextmanager
def one_at_a_time(folder: Path, *, main: bool) -> Iterator[None]:
    """Hold a stage's folder; RunFolderError where another process trains in it."""
    if not main:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError.of(
                "output_dir",
                str(folder),
                "another process trains this very stage now",
                "wait for it: the same command then reuses what it made",
                "--general_stages FOLDER: general distillation of this run's own",
            ) from error
        yield


def make_trainer(stage: DistillStage) -> LatentDistillTrainer:
    """The trainer of a stage with its student, teachers and rows."""
    # Each trainer brings its own accelerator; without the reset DeepSpeed refuses a second one.
    AcceleratorState._reset_state()
    plan, spec, args = stage.plan, stage.spec, stage.args
    with whole_weights():  # an engine shares the weights out later
        student = _student(stage)
    check_room(stage.folder, disk_needed(sum(p.numel() for p in student.parameters()), args))
    trainer = LatentDistillTrainer(
        student,
        args,
        losses=spec.losses,
        teacher=_teacher(stage),
        soft_teachers=soft_teachers(stage),
        kind=plan.kind,
        task_metrics=stage.task_scores,
        train_dataset=stage.train_rows,
        eval_dataset=stage.held_out,
        processing_class=plan.tokenizer,
        callbacks=[MetricsFile(stage.folder)],
    )
    quiet_bar(trainer, stage.label)
    return trainer


def _student(stage: DistillStage) -> LatentStudent:
    """The student as the stage before left it, with a head and projections where it needs them."""
    plan, seed = stage.plan, int(stage.recipe.settings["seed"])
    made = stage.start.make()
    student = made if isinstance(made, LatentStudent) else LatentStudent(made)
    if stage.spec.predicts and student.body.base_model is student.body:
        rows = plan.task_rows
        assert rows is not None
        names = () if rows.kind == "regression" else rows.label_names
        body = with_task_head(student.body, kind=rows.kind, label_names=names, seed=seed)
        student = LatentStudent(body, student.projections)
    wants = "latent" in stage.spec.losses and stage.args.hidden
    if wants and not student.projections:
        student.projections = _projections(stage, student, seed)
    return student


def _projections(stage: DistillStage, student: LatentStudent, seed: int) -> nn.ModuleDict:
    own, theirs = student.config.get_text_config(), stage.plan.teacher_config().get_text_config()
    return new_projections(
        stage.args.projection,
        layers=range(own.num_hidden_layers + 1),
        student_width=own.hidden_size,
        teacher_width=theirs.hidden_size,
        seed=seed,
    )


def _teacher(stage: DistillStage) -> LatentTeacher | None:
    if stage.role is None:
        return None
    return LatentTeacher(
        stage.role["source"],
        head=stage.role["head"],
        revision=stage.role.get("revision"),
        dtype=stage.plan.config.teacher_dtype,
    )


def soft_teachers(stage: DistillStage) -> ClassTeachers | None:
    """The teachers of the soft loss where the recipe names some, else None: the stage's own."""
    if not stage.soft or "soft" not in stage.spec.losses:
        return None
    made = [entry["make"]() for entry in stage.soft]
    return ClassTeachers(made, [entry.get("weight", 1.0) for entry in stage.soft])


def load_student(folder: Path) -> LatentStudent:
    """The student in a finished stage's folder, projections included."""
    facts = read_json(folder / "run.json")
    body = load_model(str(folder), head=facts["student"]["head"], key="stages")
    projections = nn.ModuleDict()
    if (folder / PROJECTIONS).is_file():
        for name, weight in load_file(folder / PROJECTIONS).items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.load_state_dict({"weight": weight})
            projections[name.split(".")[1]] = linear
    return LatentStudent(body, projections)


def save(stage: DistillStage, trainer: LatentDistillTrainer) -> None:
    """Model, projections, scores and predictions into the stage's folder; ends its run."""
    aside = stage.folder / ".model.part"
    trainer.save_model(str(aside / "whole"))
    scores = _scores(stage, trainer)
    for teacher in (trainer.teacher, trainer.soft_teachers):
        if teacher is not None:
            teacher.release()
    PartialState().wait_for_everyone()
    if not stage.run.main:
        return
    body, projections = split_state(load_file(aside / "whole" / "model.safetensors"))
    for path in (aside / "whole").iterdir():
        path.unlink()
    (aside / "whole").rmdir()
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    plain_attention(model.body).save_pretrained(aside, state_dict=body)
    assert stage.plan.tokenizer is not None
    stage.plan.tokenizer.save_pretrained(aside)
    if projections:
        save_file(projections, aside / PROJECTIONS)
    move_into(aside, stage.folder)
    write_json(stage.folder / "eval.json", scores)
    stage.run.end(tokens=trainer.state.num_input_tokens_seen, steps=trainer.state.global_step)


def plain_attention(model: Any) -> Any:
    """The model with the attention that anybody else can load."""
    model.config._attn_implementation = None
    return model


def _scores(stage: DistillStage, trainer: LatentDistillTrainer) -> dict[str, Any]:
    """`eval.json` of a stage."""
    if stage.spec.predicts:
        return predict_task(stage, trainer)
    found = final_scores(trainer)
    return {"held_out": {n[5:]: v for n, v in found.items() if n.startswith("eval_")}}


def predict_task(stage: DistillStage, trainer: LatentDistillTrainer) -> dict[str, Any]:
    """The task's scores on the dev rows; outputs and labels go to `predictions.npz`."""
    found = trainer.predict(stage.held_out, metric_key_prefix="eval")  # type: ignore[arg-type]
    metrics, outputs = found.metrics or {}, cast(Any, found.predictions)[1]
    if stage.run.main:
        labels = cast(Any, found.label_ids)
        stage.folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(stage.folder / "predictions.npz", outputs=outputs, labels=labels)
    if trainer.state.global_step:
        trainer.log({n: v for n, v in metrics.items() if n.startswith("eval_")})
    return {"task": _task_part(metrics)}


def _task_part(metrics: dict[str, Any]) -> dict[str, Any]:
    left_out = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    found = {n[5:]: v for n, v in metrics.items() if n.startswith("eval_")}
    return {n: v for n, v in found.items() if n not in left_out}


def _facts(stage: DistillStage, settings: dict[str, Any]) -> dict[str, Any]:
    role = {k: v for k, v in (stage.role or {}).items() if k != "make"}
    return {
        "kind": "stage",
        "name": stage.spec.name,
        "seed": stage.args.seed,
        "settings": settings,
        "data": {"fingerprint": stage.data_fingerprint(), "rows": _length(stage.train_rows)},
        "teacher": role or None,
        "soft": [{k: v for k, v in entry.items() if k != "make"} for entry in stage.soft],
        "losses": list(stage.spec.losses),
        "student": {"head": stage.head, "start": stage.start.key},
    }


def _length(rows: Any) -> int | None:
    return len(rows) if isinstance(rows, Dataset) else None
