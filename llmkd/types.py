"""What the rooms hand to each other: loss terms and soft labels.

Shape letters used all over the house: B sequences, T positions, V vocabulary, N counted positions,
H hidden size, K entries of a sparse label.

A soft label over tokens is one of `DenseLogits`, `HiddenTarget`, `SparseTarget`, `MixtureTarget`.
`target.take(rows_N)` flattens the leading dimensions and keeps the rows numbered `rows_N`, so that
an objective sees [N, ...] only, and never what lies under the mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Tail = Literal["bucket", "renorm", "smooth"]
TAILS: tuple[Tail, ...] = ("bucket", "renorm", "smooth")


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


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """From hidden states to logits: `cap(scale * (h W^T + b))`, cap(x) = c tanh(x / c).

    `weight` is [V, H], `bias` [V]; `scale` is Cohere's and Granite's factor, `softcap` Gemma's c.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H]: the plain form."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True, slots=True, eq=False)
class DenseLogits:
    """A live teacher's answer: logits over its whole vocabulary, on the token they predict.

    `shared` is the number of leading entries that mean the same token for teacher and student;
    what lies beyond is padding of one of the two heads and carries no probability.
    """

    logits_BTV: Tensor
    shared: int

    def __post_init__(self) -> None:
        _check_shared(self.shared, self.logits_BTV.shape[-1])

    def take(self, rows_N: Tensor) -> DenseLogits:
        """The rows numbered `rows_N` of the flattened leading dimensions, [N, V]."""
        return replace(self, logits_BTV=_rows(self.logits_BTV, rows_N))


@dataclass(frozen=True, slots=True, eq=False)
class HiddenTarget:
    """Final hidden states and the head that makes logits of them: the whole distribution at H
    numbers a token. A low-rank label is one too, with a narrower head.
    """

    hidden_BTH: Tensor
    head: Head
    shared: int

    def __post_init__(self) -> None:
        _check_shared(self.shared, self.head.weight.shape[0])

    def take(self, rows_N: Tensor) -> HiddenTarget:
        """The rows numbered `rows_N` of the flattened leading dimensions, [N, H]."""
        return replace(self, hidden_BTH=_rows(self.hidden_BTH, rows_N))

    def dense(self) -> DenseLogits:
        """The logits, whole: the plain form."""
        return DenseLogits(self.head(self.hidden_BTH), self.shared)


@dataclass(frozen=True, slots=True, eq=False)
class SparseTarget:
    """A few tokens' probabilities at a fixed temperature: the top k, or RS-KD's draws.

    `ids` int64 [B, T, K], each at most once a position; unused places hold probability 0 (any id).
    `probs` [B, T, K] >= 0. `tail` says what the rest (1 - their sum) means:
    `bucket` one more event "any other token" on both sides; `renorm` nothing, the listed ones are
    scaled to sum to 1 (biased for a top k; right for draws, where nothing is left); `smooth` it is
    spread evenly over the other shared tokens (FKD, arXiv 2112.01528).
    """

    ids_BTK: Tensor
    probs_BTK: Tensor
    shared: int
    tail: Tail = "bucket"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.ids_BTK.shape != self.probs_BTK.shape:
            shapes = tuple(self.ids_BTK.shape), tuple(self.probs_BTK.shape)
            raise ValueError("ids {} and probs {} differ in shape".format(*shapes))
        if self.tail not in TAILS:
            raise ValueError(f"tail={self.tail!r}; known: {', '.join(TAILS)}")

    def take(self, rows_N: Tensor) -> SparseTarget:
        """The rows numbered `rows_N` of the flattened leading dimensions, [N, K]."""
        ids, probs = _rows(self.ids_BTK, rows_N), _rows(self.probs_BTK, rows_N)
        return replace(self, ids_BTK=ids, probs_BTK=probs)


@dataclass(frozen=True, slots=True, eq=False)
class MixtureTarget:
    """Several teachers, averaged in probability (not in logits); MEAL V2, arXiv 2009.08453.

    `weights` sum to 1. Parts with the tail `bucket` cannot be mixed: their events differ.
    """

    parts: tuple[Target, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.weights) or not self.parts:
            raise ValueError(f"{len(self.parts)} parts and {len(self.weights)} weights")
        if min(self.weights) < 0 or not math.isclose(sum(self.weights), 1.0, abs_tol=1e-6):
            raise ValueError(f"weights {self.weights} must be >= 0 and sum to 1")
        for part in self.parts:
            if isinstance(part, SparseTarget) and part.tail == "bucket":
                raise ValueError("a mixture needs sparse labels with tail renorm or smooth")

    @property
    def shared(self) -> int:
        """Leading entries that mean the same token for the student and every teacher."""
        return min(part.shared for part in self.parts)

    def take(self, rows_N: Tensor) -> MixtureTarget:
        """The rows numbered `rows_N` of every part."""
        return replace(self, parts=tuple(part.take(rows_N) for part in self.parts))


Target: TypeAlias = DenseLogits | HiddenTarget | SparseTarget | MixtureTarget


def _rows(values: Tensor, rows_N: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).index_select(0, rows_N)


def _check_shared(shared: int, entries: int) -> None:
    if not 0 < shared <= entries:
        raise ValueError(f"shared={shared} lies outside the teacher's {entries} entries")
