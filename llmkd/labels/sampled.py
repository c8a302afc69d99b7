"""RS-KD: a few tokens drawn from the teacher's distribution, with their counts.

Sparse Logit Sampling (Anshumann et al. 2025, arXiv 2503.16870, section 4): N draws with
replacement, target c_i / N, whose expectation is p_i: unlike a top k it is unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.labels.base import (
    BLOCK,
    Columns,
    Layout,
    Reduced,
    blocked,
    gather_pieces,
    id_columns,
    join_ids,
    split_ids,
)

Sampling = Literal["systematic", "multinomial"]
MOST_DRAWS = 255  # counts are bytes


@dataclass(frozen=True)
class Sampled:
    """N draws a token.

    `multinomial` draws independently, as the paper. `systematic` [ours] lays N points
    (u + j) / N, j = 0 .. N-1, with one uniform u a token on the cumulative distribution: c_i is
    floor(N p_i) or one more and E[c_i / N] = p_i exactly. Its variance is f (1 - f) / N^2, f the
    fraction of N p_i: never more, and .44 of the independent draws' at N = 50 on SmolLM2-135M's
    answers to technical English.

    The uniforms come from numpy's Philox keyed by (seed, row number) on the host, so a row's label
    does not depend on batch, rank or order. Stored: `many` uint8 [T], how many of a token's ids
    were drawn more than once; `counts` uint8, those ids' counts; `ids` uint16 (and the packed
    bits above 16), those drawn more than once first. How many ids were drawn once follows
    from N: it is not stored.

    Raises RecipeError for draws outside 1..255, an unknown sampling, a temperature not above 0.
    """

    name: ClassVar[str] = "sampled"
    needs: ClassVar[Literal["logits", "hidden"]] = "logits"

    draws: int
    shared: int
    temperature: float = 1.0
    sampling: Sampling = "systematic"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= MOST_DRAWS:
            raise RecipeError.of(
                "label_draws",
                self.draws,
                f"counts are stored in a byte: 1 to {MOST_DRAWS} draws",
                "50 is the paper's choice",
            )
        if self.sampling not in get_args(Sampling):
            raise RecipeError.of(
                "label_sampling", self.sampling, f"known: {', '.join(get_args(Sampling))}"
            )
        check_temperature(self.temperature)

    @property
    def columns(self) -> dict[str, type[np.generic]]:
        """`many`, `counts` and the ids."""
        return {"many": np.uint8, "counts": np.uint8, **id_columns(self.shared)}

    def settings(self) -> dict[str, Any]:
        """The settings beside `shared`, `temperature` and `seed`, which every store states."""
        return {"name": self.name, "draws": self.draws, "sampling": self.sampling}

    def reduce(self, values: Tensor, *, row: int = 0, start: int = 0) -> Reduced:
        """Drawn ids int32 [T, N], ascending, of logits [T, >= shared]."""
        points_TN = torch.from_numpy(self._points(row, start, len(values)))
        with torch.no_grad():
            return _draw(values, points_TN.to(values.device), self.shared, self.temperature)

    def _points(self, row: int, start: int, tokens: int) -> np.ndarray:
        """Ascending points in [0, 1), float64 [T, N]."""
        make = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, row]))
        if self.sampling == "systematic":
            offsets_T = make.random(start + tokens)[start:]
            return (offsets_T[:, None] + np.arange(self.draws)) / self.draws
        return np.sort(make.random((start + tokens, self.draws))[start:], axis=1)

    def pack(self, *pieces: Reduced) -> dict[str, np.ndarray]:
        """Equal neighbours counted; ids drawn more than once before the others."""
        drawn_TN = gather_pieces(pieces)["drawn"]
        tokens, draws = drawn_TN.shape
        first_TN = np.ones((tokens, draws), dtype=bool)
        np.not_equal(drawn_TN[:, 1:], drawn_TN[:, :-1], out=first_TN[:, 1:])
        at_D = np.flatnonzero(first_TN)
        counts_D = np.diff(at_D, append=tokens * draws)
        token_D = at_D // draws
        many_D = counts_D > 1
        # Position of each entry: tokens in order; in a token `many` first, each group by id.
        order_D = np.argsort(token_D * 2 + ~many_D, kind="stable")
        ids_D = drawn_TN.reshape(-1)[at_D]
        return {
            "many": np.bincount(token_D[many_D], minlength=tokens).astype(np.uint8),
            "counts": counts_D[many_D].astype(np.uint8),
            **split_ids(ids_D[order_D], self.shared),
        }

    def encode(self, values: Tensor, *, row: int = 0) -> dict[str, np.ndarray]:
        """`pack(reduce(values))`: the columns of one whole row of logits [T, >= shared]."""
        return self.pack(self.reduce(values, row=row))

    def decode(self, rows: Sequence[Columns], layout: Layout) -> tuple[Tensor, Tensor]:
        """`(ids int64, probs float32)`, both [B, width, K], K the most ids any token has.

        ValueError where counts and ids do not fit together (damage).
        """
        many_S = np.concatenate([row["many"] for row in rows]).astype(np.int64)
        counts_M = np.concatenate([row["counts"] for row in rows])
        ids_D = join_ids(rows, self.shared)
        ends_S = np.cumsum(many_S)
        if len(many_S) != sum(layout.lengths) or (ends_S[-1] if len(ends_S) else 0) != len(
            counts_M
        ):
            raise ValueError("the numbers of tokens, ids and counts do not fit together")
        running = np.concatenate(([0], np.cumsum(counts_M, dtype=np.int64)))
        once_S = self.draws - (running[ends_S] - running[ends_S - many_S])
        listed_S = many_S + once_S
        if (len(once_S) and once_S.min() < 0) or listed_S.sum() != len(ids_D):
            raise ValueError(f"counts do not add up to {self.draws} draws a token")
        return _spread(ids_D, counts_M, many_S, listed_S, self.draws, layout)


def check_temperature(temperature: float) -> None:
    """RecipeError for a temperature that is not above 0."""
    if not temperature > 0:
        raise RecipeError.of(
            "teacher_temperature", temperature, "must be above 0", "1.0 leaves the logits alone"
        )


def _spread(
    ids_D: np.ndarray,
    counts_M: np.ndarray,
    many_S: np.ndarray,
    listed_S: np.ndarray,
    draws: int,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Ragged lists to padded tensors; boolean masks fill row by row, in the stored order."""
    places, size = layout.places(), layout.batch * layout.width
    width_K = int(listed_S.max()) if len(listed_S) else 1
    listed, many = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    listed[places], many[places] = listed_S, many_S
    entry_K = np.arange(width_K, dtype=np.uint8)
    used = entry_K < listed[:, None]
    ids, probs = np.zeros((size, width_K), np.int64), used.astype(np.float32)
    probs *= np.float32(1.0 / draws)
    ids[used] = ids_D
    probs[entry_K < many[:, None]] = counts_M.astype(np.float32) / np.float32(draws)
    shape = (layout.batch, layout.width, width_K)
    return torch.from_numpy(ids).view(shape), torch.from_numpy(probs).view(shape)


def _draw(logits_TV: Tensor, points_TN: Tensor, shared: int, temperature: float) -> Reduced:
    """Where the points fall on the cumulative distribution, by blocks of the vocabulary.

    A running sum over 150,000 float32 entries would lose the small ones against 1. So: float32
    sums of blocks, their running sum in float64, a binary search for the block, then the running
    sum in float64 inside the N blocks that were hit. No [T, V] running sum is ever made.
    """
    tokens, draws = points_TN.shape
    drawn_TN = points_TN.new_empty(tokens, draws, dtype=torch.int32)
    finite_T = points_TN.new_empty(tokens, dtype=torch.bool)
    for at, chunk_tbc in blocked(logits_TV, shared, temperature):
        weight_tbc = chunk_tbc.flatten(1).softmax(-1).view_as(chunk_tbc)
        upto_tb = weight_tbc.sum(-1).double().cumsum(-1)
        total_t1 = upto_tb[:, -1:]
        finite_T[at] = total_t1.isfinite().squeeze(-1)  # softmax of NaN, inf, all -inf is NaN
        drawn_TN[at] = _find(weight_tbc, upto_tb, points_TN[at] * total_t1, shared)
    return {"drawn": drawn_TN, "finite": finite_T}


def _find(weight_tbc: Tensor, upto_tb: Tensor, points_tN: Tensor, shared: int) -> Tensor:
    """Ids [t, N] whose share of the running sum holds each point; never one of weight 0."""
    below = torch.nextafter(upto_tb[:, -1:], torch.zeros_like(upto_tb[:, -1:]))
    points_tN = torch.minimum(points_tN, below).contiguous()
    last = upto_tb.shape[1] - 1
    block_tN = torch.searchsorted(upto_tb, points_tN, right=True).clamp_(max=last)
    before_tN = upto_tb.gather(1, (block_tN - 1).clamp(min=0)).masked_fill_(block_tN == 0, 0.0)
    share_tN = (points_tN - before_tN) / (upto_tb.gather(1, block_tN) - before_tN)
    row_t1 = torch.arange(len(block_tN), device=block_tN.device)[:, None]
    inside_tNc = weight_tbc[row_t1, block_tN].double().cumsum(-1)
    whole_tN1 = inside_tNc[..., -1:]
    # the block's own float64 sum replaces the float32 one; strictly below it, so a hit exists
    point_tN1 = (share_tN.clamp(0, 1)[..., None] * whole_tN1).minimum(
        torch.nextafter(whole_tN1, torch.zeros_like(whole_tN1))
    )
    entry_tN = (inside_tNc <= point_tN1).sum(-1).clamp_(max=BLOCK - 1)
    return (block_tN * BLOCK + entry_tN).clamp_(max=shared - 1).to(torch.int32)
