"""Logits and stores of a few rows for the tests of `llmkd.labels`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llmkd.labels import Dense, Sampled, StorePlan, StoreWriter, TopK, row_digest

VOCAB = 300
LENGTHS = (7, 5, 9, 4, 8, 6, 3)
PLAIN = (Sampled(20, VOCAB), TopK(5, VOCAB), Dense(VOCAB))  # encodings that need no head


def zipf_logits(tokens: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Peaked logits [tokens, vocab]: a power of the rank, noise, one favourite, random order."""
    make = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocab + 1).float().log()
    logits = -(1 + 1.2 * torch.rand(tokens, 1, generator=make)) * rank
    logits += 0.3 * torch.randn(tokens, vocab, generator=make)
    logits[:, 0] += 3 * torch.randn(tokens, generator=make)
    order = torch.rand(tokens, vocab, generator=make).argsort(-1)
    return logits.gather(-1, order)


def tokens_of(row: int) -> list[int]:
    """The token ids of row number `row`."""
    return np.random.default_rng(row).integers(0, VOCAB, LENGTHS[row]).tolist()


def values_of(row: int, width: int = VOCAB) -> torch.Tensor:
    """What the teacher says about it: logits or hidden states [T, width]."""
    return zipf_logits(LENGTHS[row], width, seed=100 + row)


def plan(encoding=None, **settings) -> StorePlan:
    """Seven rows in shards of two."""
    defaults = {
        "encoding": encoding or Sampled(20, VOCAB),
        "teacher": {"id": "big", "revision": "a1", "fingerprint": "f00", "dtype": "float32"},
        "tokenizer": "tok-1",
        "data": "data-1",
        "packing": "bfd",
        "max_length": 9,
        "vocab": VOCAB,
        "rows": np.arange(len(LENGTHS)),
        "total_rows": len(LENGTHS),
        "rows_per_shard": 2,
    }
    return StorePlan(**{**defaults, **settings})


def shard_rows(plan: StorePlan, number: int, encoding=None, width: int = VOCAB) -> list[dict]:
    """The rows of one shard, encoded."""
    encoding = encoding or plan.encoding
    return [
        {
            "row": row,
            "tokens": row_digest(tokens_of(row)),
            "length": LENGTHS[row],
            **encoding.encode(values_of(row, width), row=row),
        }
        for row in plan.shard_rows(number).tolist()
    ]


def write_store(folder: Path, plan: StorePlan, head=None, fit=None, width: int = VOCAB) -> Path:
    """Whatever is missing, then the manifest."""
    with StoreWriter(folder, plan) as writer:
        encoding = None
        if head is not None or fit is not None:
            writer.put_head(head, fit=fit)
        if fit is not None:
            encoding = writer.lowrank()
        for number in writer.missing_shards():
            writer.write_shard(number, shard_rows(plan, number, encoding, width))
        writer.finish()
    return Path(folder)
