"""What the rooms hand to each other: loss terms and soft labels.

Shape letters used all over the house: B sequences, T positions, V vocabulary, N counted positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A loss before anybody divided it.

    `total` is a sum in nats over counted positions and carries the gradient; `count` is how many
    positions that were. `metrics` are detached sums over the same positions, in nats unless the
    name says otherwise; whoever logs them divides by `count`.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DenseLogits:
    """A live teacher's answer: logits over its whole vocabulary, on the token they predict.

    `shared` is the number of leading entries that mean the same token for teacher and student;
    what lies beyond is padding of one of the two heads and carries no probability.
    """

    logits_BTV: Tensor
    shared: int

    def __post_init__(self) -> None:
        if not 0 < self.shared <= self.logits_BTV.shape[-1]:
            raise ValueError(
                f"shared={self.shared} lies outside the teacher's {self.logits_BTV.shape[-1]} "
                f"entries"
            )
