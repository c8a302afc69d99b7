"""The teacher's k likeliest tokens and the probability of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

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
from llmkd.labels.sampled import check_temperature

FLOOR = -20.0  # nats; 8-bit codes span no more: below 2e-9 a probability changes nothing


@dataclass(frozen=True)
class TopK:
    """Ids of the k largest logits, likeliest first, with log-probabilities in nats.

    `value_bits` 16 stores `log_probs` as float16 (error of a log-probability l: |l| / 2048 at
    most); 8 stores `codes`, linear between the token's largest and smallest listed log-probability
    (`span`, float16, two a token), with what lies below -20 nats raised to that. Both store `tail`,
    the log of the mass not listed, as float16, and decoding rescales the listed probabilities to
    sum to 1 - tail, so that quantisation never moves mass between them and the tail. Among equal
    logits at the border which are listed is arbitrary, but always the same ones.

    Raises RecipeError naming label_k for k outside 1..V, and for other bits than 8 and 16.
    """

    name: ClassVar[str] = "topk"
    needs: ClassVar[Literal["logits", "hidden"]] = "logits"

    k: int
    shared: int
    temperature: float = 1.0
    value_bits: int = 16

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError.of("label_k", self.k, "must be at least 1", "50 to 100 is usual")
        if self.k > self.shared:
            raise RecipeError.of(
                "label_k",
                self.k,
                f"teacher and student share {self.shared:,} tokens",
                f"1 to {self.shared:,}; 50 to 100 is usual",
                "--label_encoding hidden stores the whole distribution",
            )
        if self.value_bits not in (8, 16):
            raise RecipeError.of("label_value_bits", self.value_bits, "known: 8, 16")
        check_temperature(self.temperature)

    @property
    def columns(self) -> dict[str, type[np.generic]]:
        """Ids, values and the tail."""
        values: dict[str, type[np.generic]] = (
            {"log_probs": np.float16}
            if self.value_bits == 16
            else {"codes": np.uint8, "span": np.float16}
        )
        return {**id_columns(self.shared), **values, "tail": np.float16}

    def settings(self) -> dict[str, Any]:
        """The settings beside `shared` and `temperature`, which every store states."""
        return {"name": self.name, "k": self.k, "value_bits": self.value_bits}

    def reduce(self, values: Tensor, *, row: int = 0, start: int = 0) -> Reduced:
        """`ids` int32 and `log_probs` float32 [T, k], `tail` float32 [T] of logits
        [T, >= shared]; `row` and `start` do not matter here."""
        with torch.no_grad():
            return _largest(values, self.k, self.shared, self.temperature)

    def pack(self, *pieces: Reduced) -> dict[str, np.ndarray]:
        """Quantise and flatten."""
        whole = gather_pieces(pieces)
        log_Tk, tail = whole["log_probs"], whole["tail"].astype(np.float16)
        ids_Tk = _real_ids(whole["ids"], self.shared)
        columns = split_ids(ids_Tk.reshape(-1), self.shared)
        if self.value_bits == 16:
            return {**columns, "log_probs": log_Tk.astype(np.float16).reshape(-1), "tail": tail}
        log_Tk = np.maximum(log_Tk, FLOOR)
        span_T2 = np.stack((log_Tk[:, 0], log_Tk[:, -1]), 1).astype(np.float16)
        high_T1, low_T1 = span_T2[:, :1].astype(np.float32), span_T2[:, 1:].astype(np.float32)
        step_T1 = np.maximum(high_T1 - low_T1, 1e-6) / 255
        codes_Tk = np.clip(np.rint((log_Tk - low_T1) / step_T1), 0, 255).astype(np.uint8)
        return {
            **columns,
            "codes": codes_Tk.reshape(-1),
            "span": span_T2.reshape(-1),
            "tail": tail,
        }

    def encode(self, values: Tensor, *, row: int = 0) -> dict[str, np.ndarray]:
        """`pack(reduce(values))`: the columns of one whole row of logits [T, >= shared]."""
        return self.pack(self.reduce(values, row=row))

    def decode(self, rows: Sequence[Columns], layout: Layout) -> tuple[Tensor, Tensor]:
        """`(ids int64, probs float32)`, both [B, width, k]. ValueError for damaged columns."""
        tail_S = np.concatenate([row["tail"] for row in rows])
        ids_Sk = join_ids(rows, self.shared)
        if len(tail_S) != sum(layout.lengths) or len(ids_Sk) != len(tail_S) * self.k:
            raise ValueError("the numbers of tokens and ids do not fit together")
        probs_Sk = self._probs(rows).reshape(-1, self.k)
        listed_S = np.float32(1) - _exp16()[tail_S.view(np.uint16)]
        probs_Sk *= (listed_S / np.maximum(probs_Sk.sum(1), np.float32(1e-30)))[:, None]
        ids = np.zeros((layout.batch * layout.width, self.k), np.int64)
        probs = np.zeros((layout.batch * layout.width, self.k), np.float32)
        first = 0
        for at in layout.slices():
            last = first + at.stop - at.start
            ids[at] = ids_Sk.reshape(-1, self.k)[first:last]
            probs[at] = probs_Sk[first:last]
            first = last
        shape = (layout.batch, layout.width, self.k)
        return torch.from_numpy(ids).view(shape), torch.from_numpy(probs).view(shape)

    def _probs(self, rows: Sequence[Columns]) -> np.ndarray:
        """Listed probabilities before rescaling, float32 [S * k]."""
        if self.value_bits == 16:
            return _exp16()[np.concatenate([row["log_probs"] for row in rows]).view(np.uint16)]
        span_S2 = np.concatenate([row["span"] for row in rows]).astype(np.float32).reshape(-1, 2)
        codes_Sk = np.concatenate([row["codes"] for row in rows]).reshape(-1, self.k)
        low_S1, high_S1 = span_S2[:, 1:], span_S2[:, :1]
        step_S1 = np.maximum(high_S1 - low_S1, np.float32(1e-6)) / np.float32(255)
        log_Sk = codes_Sk * step_S1
        log_Sk += low_S1
        return np.exp(log_Sk, out=log_Sk).reshape(-1)


def _real_ids(ids_Tk: np.ndarray, shared: int) -> np.ndarray:
    """Ids of the padding behind the vocabulary (listed where a token has fewer than k finite
    logits) replaced by others that the token does not list; their probability is 0 all the same.
    """
    padding_Tk = ids_Tk >= shared
    if not padding_Tk.any():
        return ids_Tk
    ids_Tk = ids_Tk.copy()
    for ids_k, padding_k in zip(ids_Tk, padding_Tk, strict=True):
        # of k ids that exist at least as many are unlisted as places are to be filled
        unlisted = np.setdiff1d(np.arange(len(ids_k)), ids_k[~padding_k])
        ids_k[padding_k] = unlisted[: padding_k.sum()]
    return ids_Tk


@lru_cache(maxsize=1)
def _exp16() -> np.ndarray:
    """exp of every float16, float32 [65536]: one look-up is quicker than two conversions."""
    with np.errstate(all="ignore"):
        return np.exp(np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32))


def _largest(logits_TV: Tensor, k: int, shared: int, temperature: float) -> Reduced:
    """Exact top k in two levels: the k largest lie in the k blocks with the largest maxima."""
    tokens, device = len(logits_TV), logits_TV.device
    ids_Tk = torch.empty(tokens, k, dtype=torch.int32, device=device)
    log_Tk = torch.empty(tokens, k, device=device)
    tail_T = torch.empty(tokens, device=device)
    finite_T = torch.empty(tokens, dtype=torch.bool, device=device)
    for at, chunk_tbc in blocked(logits_TV, shared, temperature):
        if 4 * k < chunk_tbc.shape[1]:
            block_tk = chunk_tbc.amax(-1).topk(k, sorted=False).indices
            row_t1 = torch.arange(len(block_tk), device=device)[:, None]
            top_tk, entry_tk = chunk_tbc[row_t1, block_tk].flatten(1).topk(k)
            chosen_tk = block_tk.gather(1, entry_tk // BLOCK) * BLOCK + entry_tk % BLOCK
        else:
            top_tk, chosen_tk = chunk_tbc.flatten(1).topk(k)
        # log-partition from the likeliest token's probability: softmax is one pass where logsumexp
        # is three, but its sum of V float32 is off by some 1e-5, hence the blocked second sum
        weight_tbc = chunk_tbc.flatten(1).softmax(-1).view_as(chunk_tbc)
        total_t1 = weight_tbc.sum(-1).double().sum(-1, keepdim=True)
        top_weight_t1 = weight_tbc.flatten(1).gather(1, chosen_tk[:, :1]).double()
        log_tk = (top_tk - top_tk[:, :1]).double() + (top_weight_t1 / total_t1).log()
        tail_t = (1.0 - log_tk.exp().sum(-1)).clamp(min=0.0, max=1.0)
        ids_Tk[at], log_Tk[at] = chosen_tk.to(torch.int32), log_tk.float()
        tail_T[at] = tail_t.log().float() if k < shared else float("-inf")
        finite_T[at] = total_t1.isfinite().squeeze(-1)  # of NaN, inf, all -inf: NaN
    return {"ids": ids_Tk, "log_probs": log_Tk, "tail": tail_T, "finite": finite_T}
