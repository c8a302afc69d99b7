"""Rows to batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkd.objectives.token import IGNORE

NOT_FOR_THE_MODEL = ("labels", "rows")


def for_the_model(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model's forward takes."""
    return {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}


@dataclass(frozen=True)
class PackedCollator:
    """Pad packed rows on the right and say where each document begins.

    Takes rows with `input_ids` and `seq_lengths` (tokens of each document in the row, as
    `trl.pack_dataset` gives them; the whole row where absent). Returns `input_ids`, `labels`,
    `position_ids` [B, T] and, where the rows have them, their numbers `rows` [B].

    No attention mask on purpose: with position ids that restart, transformers builds a
    block-diagonal causal mask, so that no document sees another. A document's first token gets
    label -100: nothing before it may predict it. Padding is one more document without labels.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            ids = list(row["input_ids"])
            lengths = list(row.get("seq_lengths") or [len(ids)])
            padding = width - len(ids)
            positions = [p for length in (*lengths, padding) for p in range(length)]
            given = row.get("labels") or ids
            labels = [
                IGNORE if place == 0 else label
                for place, label in zip(positions, given, strict=False)
            ]
            batch["input_ids"].append(ids + [self.pad_token_id] * padding)
            batch["labels"].append(labels + [IGNORE] * padding)
            batch["position_ids"].append(positions)
        tensors = {name: torch.tensor(values) for name, values in batch.items()}
        if "row" in rows[0]:
            tensors["rows"] = torch.tensor([row["row"] for row in rows])
        return tensors


@dataclass(frozen=True)
class CountableTargets:
    """Any collator, with labels that can be counted: nothing is predicted from padding.

    With padding on the left the first real token stands behind a pad token; upstream's collators
    leave its label in, and it would be "predicted" from a position that attends to nothing.
    """

    collate: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if labels is None:
            return batch
        labels = labels.clone()
        labels[:, 0] = IGNORE
        if mask is not None and mask.dim() == 2:
            labels[:, 1:][mask[:, :-1] == 0] = IGNORE
        batch["labels"] = labels
        return batch
