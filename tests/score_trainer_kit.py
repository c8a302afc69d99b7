"""Rated rows of unequal length over the vocabulary of `conftest`, and quiet settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import VOCAB
from datasets import Dataset

from llmkd.data.levels import Levels
from llmkd.trainers.score_config import ScoreConfig

LEVELS = Levels(("good", "fair", "bad"), (3.0, 2.0, 1.0), (11, 22, 33), "it is")


def score_rows(
    count: int = 12, *, seed: int = 0, groups: int = 1, run: int = 4, rest: int = 3
) -> Dataset:
    """Prompts of 1 to 9 tokens; an answer of two tokens, the level and up to `rest` more. Groups
    change every `run` rows. Targets need not sum to one.
    """
    make = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=make))

    def ids(size: int) -> list[int]:
        return torch.randint(1, VOCAB, (size,), generator=make).tolist()

    rows = []
    for row in range(count):
        prompt, answer = ids(number(1, 10)), [7, 8, LEVELS.ids_L[number(0, 3)]]
        answer += ids(number(0, rest + 1)) if rest else []
        probs = torch.rand(3, generator=make, dtype=torch.float64)
        parts: dict[str, Any] = {
            "input_ids": prompt + answer,
            "labels": [-100] * len(prompt) + answer,
            "level_at": len(prompt) + 2,
            "target": (probs / probs.sum() * (1.0 + 0.1 * (row % 2))).tolist(),
            "score_mean": 1.0 + 2.0 * float(torch.rand((), generator=make)),
            "score_std": 0.1 + float(torch.rand((), generator=make)),
            "group_id": (row // run) % groups,
            "row": row,
        }
        rows.append(parts)
    return Dataset.from_list(rows)


def score_args(folder: Path | str, **settings: Any) -> ScoreConfig:
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
    return ScoreConfig(**{**defaults, **settings})
