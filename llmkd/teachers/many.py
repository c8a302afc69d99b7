"""Several teachers, averaged in probability (MEAL V2, arXiv 2009.08453)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmkd.errors import RecipeError
from llmkd.teachers.live import LiveTeacher
from llmkd.teachers.stored import StoredTeacher
from llmkd.types import MixtureTarget, SparseTarget

AnyTeacher = LiveTeacher | StoredTeacher


class ManyTeachers:
    """Live and stored teachers of one vocabulary; answers with the mean of their distributions.

    `weights` (default: equal) are scaled to sum to 1. A stored top k is read with its tail spread
    evenly (`smooth`): a bucket cannot be averaged with a distribution over all tokens.
    """

    def __init__(
        self, teachers: Sequence[AnyTeacher], weights: Sequence[float] | None = None
    ) -> None:
        given = [1.0] * len(teachers) if weights is None else [float(w) for w in weights]
        if not teachers or len(given) != len(teachers) or min(given) < 0 or sum(given) <= 0:
            raise RecipeError.of(
                "teachers", given, f"need one weight >= 0 for each of {len(teachers)}, not all 0"
            )
        self.teachers = list(teachers)
        self.weights = tuple(weight / sum(given) for weight in given)

    @property
    def name(self) -> str:
        """The names, joined."""
        return " + ".join(teacher.name for teacher in self.teachers)

    @property
    def loaded(self) -> bool:
        """Whether any of them holds memory."""
        return any(teacher.loaded for teacher in self.teachers)

    @property
    def forwards(self) -> int:
        """Batches answered."""
        return max(teacher.forwards for teacher in self.teachers)

    def check(self, student_vocab: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Each one's own check."""
        for teacher in self.teachers:
            teacher.check(student_vocab, tokenizer)

    def check_dataset(self, rows: Any) -> None:
        """Each one's own check."""
        for teacher in self.teachers:
            teacher.check_dataset(rows)

    def load(self, accelerator: Any) -> None:
        """Bring all of them in."""
        for teacher in self.teachers:
            teacher.load(accelerator)

    def __call__(self, inputs: Mapping[str, Tensor]) -> MixtureTarget:
        """The mixture of their answers to a batch."""
        parts = []
        for teacher in self.teachers:
            answer = teacher(inputs)
            if isinstance(answer, SparseTarget) and answer.tail == "bucket":
                answer = replace(answer, tail="smooth")
            parts.append(answer)
        return MixtureTarget(tuple(parts), self.weights)

    def release(self) -> None:
        """Let all of them go."""
        for teacher in self.teachers:
            teacher.release()


Teacher = LiveTeacher | StoredTeacher | ManyTeachers


def as_teacher(given: Any) -> Teacher:
    """A teacher of any kind, or what names one: a model, a Hub id, a folder, a list of these."""
    if isinstance(given, LiveTeacher | StoredTeacher | ManyTeachers):
        return given
    if isinstance(given, list | tuple):
        made = [as_teacher(one) for one in given]
        if any(isinstance(one, ManyTeachers) for one in made):
            raise RecipeError.of("teachers", len(made), "a mixture cannot be part of a mixture")
        return ManyTeachers([one for one in made if not isinstance(one, ManyTeachers)])
    return LiveTeacher(given)
