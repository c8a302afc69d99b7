"""Pairs of responses to batches: both completions of a pair stand in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkd.objectives.token import IGNORE

REFERENCES = ("ref_logps", "initial_logps")
REFERENCE_COLUMNS = tuple(f"{name}_{side}" for name in REFERENCES for side in (1, 2))
NEEDED = ("prompt_ids", "ids_1", "ids_2", "pref_logit")


@dataclass(frozen=True)
class PairCollator:
    """Rows with `prompt_ids`, `ids_1`, `ids_2`, `pref_logit` to tensors whose first axis is pairs.

    Returns `input_ids` [B, 2, T], padded on the right; `labels` [B, 2, T], the ids of completion
    tokens and -100 elsewhere; `pref_logit` float64 [B]; and where the rows have them `ref_logps`,
    `initial_logps` float64 [B, 2], `pair` (its number in the trainer's table) and `rows` [B].
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        both = []
        for row in rows:
            prompt = list(row["prompt_ids"])
            for ids in (row["ids_1"], row["ids_2"]):
                both.append(([*prompt, *ids], [*[IGNORE] * len(prompt), *ids]))
        ids, labels = padded(both, self.pad_token_id, self.pad_to_multiple_of)
        batch = {
            "input_ids": ids.unflatten(0, (-1, 2)),
            "labels": labels.unflatten(0, (-1, 2)),
            "pref_logit": torch.tensor([row["pref_logit"] for row in rows], dtype=torch.float64),
        }
        for name in REFERENCES:
            if f"{name}_1" in rows[0]:
                values = [[row[f"{name}_1"], row[f"{name}_2"]] for row in rows]
                batch[name] = torch.tensor(values, dtype=torch.float64)
        for name, column in (("pair", "pair"), ("rows", "row")):
            if column in rows[0]:
                batch[name] = torch.tensor([row[column] for row in rows])
        return batch


def padded(
    rows: Sequence[tuple[list[int], list[int]]], pad_token_id: int, multiple: int = 8
) -> tuple[Tensor, Tensor]:
    """Ids and labels of unequal length as two tensors [B, T]; padding has the label -100."""
    width = -(-max(len(ids) for ids, _ in rows) // multiple) * multiple
    ids = [[*ids, *[pad_token_id] * (width - len(ids))] for ids, _ in rows]
    labels = [[*labels, *[IGNORE] * (width - len(labels))] for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)
