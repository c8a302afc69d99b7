"""Which row is trained on when: one list for the whole run, so that arms can be paired."""

from __future__ import annotations

import numpy as np


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
