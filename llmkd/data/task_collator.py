"""Rows of one text each (a task's, or general text cut into pieces) to padded batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkd.data.task_config import MULTI, REGRESSION, TOKEN
from llmkd.objectives.token import IGNORE


@dataclass(frozen=True)
class TaskCollator:
    """Pad rows to the longest of the batch and say where the padding is.

    Takes rows with `input_ids` and optionally `attention_mask` (all ones where absent),
    `token_type_ids`, `labels` and `row`. Returns `input_ids`, `attention_mask` [B, T], and where
    the rows have them `token_type_ids` [B, T], `rows` [B] and `labels`: int64 [B] for classes,
    float32 [B] for regression, float32 [B, C] for multi_label, int64 [B, T] for token, -100 on
    padding. `kind` is the task's type; None reads it from the first label.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8
    kind: str | None = None
    padding_side: str = "right"

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {self.padding_side!r}, not left or right")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        masks = [row.get("attention_mask") or [1] * len(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": self._padded([row["input_ids"] for row in rows], width, self.pad_token_id),
            "attention_mask": self._padded(masks, width, 0),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._padded(
                [row["token_type_ids"] for row in rows], width, 0
            )
        if "labels" in rows[0]:
            batch["labels"] = self._labels([row["labels"] for row in rows], width)
        if "row" in rows[0]:
            batch["rows"] = torch.tensor([row["row"] for row in rows])
        return batch

    def _labels(self, labels: list[Any], width: int) -> Tensor:
        kind = self.kind or _kind(labels[0])
        if kind == TOKEN:
            return self._padded(labels, width, IGNORE)
        floats = kind in (MULTI, REGRESSION)
        return torch.tensor(labels, dtype=torch.float32 if floats else torch.int64)

    def _padded(self, values: list[list[int]], width: int, fill: int) -> Tensor:
        """[B, width], int64."""
        padded = []
        for row in values:
            padding = [fill] * (width - len(row))
            padded.append([*padding, *row] if self.padding_side == "left" else [*row, *padding])
        return torch.tensor(padded, dtype=torch.int64)


def _kind(label: Any) -> str | None:
    if isinstance(label, list):
        return MULTI if label and isinstance(label[0], float) else TOKEN
    return REGRESSION if isinstance(label, float) else None
