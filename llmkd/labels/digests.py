"""Which exact tokens a label belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def row_digest(input_ids: Any, position_ids: Any = None) -> str:
    """16 hex digits (blake2b) of one row's tokens [T] and where its documents begin.

    A document begins where `position_ids` [T] is 0; without them the row is one document. Takes
    lists, arrays and CPU tensors. Moving a border or a token changes it; padding is not given.
    """
    ids = np.asarray(input_ids, dtype="<i4")
    if position_ids is None:
        begins = np.zeros(len(ids), dtype=bool)
        begins[:1] = True
    else:
        begins = np.asarray(position_ids) == 0
    if ids.ndim != 1 or begins.shape != ids.shape:
        raise ValueError(f"one row of tokens and positions, not {ids.shape} and {begins.shape}")
    total = hashlib.blake2b(ids.tobytes(), digest_size=8)
    total.update(np.packbits(begins).tobytes())
    return total.hexdigest()


def positions_of(seq_lengths: Sequence[int]) -> np.ndarray:
    """Position ids of a row of documents of these lengths, as `PackedCollator` makes them."""
    return np.concatenate([np.arange(length) for length in seq_lengths] or [np.zeros(0, int)])
