"""The one place that divides a loss."""

from __future__ import annotations

from torch import Tensor

from llmkd.types import LossTerm


def normalise(term: LossTerm, tokens_in_step: Tensor | int | None, *, world_size: int) -> Tensor:
    """Mean nats per counted position over the whole optimizer step.

    `tokens_in_step` counts every rank and every accumulated micro-batch. DDP, ZeRO and FSDP average
    gradients over ranks, hence the factor `world_size`. Evaluation has no count: the local one
    serves, and a batch without counted positions gives 0 rather than NaN.
    """
    if tokens_in_step is None:
        return term.total / term.count.clamp(min=1)
    if isinstance(tokens_in_step, Tensor):
        tokens_in_step = tokens_in_step.clamp(min=1)
    else:
        tokens_in_step = max(tokens_in_step, 1)
    return term.total * world_size / tokens_in_step
