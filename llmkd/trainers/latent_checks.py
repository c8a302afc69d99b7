"""What of a stage's losses, teachers and task can be refused before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkd.errors import RecipeError, TeacherError
from llmkd.models.latent_student import LatentStudent, new_projections
from llmkd.objectives.layer_map import layer_map
from llmkd.objectives.prediction import TASKS, check_soft
from llmkd.teachers.latent import ClassTeachers, LatentTeacher
from llmkd.teachers.loading import load_model
from llmkd.trainers.latent_config import LatentDistillConfig
from llmkd.trainers.latent_losses import LatentPlan
from llmkd.trainers.latent_rules import check_weights


def ready_student(
    model: Any, args: LatentDistillConfig, losses: tuple[str, ...], teacher: LatentTeacher | None
) -> LatentStudent:
    """The student of a stage from what a caller gave: a `LatentStudent` as it is, or a model, Hub
    id or folder, with new projections where the latent loss needs them.

    RecipeError for a model without the task head that soft and hard losses need, for widths that
    differ and no projection between them, and for another vocabulary than the teacher's.
    """
    if isinstance(model, str | Path):
        model = load_model(str(model), head="none" if losses == ("latent",) else "sequence")
    student = model if isinstance(model, LatentStudent) else LatentStudent(model)
    if {"soft", "hard"} & {*losses} and student.body.base_model is student.body:
        raise RecipeError.of(
            "model",
            type(student.body).__name__,
            "has no task head, which soft and hard losses train",
            "llmkd.models.student.with_task_head(model, kind=..., label_names=..., seed=...)",
        )
    if "latent" not in losses or teacher is None:
        return student
    own, theirs = student.config.get_text_config(), teacher.config().get_text_config()
    if own.vocab_size != theirs.vocab_size:
        raise RecipeError.of(
            "model",
            f"vocab_size {own.vocab_size}",
            f"the teacher {teacher.name} has {theirs.vocab_size} entries: states at one place "
            "would speak of different tokens",
            "a student made of the teacher's config: llmkd.models.student.student_config",
        )
    bare = student is not model or own.hidden_size != theirs.hidden_size
    if args.hidden and bare and not student.projections:
        student.projections = new_projections(
            args.projection,
            layers=range(own.num_hidden_layers + 1),
            student_width=own.hidden_size,
            teacher_width=theirs.hidden_size,
            seed=args.seed,
        )
    return student


def latent_plan(
    student: LatentStudent,
    args: LatentDistillConfig,
    losses: tuple[str, ...],
    teacher: LatentTeacher | None,
) -> LatentPlan:
    """Which layers a stage compares; none without a latent loss. RecipeError where they do not
    fit.
    """
    if "latent" not in losses or teacher is None:
        return LatentPlan()
    own, theirs = student.config.get_text_config(), teacher.config().get_text_config()
    pairs = layer_map(own.num_hidden_layers, theirs.num_hidden_layers, args.layer_map)
    return LatentPlan.of(args, pairs, own, theirs)


def ready_teacher(
    teacher: Any, losses: tuple[str, ...], soft_teachers: Any
) -> LatentTeacher | None:
    """A `LatentTeacher` from what a caller gave: one, or a model, Hub id or folder."""
    if teacher is None or isinstance(teacher, LatentTeacher):
        return teacher
    asks = "soft" in losses and soft_teachers is None
    return LatentTeacher(teacher, head="sequence" if asks else "none")


def refuse_unread(options: dict[str, Any]) -> None:
    """RecipeError for options of other trainers that this one would not heed."""
    if options.get("peft_config") is not None:
        raise RecipeError.of(
            "peft_config",
            type(options["peft_config"]).__name__,
            "all of a student's weights are distilled; an adapter needs a trained base",
            "leave it out",
        )
    options.pop("peft_config", None)


def check_stage(
    losses: tuple[str, ...],
    teacher: Any,
    soft_teachers: Any,
    kind: str | None,
    args: LatentDistillConfig,
) -> None:
    """RecipeError or TeacherError where a loss lacks what it is made of, or weighs nothing."""
    check_weights(losses, args)
    if "latent" in losses and teacher is None:
        raise TeacherError.of(
            "teacher", None, "the latent loss compares with a teacher's insides", "name a teacher"
        )
    if "soft" in losses:
        if teacher is None and soft_teachers is None:
            raise TeacherError.of(
                "teacher", None, "the soft loss needs a teacher's classes", "name a teacher"
            )
        if soft_teachers is None and teacher and teacher.head not in ("sequence", "token"):
            raise TeacherError.of(
                "teacher",
                teacher.name,
                "has no head for the task, so it has no soft labels",
                "take the fine-tuned teacher for a stage with a soft loss",
                "or leave soft out of the stage's losses",
            )
    if ("soft" in losses or "hard" in losses) and kind not in TASKS:
        raise RecipeError.of("kind", kind, "no such task", f"known: {', '.join(TASKS)}")
    if "soft" in losses and kind is not None:
        mixed = soft_teachers is not None and len(soft_teachers.teachers) > 1
        check_soft(kind, args.soft, mixed=mixed)


def padding_of(
    student: Any, teacher: LatentTeacher | None, others: ClassTeachers | None, tokenizer: Any
) -> int:
    """The id rows are padded with: the tokenizer's, else the student's own, else 0.

    A decoder with a task head looks for its last token by that id, so student and teachers are
    told it.
    """
    config = student.config.get_text_config()
    found = getattr(tokenizer, "pad_token_id", None)
    found = found if isinstance(found, int) else config.pad_token_id
    if not isinstance(found, int):
        return 0
    config.pad_token_id = found
    for one in (teacher, *(others.teachers if others is not None else ())):
        if isinstance(one, LatentTeacher):
            one.padding = found
    return found
