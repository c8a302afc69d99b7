"""Which layers are compared with which, and the parts of the loss of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmkd.errors import DataError, RecipeError
from llmkd.models.student_shape import check_heads
from llmkd.objectives.latent import add_terms, attention_loss, hidden_mse
from llmkd.objectives.prediction import ClassTarget, hard_loss, soft_loss
from llmkd.teachers.inside import Inside
from llmkd.trainers.latent_config import LatentDistillConfig
from llmkd.types import DenseLogits, LossTerm, MixtureTarget


@dataclass(frozen=True)
class LatentPlan:
    """Pairs (student layer, teacher layer) of hidden states (0: embeddings) and attention maps."""

    hidden: tuple[tuple[int, int], ...] = ()
    maps: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls, args: LatentDistillConfig, layers: tuple[int, ...], student: Any, teacher: Any
    ) -> LatentPlan:
        """Student layers 1..M to the teacher's `layers`, as `args` choose parts.

        RecipeError where heads differ and maps are asked for, or where no part is left.
        """
        pairs = tuple(enumerate(layers, 1))
        if args.attn != "none":
            check_heads(student, teacher)
        hidden = (((0, 0),) if args.embeddings else ()) + pairs if args.hidden else ()
        maps = pairs if args.attn != "none" else ()
        if not hidden and not maps:
            raise RecipeError.of(
                "attn", "none", "and hidden false leave no latent loss", "--hidden true"
            )
        return cls(hidden, maps)

    @property
    def of_student(self) -> tuple[int, ...]:
        """Hidden layers wanted of the student."""
        return tuple(own for own, _ in self.hidden)

    @property
    def of_teacher(self) -> tuple[int, ...]:
        """Hidden layers wanted of the teacher."""
        return tuple(theirs for _, theirs in self.hidden)

    @property
    def maps_of_student(self) -> tuple[int, ...]:
        """Attention layers wanted of the student."""
        return tuple(own for own, _ in self.maps)

    @property
    def maps_of_teacher(self) -> tuple[int, ...]:
        """Attention layers wanted of the teacher."""
        return tuple(theirs for _, theirs in self.maps)


def latent_terms(
    plan: LatentPlan, student: Inside, teacher: Inside, mask_BT: Tensor, form: str
) -> dict[str, LossTerm]:
    """`attn` and `hidden`: totals summed over layers and tokens; the count is the tokens."""
    found: dict[str, LossTerm] = {}
    if plan.maps:
        found["attn"] = add_terms(
            [
                attention_loss(
                    student.scores[own],
                    teacher.scores[theirs],
                    mask_BT,
                    form=form,
                    visible_BTT=student.visible[own] & teacher.visible[theirs],
                )
                for own, theirs in plan.maps
            ]
        )
    if plan.hidden:
        found["hidden"] = add_terms(
            [
                hidden_mse(student.hidden[own], teacher.hidden[theirs], mask_BT)
                for own, theirs in plan.hidden
            ]
        )
    return found


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch after both models answered: all that the loss is made of."""

    student: Inside
    teacher: Inside
    target: ClassTarget | None
    mask_BT: Tensor
    labels: Tensor | None

    def row(self, place: int) -> Batch:
        """A batch of one row."""
        at, size = slice(place, place + 1), len(self.mask_BT)

        def cut(values: Mapping[int, Tensor]) -> dict[int, Tensor]:  # masks may be one for all rows
            return {n: v if len(v) == 1 < size else v[at] for n, v in values.items()}

        def inside(whole: Inside) -> Inside:
            logits = None if whole.logits is None else whole.logits[at]
            return Inside(cut(whole.hidden), cut(whole.scores), cut(whole.visible), logits)

        labels = None if self.labels is None else self.labels[at]
        target = None if self.target is None else _cut_target(self.target, at)
        return Batch(inside(self.student), inside(self.teacher), target, self.mask_BT[at], labels)

    def terms(
        self, plan: LatentPlan, args: LatentDistillConfig, losses: tuple[str, ...], kind: str | None
    ) -> dict[str, LossTerm]:
        """The parts of the loss before anybody divided them: attn, hidden, soft (where there is a
        target), hard. DataError for rows without labels where there is a hard loss.
        """
        found = latent_terms(plan, self.student, self.teacher, self.mask_BT, args.attn)
        logits = self.student.logits
        if "soft" in losses and self.target is not None:
            assert kind and logits is not None
            found["soft"] = soft_loss(
                kind,
                logits,
                self.target,
                self.labels,
                form=args.soft,
                temperature=args.soft_temperature,
                t2_scale=args.t2_scale,
                gamma=args.nkd_gamma,
            )
        if "hard" in losses:
            assert kind and logits is not None
            if self.labels is None:
                raise DataError.of("labels", None, "rows without labels have no hard loss")
            found["hard"] = hard_loss(kind, logits, self.labels)
        return found


def _cut_target(target: Any, at: slice) -> Any:
    if isinstance(target, MixtureTarget):
        return MixtureTarget(tuple(_cut_target(part, at) for part in target.parts), target.weights)
    return DenseLogits(target.logits_BTV[at], target.shared)
