"""Loss and gradient of a few rows of logits, in place: what the fast forms share.

A kernel gets logits `z` [c, V] in float32 (float64 in tests) that fit a processor's cache and are
its own to overwrite: on return they hold the gradient. Everything is per row, so that callers can
weigh rows; `token.ce_kd` is the definition.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llmkd.objectives.divergences import find_divergence
from llmkd.objectives.targets import check_temperature
from llmkd.objectives.token import mixed_rows
from llmkd.types import DenseLogits, HiddenTarget, SparseTarget, Target

SCRATCH_BYTES = 8 << 20  # what a thread keeps at most, of each of two kinds


@dataclass(frozen=True, slots=True)
class Settings:
    """(1 - kd_weight) CE + kd_weight * T**2 (where t2_scale) * divergence; see `token.ce_kd`."""

    kd_weight: float = 0.0
    divergence: str = "forward_kl"
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    t2_scale: bool = False
    options: dict[str, float] = field(default_factory=dict)

    @property
    def kd_factor(self) -> float:
        """What multiplies the divergence, T**2 included."""
        return self.kd_weight * (self.student_temperature**2 if self.t2_scale else 1.0)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the row values a kernel returns after the total."""
        return ("ce", find_divergence(self.divergence).metric, "teacher_entropy")


class RowValues(NamedTuple):
    """[c] nats each: the mixed loss, CE, the divergence, the teacher's entropy."""

    total: Tensor
    ce: Tensor
    divergence: Tensor
    entropy: Tensor


def ce_and_gradient(z_cV: Tensor, gold_c: Tensor) -> RowValues:
    """CE alone: gradient softmax - onehot."""
    gold_c1 = gold_c[:, None]
    gold_logit_c = z_cV.gather(-1, gold_c1).squeeze(-1)
    lse_c = softmax_(z_cV)
    z_cV.scatter_add_(-1, gold_c1, torch.full_like(gold_logit_c, -1.0)[:, None])
    ce_c = lse_c - gold_logit_c
    return RowValues(ce_c, ce_c, torch.zeros_like(ce_c), torch.zeros_like(ce_c))


def mix_and_gradient(
    z_cV: Tensor, target_c: Target, gold_c: Tensor, settings: Settings
) -> RowValues:
    """CE + divergence: by formula for forward KL at student temperature 1, else by autograd."""
    by_formula = settings.divergence == "forward_kl" and settings.student_temperature == 1.0
    if by_formula and isinstance(target_c, HiddenTarget):
        target_c = target_c.dense()
    if by_formula and isinstance(target_c, DenseLogits):
        return _dense_forward_kl(z_cV, target_c, gold_c, settings)
    if by_formula and isinstance(target_c, SparseTarget):
        return _sparse_forward_kl(z_cV, target_c, gold_c, settings)
    with torch.enable_grad():
        leaf_cV = z_cV.detach().clone().requires_grad_()
        values = mixed_rows(
            leaf_cV,
            target_c,
            gold_c,
            kd_weight=settings.kd_weight,
            divergence=settings.divergence,
            teacher_temperature=settings.teacher_temperature,
            student_temperature=settings.student_temperature,
            t2_scale=settings.t2_scale,
            **settings.options,
        )
        (gradient_cV,) = torch.autograd.grad(values[0].sum(), leaf_cV)
    z_cV.copy_(gradient_cV)
    return RowValues(*(value.detach() for value in values))


def softmax_(z_cV: Tensor) -> Tensor:
    """Turn logits into probabilities in place; returns their log-sum-exp [c] in nats.

    `torch.softmax` is one vectorised pass, twice as fast here as logsumexp, sub and exp; the
    log-sum-exp follows from the largest entry: max z = lse + log(max q).
    """
    top_c = z_cV.amax(-1)
    torch.softmax(z_cV, dim=-1, out=z_cV)
    return top_c - z_cV.amax(-1).log()


_local = threading.local()


def _scratch(name: str, like_cS: Tensor) -> Tensor:
    """Memory of that shape, the thread's own, used again: fresh pages cost more than the maths."""
    count = like_cS.numel()
    if like_cS.device.type != "cpu" or count * like_cS.element_size() > SCRATCH_BYTES:
        return torch.empty_like(like_cS, memory_format=torch.contiguous_format)
    held = getattr(_local, name, None)
    if held is None or held.numel() < count or held.dtype != like_cS.dtype:
        held = torch.empty(count, dtype=like_cS.dtype, device=like_cS.device)
        setattr(_local, name, held)
    return held[:count].view(like_cS.shape)


def _dense_forward_kl(
    z_cV: Tensor, target_c: DenseLogits, gold_c: Tensor, settings: Settings
) -> RowValues:
    """d CE / d z = q - onehot and d KD / d z = q - p, so the mix is (1 - w + f) q - f p - gold."""
    weight, factor, gold_c1 = settings.kd_weight, settings.kd_factor, gold_c[:, None]
    t_cS = target_c.logits_BTV[:, : target_c.shared].to(z_cV.dtype)
    if settings.teacher_temperature != 1.0:
        t_cS = t_cS / settings.teacher_temperature
    p_cS, work_cS = _scratch("p", t_cS), _scratch("work", t_cS)
    torch.softmax(t_cS, dim=-1, out=p_cS)
    lse_p_c = t_cS.amax(-1) - p_cS.amax(-1).log()
    # A teacher may rule a token out with -inf; 0 * -inf must count as 0.
    torch.clamp_min(t_cS, torch.finfo(t_cS.dtype).min, out=work_cS)
    mean_t_c = work_cS.mul_(p_cS).sum(-1)
    mean_z_c = torch.mul(p_cS, z_cV[:, : target_c.shared], out=work_cS).sum(-1)
    gold_logit_c = z_cV.gather(-1, gold_c1).squeeze(-1)
    lse_c = softmax_(z_cV)
    entropy_c = lse_p_c - mean_t_c
    ce_c, kd_c = lse_c - gold_logit_c, lse_c - mean_z_c
    if (share := 1.0 - weight + factor) != 1.0:
        z_cV.mul_(share)
    z_cV[:, : target_c.shared].sub_(p_cS, alpha=factor)
    if weight != 1.0:
        minus = torch.full_like(gold_logit_c, weight - 1.0)
        z_cV.scatter_add_(-1, gold_c1, minus[:, None])
    total_c = (1.0 - weight) * ce_c + factor * kd_c
    return RowValues(total_c, ce_c, kd_c - entropy_c, entropy_c)


def _sparse_forward_kl(
    z_cV: Tensor, target_c: SparseTarget, gold_c: Tensor, settings: Settings
) -> RowValues:
    """Forward KL from K listed tokens: beside CE's own passes only [c, K] work.

    renorm: d/dz = q - p on the listed. bucket, with r = 1 - sum over the listed: d/dz = q (1 -
    r_p / r_q) elsewhere and q - p on the listed. smooth: q - e elsewhere (e the even share of the
    tail), q - p on the listed.
    """
    check_temperature(target_c, settings.teacher_temperature)
    weight, factor, gold_c1 = settings.kd_weight, settings.kd_factor, gold_c[:, None]
    ids_cK, p_cK = target_c.ids_BTK, target_c.probs_BTK.to(z_cV.dtype)
    listed_cK = p_cK > 0
    if target_c.tail == "renorm":
        p_cK = p_cK / p_cK.sum(-1, keepdim=True)
    # in float64: what is left of 1 may be small against the rounding of the sum
    rest_p_c = (1.0 - p_cK.sum(-1, dtype=torch.float64)).clamp_min(0).to(p_cK.dtype)
    z_cK = z_cV.gather(-1, ids_cK)
    gold_logit_c = z_cV.gather(-1, gold_c1).squeeze(-1)
    even_c1 = torch.zeros_like(rest_p_c)[:, None]
    sum_z_c = torch.zeros_like(rest_p_c)
    if target_c.tail == "smooth":
        even_c1 = (rest_p_c / (target_c.shared - listed_cK.sum(-1)).clamp_min(1))[:, None]
        sum_z_c = z_cV[:, : target_c.shared].sum(-1)
    lse_c = softmax_(z_cV)
    tiny = torch.finfo(z_cV.dtype).tiny
    entropy_c = -(p_cK * p_cK.clamp_min(tiny).log()).sum(-1)
    slope_cK = even_c1 - p_cK  # what the listed get on top of their row's common gradient
    common_c1 = torch.ones_like(even_c1)
    q_cK = torch.zeros_like(p_cK)
    if target_c.tail == "bucket":
        q_cK = torch.where(listed_cK, z_cV.gather(-1, ids_cK), 0.0)
        # Summed, not 1 minus the others: that is 0 or noise once the student is sure.
        z_cV.scatter_add_(-1, ids_cK, -q_cK)
        rest_q_c = z_cV.sum(-1).clamp_min(tiny)
        log_rest_q_c, common_c = _bucket(p_cK, q_cK, rest_p_c, rest_q_c)
        kd_c = (p_cK * (lse_c[:, None] - z_cK)).sum(-1) - rest_p_c * log_rest_q_c
        entropy_c = entropy_c - rest_p_c * rest_p_c.clamp_min(tiny).log()
        common_c1 = common_c[:, None]
    else:
        even_c = even_c1.squeeze(-1)
        mean_z_c = ((p_cK - even_c1) * z_cK * listed_cK).sum(-1) + even_c * sum_z_c
        kd_c = lse_c - mean_z_c
        entropy_c = entropy_c - rest_p_c * even_c.clamp_min(tiny).log()
    z_cV.mul_(1.0 - weight + factor * common_c1)
    if target_c.tail == "smooth":
        z_cV[:, : target_c.shared].sub_(factor * even_c1)
    slope_cK = factor * slope_cK
    if target_c.tail == "bucket":  # the listed were taken out of z: give them all of theirs
        slope_cK = slope_cK + (1.0 - weight + factor) * q_cK
    z_cV.scatter_add_(-1, ids_cK, torch.where(listed_cK, slope_cK, 0.0))
    z_cV.scatter_add_(-1, gold_c1, torch.full_like(gold_logit_c, weight - 1.0)[:, None])
    ce_c = lse_c - gold_logit_c
    total_c = (1.0 - weight) * ce_c + factor * kd_c
    return RowValues(total_c, ce_c, kd_c - entropy_c, entropy_c)


def _bucket(
    p_cK: Tensor, q_cK: Tensor, rest_p_c: Tensor, rest_q_c: Tensor
) -> tuple[Tensor, Tensor]:
    """log r_q and 1 - r_p / r_q, the common slope of unlisted tokens; [c] each.

    What is listed says the same as the rest, r = 1 - sum, and whichever is small loses less in a
    logarithm or a difference: with 64 of 150,000 tokens listed both r lie near 1, and the rounding
    of their sums would be all of their difference.
    """
    listed_p_c = p_cK.sum(-1, dtype=torch.float64)
    listed_q_c = q_cK.sum(-1, dtype=torch.float64)
    rest_p_c, rest_q_c = rest_p_c.double(), rest_q_c.double()
    log_c = torch.where(listed_q_c < 0.5, torch.log1p(-listed_q_c.clamp_max(0.5)), rest_q_c.log())
    gap_c = torch.where(listed_p_c < 0.5, listed_p_c - listed_q_c, rest_q_c - rest_p_c)
    return log_c.to(p_cK.dtype), (gap_c / rest_q_c).to(p_cK.dtype)
