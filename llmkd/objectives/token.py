"""Objectives on next-token distributions with a gold token: the plain forms, the definitions.

Logits lie on the token they predict: position t of `student_BTV` predicts `gold_BT[:, t]`. Callers
shift (see `shift_labels`); nothing here does. Positions outside the mask are dropped before any
arithmetic, so that NaN there changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.objectives.divergences import find_divergence
from llmkd.objectives.registry import objective
from llmkd.objectives.targets import chosen_rows, log_events, wide
from llmkd.types import LossTerm, Target

IGNORE = -100


def shift_labels(labels_BT: Tensor) -> Tensor:
    """Move labels one to the left so that position t holds the token it predicts; the last is -100.

    Moving the labels and not the logits spares a copy of the [B, T, V] tensor.
    """
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)


@objective("cross_entropy")
def cross_entropy(
    student_BTV: Tensor, gold_BT: Tensor, mask_BT: Tensor, *, weights_BT: Tensor | None = None
) -> LossTerm:
    """Sum of -log q(gold) in nats over the masked-in positions, each times its weight if given.

    The metric "ce" is the plain sum, without weights.
    """
    log_q_NV = F.log_softmax(wide(student_BTV[mask_BT]), dim=-1)
    nll_N = -log_q_NV.gather(-1, gold_BT[mask_BT][:, None]).squeeze(-1)
    total = (nll_N if weights_BT is None else nll_N * weights_BT[mask_BT]).sum()
    return LossTerm(total=total, count=mask_BT.sum(), metrics={"ce": nll_N.sum().detach()})


@objective("ce_kd")
def ce_kd(
    student_BTV: Tensor,
    target: Target,
    mask_BT: Tensor,
    *,
    gold_BT: Tensor,
    kd_weight: float,
    divergence: str = "forward_kl",
    weights_BT: Tensor | None = None,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    t2_scale: bool = False,
    **options: float,
) -> LossTerm:
    """(1 - w) CE + w KD of SALT's stage 1 (arXiv 2410.18779), a sum in nats.

    KD is the divergence named; for forward_kl it is -sum_v p(v) log q(v), the cross-entropy to the
    tempered teacher: the KL plus the teacher's entropy, which has no gradient. `weights_BT`
    multiplies the whole loss of each position. `metrics` are plain sums without weights: "ce" (at
    temperature 1), the divergence ("kl" for forward_kl; without T**2), "teacher_entropy".
    """
    rows_N = chosen_rows(mask_BT)
    total_N, ce_N, distance_N, entropy_N = mixed_rows(
        student_BTV.reshape(-1, student_BTV.shape[-1]).index_select(0, rows_N),
        target.take(rows_N),
        gold_BT.reshape(-1).index_select(0, rows_N),
        kd_weight=kd_weight,
        divergence=divergence,
        teacher_temperature=teacher_temperature,
        student_temperature=student_temperature,
        t2_scale=t2_scale,
        **options,
    )
    if weights_BT is not None:
        total_N = total_N * weights_BT.reshape(-1).index_select(0, rows_N)
    names = ("ce", find_divergence(divergence).metric, "teacher_entropy")
    values = (ce_N, distance_N, entropy_N)
    sums = {name: value.detach().sum() for name, value in zip(names, values, strict=True)}
    return LossTerm(total_N.sum(), mask_BT.sum(), sums)


def mixed_rows(
    student_NV: Tensor,
    target_N: Target,
    gold_N: Tensor,
    *,
    kd_weight: float,
    divergence: str = "forward_kl",
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    t2_scale: bool = False,
    **options: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ce_kd` of rows that were chosen already: total, CE, divergence, teacher's entropy, [N] each.

    Nats; only the first carries the mix's gradient. A divergence on another unit stays as it is.
    """
    find = find_divergence(divergence)
    temperatures = {
        "teacher_temperature": teacher_temperature,
        "student_temperature": student_temperature,
    }
    student_NV = wide(student_NV)  # once: two casts of bfloat16 would round two gradients
    log_q_NV = F.log_softmax(student_NV, dim=-1)
    ce_N = -log_q_NV.gather(-1, gold_N[:, None]).squeeze(-1)
    distance_N = find.of_rows(student_NV, target_N, **temperatures, **options)
    log_p, _ = log_events(student_NV.detach(), target_N, teacher_temperature=teacher_temperature)
    entropy_N = -torch.where(log_p.exp() > 0, log_p.exp() * log_p, 0.0).sum(-1)
    kd_N = distance_N + entropy_N if find.name == "forward_kl" else distance_N
    scale = student_temperature**2 if t2_scale else 1.0
    return (1.0 - kd_weight) * ce_N + kd_weight * scale * kd_N, ce_N, distance_N, entropy_N


def nats_and_hits(logits_BTV: Tensor, gold_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """`head_scores` of logits that are there: nats and hits of the masked-in positions, [N] each.

    Row by row, because a whole batch of log-probabilities is the largest tensor of an evaluation.
    """
    nats, hits = [], []
    for logits_TV, gold_T, mask_T in zip(logits_BTV, gold_BT, mask_BT, strict=True):
        logits_NV, gold_N = wide(logits_TV[mask_T]), gold_T[mask_T]
        own_N = logits_NV.gather(-1, gold_N[:, None]).squeeze(-1)
        nats.append(torch.logsumexp(logits_NV, -1) - own_N)
        hits.append(logits_NV.argmax(-1) == gold_N)
    return torch.cat(nats), torch.cat(hits)
