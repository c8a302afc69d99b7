"""The levels' logits at the end of prompts, and nothing else of the vocabulary."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from llmkd.data.score_tokens import Prompted
from llmkd.errors import RecipeError
from llmkd.teachers.causal_head import TASK, head_agrees, open_head
from llmkd.types import Head

logger = logging.getLogger(__name__)
LEAST_PREFIX = 16  # tokens; a shorter common beginning costs more to copy than to compute
AGREE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest logit; else NARROW
NARROW = 3e-2


@dataclass(frozen=True)
class Prefix:
    """What a model remembers of the beginning all rows share: its ids, and keys and values."""

    ids: list[int]
    cache: Any


class LevelLogits:
    """Level logits [B, L], float32 whatever the model's dtype, of rows of ids.

    Rows are padded on the right, whatever side the tokenizer pads: no position moves, recurrent
    models too have seen nothing but the row at its end, and the last real position is read.

    Hidden states of that position meet the L rows of the head; a head that is more than a linear
    map (found out on the first batch) makes its logits the plain way.
    """

    def __init__(self, model: Any, ids_L: Sequence[int], pad: int = 0) -> None:
        self.model, self.pad = model, pad
        self.ids_L = torch.tensor(list(ids_L))
        self._opens: bool | None = None
        try:
            if not open_head(model):
                self._opens = False
        except RecipeError:  # an adapter on the head
            self._opens = False
        takes = inspect.signature(model.get_base_model().forward if _peft(model) else model.forward)
        self.cache_key = "cache" if "cache" in takes.parameters else "past_key_values"
        self.keeps = "logits_to_keep" in takes.parameters

    @property
    def device(self) -> Any:
        """Where the model's inputs go."""
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()  # no inference tensors: the model may go on training
    def __call__(self, rows: Sequence[Prompted], prefix: Prefix | None = None) -> Tensor:
        """[B, L] on the model's device. With `prefix` all rows begin with its ids."""
        skip = len(prefix.ids) if prefix else 0
        inputs, last_B = self._inputs(rows, skip)
        if prefix is not None:
            cache = copy.deepcopy(prefix.cache)
            cache.batch_repeat_interleave(len(rows))
            inputs |= {self.cache_key: cache, "use_cache": True}
        else:
            inputs["use_cache"] = False
        if self._opens is None:
            self._opens = head_agrees(self.model, {"input_ids": inputs["input_ids"]})
        ids_L = self.ids_L.to(last_B.device)
        here_B = torch.arange(len(rows), device=last_B.device)
        if not self._opens:
            keep, place_B = torch.unique(last_B, return_inverse=True)
            if not self.keeps:
                return self.model(**inputs).logits[here_B, last_B][:, ids_L].float()
            logits_BKV = self.model(**inputs, logits_to_keep=keep).logits
            return logits_BKV[here_B, place_B][:, ids_L].float()

        def task(hidden_BTH: Tensor, head: Head) -> dict[str, Tensor]:
            bias = None if head.bias is None else head.bias[ids_L].float()
            few = replace(head, weight=head.weight[ids_L].float(), bias=bias)
            return {"logits": few(hidden_BTH[here_B, last_B].float())}

        return self.model(**inputs, **{TASK: task})["logits"]

    def _inputs(self, rows: Sequence[Prompted], skip: int) -> tuple[dict[str, Any], Tensor]:
        lengths = [len(row.ids) for row in rows]
        width = max(lengths)

        def filled(lists: Sequence[Sequence[int]], filler: int) -> Tensor:
            table = [[*one, *[filler] * (width - len(one))] for one in lists]
            return torch.tensor(table, device=self.device)

        inputs: dict[str, Any] = {
            "input_ids": filled([row.ids for row in rows], self.pad)[:, skip:],
            "attention_mask": filled([[1] * length for length in lengths], 0),
        }
        for key in rows[0].per_token:
            inputs[key] = filled([row.per_token[key] for row in rows], 0)
        for key in rows[0].tensors:
            pieces = [row.tensors[key] for row in rows]
            joined = _joined(pieces).to(self.device)
            inputs[key] = joined.to(self.model.dtype) if joined.is_floating_point() else joined
        return inputs, torch.tensor(lengths, device=self.device) - 1 - skip

    @torch.no_grad()  # no inference tensors: the model may go on training
    def prefix(self, rows: Sequence[Prompted]) -> Prefix | None:
        """What all rows begin with, computed once, where that is worth it, the model can and the
        numbers are those without; None elsewhere. Rows with images share nothing.
        """
        if len(rows) < 2 or any(row.tensors or row.per_token for row in rows):
            return None
        count = common(rows)
        if count < LEAST_PREFIX:
            return None
        by_length = sorted(rows, key=lambda row: len(row.ids))
        few = [by_length[0], by_length[-1]]
        ids = rows[0].ids[:count]
        try:
            cache: Any = DynamicCache(config=self.model.config)
            table = torch.tensor([ids], device=self.device)
            self.model.base_model(input_ids=table, use_cache=True, **{self.cache_key: cache})
            found = Prefix(ids, cache)
            with_it, without = self(few, found), self(few)
        except Exception as error:  # caches of other kinds refuse in many ways
            logger.info("no prefix cache: %s: %s", type(error).__name__, error)
            return None
        gap = (with_it - without).abs().max()
        bound = AGREE.get(self.model.dtype, NARROW) * without.abs().max().clamp_min(1e-6)
        return found if bool(gap <= bound) else None


def common(rows: Sequence[Prompted]) -> int:
    """How many tokens all rows begin with, at least one of each left over."""
    least, most = min(row.ids for row in rows), max(row.ids for row in rows)
    same = next((p for p, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), None)
    shortest = min(len(row.ids) for row in rows)
    return min(shortest if same is None else same, shortest - 1)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """One after the other along the first axis, smaller ones filled up with zeros behind."""
    most = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
    filled = []
    for piece in pieces:
        missing = [size - own for size, own in zip(most, piece.shape[1:], strict=True)]
        filled.append(F.pad(piece, [part for size in reversed(missing) for part in (0, size)]))
    return torch.cat(filled)


def _peft(model: Any) -> bool:
    return hasattr(model, "get_base_model")
