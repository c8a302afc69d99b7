"""NKD: the gold token's term and the others' term of a soft cross-entropy, normalised apart.

Yang et al. 2023, arXiv 2303.13005: -T_t log S_t - gamma tau^2 sum over i != t of
T'_i log S'_i, *added to* the cross-entropy. T and S are teacher and student at temperature 1, t is
the gold token; the primed ones are softmaxes over all tokens but t at temperature tau. (The public
code, yzd-v/cls_KD at 1c2c0ff, builds its mask with `ones.scatter_(1, label, 1)` and so keeps the
gold token in the second term; here it is left out, as the paper has it.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.objectives.registry import objective
from llmkd.objectives.targets import (
    NEVER,
    bucket_events,
    check_temperature,
    chosen_rows,
    gold_probability,
    log_probs,
    wide,
)
from llmkd.types import LossTerm, SparseTarget, Target

LEAST_REST = 1e-4  # with less than this beside the gold token, a stored label's rest is rounding


@objective("nkd")
def nkd(
    student_BTV: Tensor,
    target: Target,
    mask_BT: Tensor,
    *,
    gold_BT: Tensor,
    weights_BT: Tensor | None = None,
    temperature: float = 1.0,
    gamma: float = 1.5,
    ce_weight: float = 1.0,
) -> LossTerm:
    """ce_weight CE + NKD, a sum in nats over the masked-in positions, each times its weight.

    `temperature` is the paper's tau (1 on ImageNet, 3 on CIFAR-100), `gamma` 1.5 (1 and 3.5). The
    metrics are plain sums without weights: "ce", "nkd" (all of NKD) and "nkd_non_target" (its
    second term without gamma tau^2; a cross-entropy, so its least value is the label's entropy).
    Raises ValueError for a sparse label with a temperature, its own or asked for, other than 1.
    """
    rows_N = chosen_rows(mask_BT)
    # Widened once: two casts of bfloat16 would round two gradients.
    student_NV = wide(student_BTV.reshape(-1, student_BTV.shape[-1]).index_select(0, rows_N))
    gold_N = gold_BT.reshape(-1).index_select(0, rows_N)
    target_N = target.take(rows_N)
    ce_N = F.cross_entropy(student_NV, gold_N, reduction="none")
    gold_part_N, others_N = nkd_parts(student_NV, target_N, gold_N, temperature=temperature)
    nkd_N = gold_part_N + gamma * temperature**2 * others_N
    total_N = ce_weight * ce_N + nkd_N
    if weights_BT is not None:
        total_N = total_N * weights_BT.reshape(-1).index_select(0, rows_N)
    metrics = {"ce": ce_N, "nkd": nkd_N, "nkd_non_target": others_N}
    sums = {name: value.detach().sum() for name, value in metrics.items()}
    return LossTerm(total_N.sum(), mask_BT.sum(), sums)


def nkd_rows(
    student_NV: Tensor,
    target_N: Target,
    gold_N: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
) -> Tensor:
    """NKD alone, [N] nats, without the cross-entropy it is added to."""
    gold_part_N, others_N = nkd_parts(student_NV, target_N, gold_N, temperature=temperature)
    return gold_part_N + gamma * temperature**2 * others_N


def nkd_parts(
    student_NV: Tensor, target_N: Target, gold_N: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(-T_t log S_t, -sum over i != t of T'_i log S'_i), [N] nats each.

    The second is 0 where 1 - T_t < 1e-4. It has no gradient in the gold logit and none at all where
    the student's other tokens stand to each other as the label's do. Over a `bucket` label the
    events are the listed tokens but gold, and "any other"; where gold is not listed it lies in the
    bucket, nobody knows with how much of it, and the listed tokens alone are compared [ours].
    """
    gold_p_N = gold_probability(target_N, gold_N).detach()
    z_NV = wide(student_NV)
    gold_p_N = gold_p_N.to(z_NV.dtype)
    log_gold_N = F.log_softmax(z_NV, dim=-1).gather(-1, gold_N[:, None]).squeeze(-1)
    log_q_NV = F.log_softmax(_without(z_NV / temperature, gold_N), dim=-1)
    if isinstance(target_N, SparseTarget) and target_N.tail == "bucket":
        check_temperature(target_N, temperature)
        log_p, log_q = _bucket_without(log_q_NV, target_N, gold_N)
    else:
        log_p = _without(log_probs(target_N, z_NV.shape[-1], temperature), gold_N)
        log_q = log_q_NV
    # Where nothing is left beside gold the softmax is NaN: choose before multiplying.
    kept_N1 = (1.0 - gold_p_N >= LEAST_REST)[:, None]
    p = torch.where(kept_N1, log_p.detach().softmax(-1), 0.0).to(log_q.dtype)
    others_N = -(p * torch.where(p > 0, log_q, 0.0)).sum(-1)
    return -gold_p_N * log_gold_N, others_N


def _without(log_NV: Tensor, gold_N: Tensor) -> Tensor:
    """-inf at the gold token, so that a softmax leaves it out; its gradient there is 0."""
    return log_NV.scatter(-1, gold_N[:, None], NEVER)


def _bucket_without(
    log_q_NV: Tensor, target_N: SparseTarget, gold_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Events of a bucket label without the gold token; log q sums to 1, p to what it holds."""
    probs_NK = target_N.probs_BTK.to(log_q_NV.dtype)
    is_gold_NK = (target_N.ids_BTK == gold_N[:, None]) & (probs_NK > 0)
    others_NK = probs_NK.masked_fill(is_gold_NK, 0.0)
    rest_N1 = 1.0 - probs_NK.sum(-1, keepdim=True)
    log_p, log_q = bucket_events(log_q_NV, target_N.ids_BTK, others_NK, rest_N1, left_out=1)
    unknown_NM = torch.zeros_like(log_p, dtype=torch.bool)
    unknown_NM[:, -1] = ~is_gold_NK.any(-1)
    log_q = F.log_softmax(log_q.masked_fill(unknown_NM, NEVER), dim=-1)
    return log_p.masked_fill(unknown_NM, NEVER), log_q
