"""What of a stage's losses, teachers and task can be refused before its first step."""

from __future__ import annotations

from typing import Any

from llmkd.errors import RecipeError, TeacherError
from llmkd.objectives.prediction import TASKS, check_soft
from llmkd.teachers.latent import ClassTeachers, LatentTeacher
from llmkd.trainers.latent_config import LatentDistillConfig


def check_stage(
    losses: tuple[str, ...],
    teacher: Any,
    soft_teachers: Any,
    kind: str | None,
    args: LatentDistillConfig,
) -> None:
    """RecipeError or TeacherError where a loss lacks what it is made of."""
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
