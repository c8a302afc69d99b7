"""Which row is trained on when: one list for the whole run, so that arms can be paired."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


def training_order(
    rows: int, needed: int, seed: int, first: np.ndarray | None = None
) -> np.ndarray:
    """Row numbers in training order, `needed` of them.

    `first` (the selected rows of stage 1) comes first, shuffled; then the rows not in it, shuffled;
    after that whole shuffled epochs of all rows. So stage 2 does not replay stage 1 before the pool
    is used up, and rows never stand in score order.
    """
    rng = np.random.default_rng(seed)
    parts = []
    if first is not None and len(first):
        parts.append(rng.permutation(np.asarray(first, dtype=np.int64)))
        rest = np.setdiff1d(np.arange(rows, dtype=np.int64), first)
        parts.append(rng.permutation(rest))
    while sum(len(part) for part in parts) < needed:
        parts.append(rng.permutation(rows))
    return np.concatenate(parts)[:needed].astype(np.int64)


def length_grouped_order(
    lengths: Sequence[int], batch: int, rng: np.random.Generator, *, pool: int = 50
) -> np.ndarray:
    """All row numbers in an order whose slices of `batch` hold rows of like length, shuffled.

    Rows are dealt at random into pools of `pool` batches, each is sorted by length and cut into
    batches, and the batches of all pools are shuffled. (transformers' own sampler leaves the
    batches of a pool from long to short: the order of a run then follows length, and with it
    whatever goes with length, its classes too.) The last, short batch stays last.
    """
    known = np.asarray(lengths)
    order = rng.permutation(len(known))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool * batch):
        some = order[start : start + pool * batch]
        some = some[np.argsort(known[some], kind="stable")]
        # a short batch would move the borders of all that follow it
        batches += [some[at : at + batch] for at in range(0, len(some), batch)]
    whole = [b for b in batches if len(b) == batch]
    short = [b for b in batches if len(b) < batch]
    shuffled = [whole[place] for place in rng.permutation(len(whole))]
    return np.concatenate([*shuffled, *short]) if batches else order


class LengthGroupedSampler(Sampler[int]):
    """`length_grouped_order`, another one each epoch, the same for the same seed."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; the trainer calls it, on a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        return iter(length_grouped_order(self.lengths, self.batch, rng).tolist())
