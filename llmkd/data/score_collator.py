"""Tokenized score rows to batches, and the pairs that are drawn inside a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.data.pair_collator import padded
from llmkd.errors import DataError

NEEDED = ("input_ids", "labels", "level_at", "target", "score_mean")
OPTIONAL = ("score_std", "group_id", "row")
ROW_COLUMNS = ("text", "messages", "images", "group", "mean", "std", "n", "ratings", "probs")
PER_TOKEN = "token_type_ids"  # how names of outputs with one number a token end
NOT_FOR_THE_MODEL = (*NEEDED[1:], *OPTIONAL, "rows", "partner")
NOBODY = -1  # the partner of a row that is in no pair


def for_the_scorer(batch: dict[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model's forward takes."""
    return {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}


@dataclass(frozen=True)
class ScoreCollator:
    """Rows of the shared format to tensors, padded on the right.

    Returns `input_ids`, `attention_mask`, `labels` [B, T]; `level_at`, `group_id` int64 [B] (one
    group where the rows name none); `target` [B, L], `score_mean`, `score_std` [B] in float64, NaN
    for an unknown std; `rows` [B] where the rows have `row`. Whatever else the rows hold as numbers
    is a processor's output: token types are padded like ids, the rest (pixel_values and so on) is
    concatenated along its first axis, smaller pieces filled up with zeros. DataError where some
    rows of a batch lack such an output.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        both = [(_list(row["input_ids"]), _list(row["labels"])) for row in rows]
        ids, labels = padded(both, self.pad_token_id, self.pad_to_multiple_of)
        mask = torch.zeros_like(ids)
        for place, (own, _) in enumerate(both):
            mask[place, : len(own)] = 1
        stds = [np.nan if row.get("score_std") is None else row["score_std"] for row in rows]
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "level_at": torch.tensor([int(row["level_at"]) for row in rows]),
            "target": _floats([_list(row["target"]) for row in rows]),
            "score_mean": _floats([row["score_mean"] for row in rows]),
            "score_std": _floats(stds),
            "group_id": torch.tensor([int(row.get("group_id") or 0) for row in rows]),
        }
        if "row" in rows[0]:
            batch["rows"] = torch.tensor([int(row["row"]) for row in rows])
        return batch | self._outputs(rows, ids.shape[1])

    def _outputs(self, rows: Sequence[dict[str, Any]], width: int) -> dict[str, Tensor]:
        """What the processor made beside ids."""
        known = {*NEEDED, *OPTIONAL, *ROW_COLUMNS, "attention_mask"}
        names = [
            name for name in dict.fromkeys(n for row in rows for n in row) if name not in known
        ]
        found = {}
        for name in names:
            lacking = [place for place, row in enumerate(rows) if row.get(name) is None]
            if len(lacking) == len(rows) or isinstance(rows[0].get(name), str):
                continue
            if lacking:
                row = rows[lacking[0]].get("row", lacking[0])
                problem = f"row {row} has none and others of its batch have"
                raise DataError.of(name, None, problem, "train rows with and without images apart")
            pieces = [_tensor(row[name]) for row in rows]
            if name.endswith(PER_TOKEN):
                flat = [piece.reshape(-1) for piece in pieces]
                found[name] = torch.stack([F.pad(p, (0, width - len(p))) for p in flat])
            else:
                found[name] = _joined(pieces)
        return found


def in_pairs(group_B: np.ndarray, able_B: np.ndarray) -> np.ndarray:
    """Which rows get a partner, bool [B]: those that are `able`, in a group of two such or more."""
    _, place_A, count_G = np.unique(group_B[able_B], return_inverse=True, return_counts=True)
    paired_B = np.zeros(len(group_B), bool)
    paired_B[able_B] = count_G[place_A] > 1
    return paired_B


def draw_partners(group_B: np.ndarray, able_B: np.ndarray, seed: Sequence[int] | int) -> np.ndarray:
    """A random partner inside its group for each row, [B] int64, `NOBODY` for those without.

    The rows of a group stand in a random circle and each is paired with the next: every row is once
    on either side, and never its own partner.
    """
    make = np.random.default_rng(seed)
    partner_B = np.full(len(group_B), NOBODY, np.int64)
    paired_B = in_pairs(group_B, able_B)
    for group in np.unique(group_B[paired_B]):
        circle = make.permutation(np.flatnonzero(paired_B & (group_B == group)))
        partner_B[circle] = np.roll(circle, -1)
    return partner_B


def _list(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _floats(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _tensor(values: Any) -> Tensor:
    """Numbers nested in lists come from Arrow and are float64 there; a model wants float32."""
    found = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    return found.float() if found.dtype == torch.float64 else found


def _joined(pieces: list[Tensor]) -> Tensor:
    """One after the other; images of unequal size or number as processors pad them: with zeros
    behind.
    """
    if len({piece.shape[1:] for piece in pieces}) == 1:
        return torch.cat(pieces)
    most = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
    filled = []
    for piece in pieces:
        missing = [size - own for size, own in zip(most, piece.shape[1:], strict=True)]
        filled.append(F.pad(piece, [part for size in reversed(missing) for part in (0, size)]))
    return torch.cat(filled)
