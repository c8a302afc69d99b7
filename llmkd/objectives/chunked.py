"""The fast form of `cross_entropy` and `ce_kd`: one pass over the logits, a few hundred rows at a
time.

The plain forms read and write the [N, V] matrix some ten times; on a small model that costs as much
as a layer. Here every chunk stays in cache, the gradient is made in the forward pass, and rows
outside the mask are neither read nor copied. `tests/objectives/test_token.py` holds it to the plain
form in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkd.types import DenseLogits, LossTerm

CHUNK_BYTES = 4 << 20
METRICS = ("ce", "kl", "teacher_entropy")


@dataclass(frozen=True, slots=True)
class _Settings:
    kd_weight: float
    teacher_temperature: float
    student_temperature: float
    kd_scale: float


def ce_kd_chunked(
    student_BTV: Tensor,
    target: DenseLogits | None,
    mask_BT: Tensor,
    *,
    gold_BT: Tensor,
    kd_weight: float = 0.0,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    t2_scale: bool = False,
) -> LossTerm:
    """Equal to `ce_kd`, or to `cross_entropy` where `target` is None; see there for every argument.

    float64 logits are computed in float64, all others in float32. The gradient has the logits'
    dtype. Extra memory: that gradient plus a few chunks of 4 MiB.
    """
    settings = _Settings(
        kd_weight if target is not None else 0.0,
        teacher_temperature,
        student_temperature,
        student_temperature**2 if t2_scale else 1.0,
    )
    vocab = student_BTV.shape[-1]
    rows_N = mask_BT.reshape(-1).nonzero().squeeze(-1)
    teacher_MV = None
    shared = vocab
    if target is not None:
        teacher_MV = target.logits_BTV.reshape(-1, target.logits_BTV.shape[-1])
        shared = target.shared
    sums = _CeKd.apply(
        student_BTV.reshape(-1, vocab), teacher_MV, shared, gold_BT.reshape(-1), rows_N, settings
    )
    named: dict[str, Tensor] = dict(zip(METRICS, sums[1:], strict=True))
    return LossTerm(
        total=sums[0],
        count=mask_BT.sum(),
        metrics=named if target is not None else {"ce": named["ce"]},
    )


class _CeKd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_MV: Tensor,
        teacher_MV: Tensor | None,
        shared: int,
        gold_M: Tensor,
        rows_N: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        work = torch.float64 if student_MV.dtype == torch.float64 else torch.float32
        sums_4 = torch.zeros(4, dtype=work, device=student_MV.device)
        grad_MV = torch.zeros_like(student_MV) if ctx.needs_input_grad[0] else None
        row_bytes = student_MV.shape[-1] * (8 if work == torch.float64 else 4)
        chunk = max(CHUNK_BYTES // row_bytes, 16)
        for rows_C in rows_N.split(chunk):
            teacher_CS = None
            if teacher_MV is not None:
                teacher_CS = teacher_MV[rows_C, :shared].to(work)
            grad_CV, chunk_4 = _one_chunk(
                student_MV[rows_C].to(work), teacher_CS, gold_M[rows_C], settings
            )
            sums_4 += chunk_4
            if grad_MV is not None:
                grad_MV[rows_C] = grad_CV.to(grad_MV.dtype)
        # Not `save_for_backward`: the buffer is ours alone, so backward may scale it in place.
        ctx.grad_MV = grad_MV
        parts = sums_4.unbind()
        ctx.mark_non_differentiable(*parts[1:])
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_MV is None:
            raise RuntimeError("ce_kd_chunked keeps its gradient for one backward pass only")
        grad_MV, ctx.grad_MV = ctx.grad_MV, None
        return (grad_MV.mul_(grads[0]), None, None, None, None, None)


def _one_chunk(
    student_CV: Tensor, teacher_CS: Tensor | None, gold_C: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Gradient of the mixed loss on C rows, and (total, ce, kl, teacher entropy) sums in nats.

    d CE / d logits = softmax - onehot; d KD / d logits = (softmax(z / t) - p) / t. `student_CV` is
    overwritten.
    """
    index_C1 = gold_C[:, None]
    weight = settings.kd_weight
    lse_C = torch.logsumexp(student_CV, dim=-1)
    ce = (lse_C - student_CV.gather(-1, index_C1).squeeze(-1)).sum()
    if teacher_CS is None:
        grad_CV = student_CV.sub_(lse_C[:, None]).exp_()
        grad_CV.scatter_add_(-1, index_C1, torch.full_like(index_C1, -1, dtype=grad_CV.dtype))
        zero = torch.zeros_like(ce)
        return grad_CV, torch.stack((ce, ce, zero, zero))
    kd_grad_CV, kd, entropy = _kd_chunk(student_CV, lse_C, teacher_CS, settings)
    total = (1.0 - weight) * ce + weight * settings.kd_scale * kd
    if settings.student_temperature == 1.0:
        # softmax is the same in both terms: (1 - w) q + w s (q - p) with s = 1 is q - w s p.
        grad_CV = kd_grad_CV
    else:
        grad_CV = student_CV.sub_(lse_C[:, None]).exp_().mul_(1.0 - weight).add_(kd_grad_CV)
    gold_part = torch.full_like(index_C1, 1.0 - weight, dtype=grad_CV.dtype).neg_()
    grad_CV.scatter_add_(-1, index_C1, gold_part)
    return grad_CV, torch.stack((total, ce, kd - entropy, entropy))


def _kd_chunk(
    student_CV: Tensor, lse_C: Tensor, teacher_CS: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted KD gradient, -sum p log q and the teacher's entropy, both summed over rows, in nats.

    At student temperature 1 the returned gradient is that of the whole mix but for the gold token.
    """
    shared = teacher_CS.shape[-1]
    if settings.teacher_temperature != 1.0:
        teacher_CS = teacher_CS / settings.teacher_temperature
    lse_p_C = torch.logsumexp(teacher_CS, dim=-1)
    p_CS = torch.exp(teacher_CS - lse_p_C[:, None])
    # A teacher may rule a token out with -inf; 0 * -inf must count as 0.
    mean_logit_C = (p_CS * teacher_CS.clamp_min(torch.finfo(p_CS.dtype).min)).sum(-1)
    entropy = (lse_p_C - mean_logit_C).sum()
    factor = settings.kd_weight * settings.kd_scale
    if settings.student_temperature == 1.0:
        kd = (lse_C - (p_CS * student_CV[:, :shared]).sum(-1)).sum()
        grad_CV = student_CV.sub_(lse_C[:, None]).exp_()
        if factor != settings.kd_weight:
            grad_CV.mul_(1.0 - settings.kd_weight + factor)
        grad_CV[:, :shared].sub_(p_CS, alpha=factor)
        return grad_CV, kd, entropy
    scaled_CV = student_CV / settings.student_temperature
    lse_q_C = torch.logsumexp(scaled_CV, dim=-1)
    kd = (lse_q_C - (p_CS * scaled_CV[:, :shared]).sum(-1)).sum()
    grad_CV = scaled_CV.sub_(lse_q_C[:, None]).exp_()
    grad_CV[:, :shared].sub_(p_CS)
    return grad_CV.mul_(factor / settings.student_temperature), kd, entropy
