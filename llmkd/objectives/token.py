"""Objectives on next-token distributions: the plain forms, which are the definitions.

Logits lie on the token they predict: position t of `student_BTV` predicts `gold_BT[:, t]`. Callers
shift (see `shift_labels`); nothing here does. Positions outside the mask are dropped before any
arithmetic, so that NaN there changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.objectives.registry import objective
from llmkd.types import DenseLogits, LossTerm

IGNORE = -100


def shift_labels(labels_BT: Tensor) -> Tensor:
    """Move labels one to the left so that position t holds the token it predicts; the last is -100.

    Moving the labels and not the logits spares a copy of the [B, T, V] tensor.
    """
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)


def wide(logits: Tensor) -> Tensor:
    """float64 stays float64 (the definition); everything narrower is computed in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


@objective("cross_entropy")
def cross_entropy(student_BTV: Tensor, gold_BT: Tensor, mask_BT: Tensor) -> LossTerm:
    """Sum of -log q(gold) in nats over the masked-in positions."""
    log_q_NV = F.log_softmax(wide(student_BTV[mask_BT]), dim=-1)
    gold_N = gold_BT[mask_BT]
    total = -log_q_NV.gather(-1, gold_N[:, None]).sum()
    return LossTerm(total=total, count=mask_BT.sum(), metrics={"ce": total.detach()})


@objective("forward_kl")
def forward_kl(
    student_BTV: Tensor,
    target: DenseLogits,
    mask_BT: Tensor,
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    t2_scale: bool = False,
) -> LossTerm:
    """Sum of KL(teacher || student) in nats; Hinton et al. 2015 (arXiv 1503.02531, section 2).

    Both sides have a temperature of their own. `t2_scale` multiplies by student_temperature**2,
    which gives the gradient back the size it has at temperature 1 (Hinton's T**2 where both are
    equal). The teacher speaks over the `shared` leading entries, renormalised there; the student's
    distribution runs over its whole head, so that its padding is pushed down.
    """
    log_p_NS = F.log_softmax(
        wide(target.logits_BTV[mask_BT][:, : target.shared]) / teacher_temperature, dim=-1
    )
    log_q_NV = F.log_softmax(wide(student_BTV[mask_BT]) / student_temperature, dim=-1)
    p_NS = log_p_NS.exp()
    # xlogy-like: where p is 0 the product is 0, whatever the logarithm (-inf * 0 would be NaN).
    terms_NS = torch.where(p_NS > 0, p_NS * (log_p_NS - log_q_NV[:, : target.shared]), 0.0)
    total = terms_NS.sum() * (student_temperature**2 if t2_scale else 1.0)
    return LossTerm(total=total, count=mask_BT.sum(), metrics={"kl": total.detach()})


@objective("ce_kd")
def ce_kd(
    student_BTV: Tensor,
    target: DenseLogits,
    mask_BT: Tensor,
    *,
    gold_BT: Tensor,
    kd_weight: float,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    t2_scale: bool = False,
) -> LossTerm:
    """(1 - w) CE + w KD of SALT's stage 1 (arXiv 2410.18779), a sum in nats.

    KD = -sum_v p(v) log q(v), the cross-entropy to the tempered teacher: `forward_kl` plus the
    teacher's entropy, which has no gradient. `metrics` holds "ce" (at temperature 1), "kl" (without
    T**2) and "teacher_entropy", all sums.
    """
    ce = cross_entropy(student_BTV, gold_BT, mask_BT)
    kl = forward_kl(
        student_BTV,
        target,
        mask_BT,
        teacher_temperature=teacher_temperature,
        student_temperature=student_temperature,
    )
    log_p_NS = F.log_softmax(
        wide(target.logits_BTV[mask_BT][:, : target.shared]) / teacher_temperature, dim=-1
    )
    entropy = -torch.where(log_p_NS.exp() > 0, log_p_NS.exp() * log_p_NS, 0.0).sum()
    scale = student_temperature**2 if t2_scale else 1.0
    total = (1.0 - kd_weight) * ce.total + kd_weight * scale * (kl.total + entropy)
    metrics = {"ce": ce.total, "kl": kl.total, "teacher_entropy": entropy}
    return LossTerm(total, ce.count, {name: value.detach() for name, value in metrics.items()})
