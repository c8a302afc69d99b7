"""The fast form of `ce_kd` and `cross_entropy` on logits that are there already.

For models whose head is no plain linear map, and for losses computed away from a model. The plain
forms read and write the [N, V] matrix some ten times; here every chunk stays in cache, the gradient
is made in the forward pass, and rows outside the mask are neither read nor copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkd.objectives.kernels import Settings, ce_and_gradient, mix_and_gradient
from llmkd.objectives.targets import chosen_rows
from llmkd.types import LossTerm, Target

CHUNK_BYTES = 2 << 20


def ce_kd_chunked(
    student_BTV: Tensor,
    target: Target | None,
    mask_BT: Tensor,
    *,
    gold_BT: Tensor,
    settings: Settings | None = None,
    **values: Any,
) -> LossTerm:
    """Equal to `ce_kd`, or to `cross_entropy` where `target` is None; see there for every argument.

    Settings come whole or one by one. float64 logits are computed in float64, all others in
    float32. The gradient has the logits' dtype. Extra memory: that gradient plus a few chunks of
    2 MiB.
    """
    settings = settings or Settings(**values)
    vocab = student_BTV.shape[-1]
    rows_N = chosen_rows(mask_BT)
    sums = _CeKd.apply(
        student_BTV.reshape(-1, vocab), target, gold_BT.reshape(-1), rows_N, settings
    )
    named: dict[str, Tensor] = dict(zip(settings.names, sums[1:], strict=True))
    metrics = named if target is not None else {"ce": named["ce"]}
    return LossTerm(total=sums[0], count=mask_BT.sum(), metrics=metrics)


class _CeKd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_MV: Tensor,
        target: Target | None,
        gold_M: Tensor,
        rows_N: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        work = torch.float64 if student_MV.dtype == torch.float64 else torch.float32
        sums_4 = torch.zeros(4, dtype=torch.float64, device=student_MV.device)
        grad_MV = torch.zeros_like(student_MV) if ctx.needs_input_grad[0] else None
        row_bytes = student_MV.shape[-1] * (8 if work == torch.float64 else 4)
        for rows_C in rows_N.split(max(CHUNK_BYTES // row_bytes, 1)):
            z_CV = student_MV[rows_C].to(work)
            if target is None:
                values = ce_and_gradient(z_CV, gold_M[rows_C])
            else:
                values = mix_and_gradient(z_CV, target.take(rows_C), gold_M[rows_C], settings)
            sums_4 += torch.stack(values).sum(-1, dtype=torch.float64)
            if grad_MV is not None:
                grad_MV[rows_C] = z_CV.to(grad_MV.dtype)
        # Not `save_for_backward`: the buffer is ours alone, so backward may scale it in place.
        ctx.grad_MV = grad_MV
        parts = sums_4.to(work).unbind()
        ctx.mark_non_differentiable(*parts[1:])
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_MV is None:
            raise RuntimeError("ce_kd_chunked keeps its gradient for one backward pass only")
        grad_MV, ctx.grad_MV = ctx.grad_MV, None
        return (grad_MV.mul_(grads[0]), None, None, None, None)
