"""How many steps a stage has, and which rows it trains on when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from llmkd.data import TokenRows, training_order
from llmkd.errors import DataError
from llmkd.objectives import kd_steps
from llmkd.trainers import SaltConfig

if TYPE_CHECKING:
    from llmkd.methods.stage import Stage


def global_batch(args: TrainingArguments) -> int:
    """Rows of one optimizer step over all ranks and micro-batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def steps_of(args: SaltConfig, rows: TokenRows) -> int:
    """Optimizer steps of the run; DataError where the rows do not fill one batch."""
    batch = global_batch(args)
    if isinstance(rows.train, IterableDataset):
        return args.max_steps
    if len(rows.train) < batch:
        raise DataError.of(
            "per_device_train_batch_size",
            args.per_device_train_batch_size,
            f"the training data make {len(rows.train)} rows, fewer than one step's {batch} "
            f"({args.gradient_accumulation_steps} accumulated, {args.world_size} rank(s))",
            "a smaller batch or max_length",
            "more text",
        )
    if args.max_steps > 0:
        return args.max_steps
    return max(1, int(len(rows.train) * args.num_train_epochs // batch))


def ordered_rows(stage: Stage) -> Dataset | IterableDataset:
    """The rows in training order for the whole run, the selected ones first."""
    rows = stage.rows.train
    if isinstance(rows, IterableDataset):
        return rows
    return rows.select(_order(stage, len(rows)))


def stage1_rows(stage: Stage) -> np.ndarray:
    """Numbers of the rows that the KD stage trains on, ascending, each once."""
    needed = kd_steps(stage.training.kd_ratio, stage.steps) * global_batch(stage.training)
    if isinstance(stage.rows.train, IterableDataset):
        return np.arange(needed)
    return np.unique(_order(stage, len(stage.rows.train))[:needed])


def longest_run(stage: Stage, rows: int) -> int:
    """The most optimizer steps, up to the stage's own, whose KD stage takes no more than `rows`
    rows; 0 where not even one step's does.
    """
    batch, ratio = global_batch(stage.training), stage.training.kd_ratio
    fitting = (n for n in range(stage.steps, 0, -1) if kd_steps(ratio, n) * batch <= rows)
    return next(fitting, 0)


def _order(stage: Stage, rows: int) -> np.ndarray:
    args = stage.training
    seed = args.data_seed if args.data_seed is not None else args.seed
    return training_order(rows, stage.steps * global_batch(args), seed, stage.first)
