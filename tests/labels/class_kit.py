"""Rows, a classifier worked out by hand and its store, for the tests of class labels."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset

from llmkd.labels import StorePlan, class_plan, write_class_store

NAMES = ("neg", "neutral", "pos")
LENGTHS = (7, 5, 9, 4, 8, 6, 3)


def class_rows() -> Dataset:
    """Seven rows of unequal length; row r holds the tokens 10 r + 1, 10 r + 2, ..."""
    ids = [[10 * r + t + 1 for t in range(n)] for r, n in enumerate(LENGTHS)]
    return Dataset.from_dict({"input_ids": ids, "row": list(range(len(ids)))})


def logits_of(ids: list[int]) -> list[float]:
    """Logits of a row: its mean token, its length over 3, and -0.0 (a sign to be kept)."""
    return [sum(ids) / len(ids), len(ids) / 3, -0.0]


def answer(rows: list[dict]) -> torch.Tensor:
    """One answer a row, [B, 3]."""
    return torch.tensor([logits_of(row["input_ids"]) for row in rows])


def token_answer(rows: list[dict]) -> torch.Tensor:
    """One answer a token, [B, T, 3]: the token, its third, its negative; 99 on padding."""
    longest = max(len(row["input_ids"]) for row in rows)
    out = torch.full((len(rows), longest + 1, 3), 99.0)
    for b, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"]).float()
        out[b, : len(ids)] = torch.stack((ids, ids / 3, -ids), -1)
    return out


def plan(**settings) -> StorePlan:
    """Seven rows in shards of two."""
    defaults = {
        "label_names": NAMES,
        "teacher": {"id": "big", "revision": "a1", "fingerprint": "f00", "dtype": "float32"},
        "tokenizer_digest": "tok-1",
        "rows_fingerprint": "data-1",
        "max_length": 9,
        "total_rows": len(LENGTHS),
        "rows_per_shard": 2,
    }
    return class_plan(**{**defaults, **settings})


def write(folder: Path, answer=answer, **settings) -> Path:
    """Whatever is missing, quietly; `settings` are the plan's."""
    write_class_store(
        folder,
        rows=class_rows(),
        answer=answer,
        plan=plan(**settings),
        batch_size=2,
        main=True,
        quiet=True,
    )
    return folder
