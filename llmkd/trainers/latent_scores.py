"""Held-out metrics of a stage: each part of its loss, and the task's scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from llmkd.trainers.latent_losses import Batch

if TYPE_CHECKING:
    from llmkd.trainers.latent import LatentDistillTrainer

PARTS = ("attn", "hidden", "soft", "hard")


def row_sums(trainer: LatentDistillTrainer, batch: Batch) -> Tensor:
    """Totals and counts of the parts: [B, 2 * parts] float64, (total, count) in the order of
    `PARTS`.

    Row by row on several ranks, where a gathered batch whose last rows were repeated loses just
    these; else the whole batch's in its first row, which costs less.
    """
    rows = len(batch.mask_BT)
    sums = torch.zeros(rows, 2 * len(PARTS), dtype=torch.float64, device=batch.mask_BT.device)
    alone = trainer.accelerator.num_processes == 1
    for place in range(1 if alone else rows):
        some = batch if alone else batch.row(place)
        terms = some.terms(trainer.plan, trainer.args, trainer.losses, trainer.kind)
        for part, term in terms.items():
            at = 2 * PARTS.index(part)
            sums[place, at], sums[place, at + 1] = term.total, term.count
    return sums


def held_out_metrics(trainer: LatentDistillTrainer, found: EvalPrediction) -> dict[str, float]:
    """`loss` (the weighted sum of the parts' means), the parts, and the task's scores."""
    predictions = cast(Any, found.predictions)
    sums, outputs = predictions if isinstance(predictions, tuple) else (predictions, None)
    totals, counts = sums[:, 0::2].sum(0), sums[:, 1::2].sum(0)
    means = {
        part: float(totals[at] / counts[at]) for at, part in enumerate(PARTS) if counts[at] > 0
    }
    loss = sum(getattr(trainer.args, f"{part}_weight") * mean for part, mean in means.items())
    metrics = {"loss": float(loss), **means}
    if outputs is not None and trainer.task_metrics is not None:
        labels = np.asarray(found.label_ids)
        if trainer.kind == "token":
            counted = labels != -100
            outputs, labels = outputs[counted], labels[counted]
        scores = trainer.task_metrics(outputs, labels)
        metrics |= {name: value for name, value in scores.items() if name != "loss"}
    return metrics
