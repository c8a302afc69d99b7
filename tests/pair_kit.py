"""Pairs of responses of unequal length over the vocabulary of `conftest`, and quiet settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import VOCAB
from datasets import Dataset

from llmkd.trainers import IrepoConfig


def pair_rows(count: int = 12, *, seed: int = 0, vocab: int = VOCAB, hard: bool = False) -> Dataset:
    """Prompts of 1 to 6 tokens, completions of 1 to 9; logits of both signs, without references."""
    make = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=make))
        return torch.randint(1, vocab, (size,), generator=make).tolist()

    rows = []
    for row in range(count):
        logit = float(torch.randn((), generator=make)) * 2
        if hard:
            logit = 3.0 if logit > 0 else -3.0
        parts = {"prompt_ids": ids(1, 7), "ids_1": ids(1, 10), "ids_2": ids(1, 10)}
        rows.append({"row": row, **parts, "pref_logit": logit})
    return Dataset.from_list(rows)


def irepo_args(folder: Path | str, **settings: Any) -> IrepoConfig:
    """Settings of a run of a few steps, quiet and unsaved unless `settings` say otherwise."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }
    return IrepoConfig(**{**defaults, **settings})
