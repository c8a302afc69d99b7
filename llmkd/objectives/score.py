"""Losses of a scorer: the level token's distribution, and the order of pairs (DeQA-Score,
arXiv 2501.11561; the official code's numbers unless said otherwise).

`logits_NV` are those that predict the level token, one row a rated input; `level_ids_L` the levels'
token ids, in the order of the targets and values. N rows, P pairs, L levels, V vocabulary. `total`
is a sum over `count` rows or pairs; the official code averages each loss over the batch and adds
1.0 fidelity + .05 [(CE + KL) of A + (CE + KL) of B].
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.objectives.registry import near_names
from llmkd.objectives.targets import wide
from llmkd.types import LossTerm

EPS = 1e-8  # official, in roots and in variances
ROOT2 = math.sqrt(2.0)

StdMode = Literal["fixed1", "pred", "pred_detached", "target"]
STD_MODES: tuple[StdMode, ...] = ("fixed1", "pred", "pred_detached", "target")
BinaryForm = Literal["fidelity", "bce"]


class LevelMoments(NamedTuple):
    """Mean and standard deviation [N] in the values' unit, and the probabilities [N, L] they came
    from, where known.
    """

    mean_N: Tensor
    std_N: Tensor
    probs_NL: Tensor | None = None

    def take(self, rows_P: Tensor) -> LevelMoments:
        """The rows numbered `rows_P`: one side of pairs."""
        probs_NL = None if self.probs_NL is None else self.probs_NL.index_select(0, rows_P)
        mean_P, std_P = (x.index_select(0, rows_P) for x in (self.mean_N, self.std_N))
        return LevelMoments(mean_P, std_P, probs_NL)


def level_kl(
    logits_NV: Tensor, target_NL: Tensor, level_ids_L: Tensor, closed_set: bool = False
) -> LossTerm:
    """sum_i t_i (log t_i - log q_i) at the level token, nats, with 0 log 0 = 0.

    q is the softmax over the whole vocabulary, so that probability also moves onto the levels (the
    official code), or with `closed_set` over the levels alone. Targets need not sum to one: the
    gradient by the logits is then (sum t) q - t and the loss may lie below 0. Metrics:
    `level_mass`, the vocabulary's probability on the levels, and `target_mass`, sum t.
    """
    log_q_NV = F.log_softmax(wide(logits_NV), dim=-1)
    open_NL = log_q_NV.index_select(-1, level_ids_L)
    if target_NL.shape != open_NL.shape:  # [1, L] would be broadcast over all rows
        shapes = tuple(target_NL.shape), tuple(open_NL.shape)
        raise ValueError("targets are {}, the levels' logits {}".format(*shapes))
    target_NL = target_NL.detach().to(open_NL.dtype)
    log_q_NL = F.log_softmax(open_NL, dim=-1) if closed_set else open_NL
    cross_NL = torch.where(target_NL > 0, target_NL * log_q_NL, 0.0)  # 0 * -inf is no number
    loss_N = (torch.xlogy(target_NL, target_NL) - cross_NL).sum(-1)
    sums = {"level_mass": open_NL.detach().exp().sum(), "target_mass": target_NL.sum()}
    return LossTerm(loss_N.sum(), _count(loss_N), sums)


def level_moments(
    logits_NV: Tensor, level_ids_L: Tensor, values_L: Tensor, closed_set: bool = True
) -> LevelMoments:
    """The score sum p v, its std and p: a softmax over the levels' logits.

    Without `closed_set` p are the vocabulary's probabilities of the levels, which sum to less than
    one (the official option); mean and std are then drawn towards 0. The std of a scorer that is
    certain is 1e-19 rather than 0 in float32, for the sake of its gradient.
    """
    logits_NV = wide(logits_NV)
    if closed_set:
        probs_NL = F.softmax(logits_NV.index_select(-1, level_ids_L), dim=-1)
    else:
        probs_NL = F.softmax(logits_NV, dim=-1).index_select(-1, level_ids_L)
    values_L = values_L.to(probs_NL)
    mean_N = probs_NL @ values_L
    variance_N = (probs_NL * (values_L - mean_N[:, None]).square()).sum(-1)
    std_N = variance_N.clamp_min(torch.finfo(variance_N.dtype).tiny).sqrt()
    return LevelMoments(mean_N, std_N, probs_NL)


def fidelity(
    pred_a: LevelMoments,
    pred_b: LevelMoments,
    target_a: LevelMoments,
    target_b: LevelMoments,
    *,
    std_mode: StdMode = "fixed1",
) -> LossTerm:
    """1 - sqrt(g p + eps) - sqrt((1 - g)(1 - p) + eps), eps = 1e-8, of Thurstone's probability that
    A is rated above B: g = Phi((m_A - m_B) / sqrt(s_A^2 + s_B^2 + eps)) of the raters, p of the
    model.

    Scale-free in the targets, which may stay in the raters' unit; both of a pair must be from one
    scale. The spread under p is, by `std_mode`: `fixed1` 1 for each (as the official scripts set,
    no eps: asks for gaps in units of 1, not of the raters' spread), `pred` the model's (as the
    paper), `pred_detached` that without gradient, `target` the raters', which then must be in the
    levels' unit. Slightly below 0 at the minimum (-1e-4 where g is 0 or 1). Metric `order`: pairs
    in the raters' order, a tie on either side counts half.
    """
    check_std_mode(std_mode)
    _same_shape(pred_a.mean_N, pred_b.mean_N, target_a.mean_N, target_b.mean_N)
    gap_P = wide(pred_a.mean_N) - wide(pred_b.mean_N)
    with torch.no_grad():
        target_gap_P = _like(target_a.mean_N, gap_P) - _like(target_b.mean_N, gap_P)
        target_spread_P = _spread(_like(target_a.std_N, gap_P), _like(target_b.std_N, gap_P))
        target_z_P = target_gap_P / target_spread_P
    if std_mode == "fixed1":
        z_P = gap_P / ROOT2
    elif std_mode == "target":
        z_P = gap_P / target_spread_P
    else:
        spread_P = _spread(_like(pred_a.std_N, gap_P), _like(pred_b.std_N, gap_P))
        z_P = gap_P / (spread_P.detach() if std_mode == "pred_detached" else spread_P)
    above_P = (torch.special.ndtr(target_z_P) * torch.special.ndtr(z_P) + EPS).sqrt()
    below_P = (torch.special.ndtr(-target_z_P) * torch.special.ndtr(-z_P) + EPS).sqrt()
    loss_P = 1.0 - above_P - below_P
    return LossTerm(loss_P.sum(), _count(loss_P), _order(gap_P, target_gap_P))


def binary_rating(
    mean_a_P: Tensor,
    mean_b_P: Tensor,
    target_a_P: Tensor,
    target_b_P: Tensor,
    *,
    form: BinaryForm = "fidelity",
    half_ties: bool = False,
) -> LossTerm:
    """For raters without a spread: g is 1 where A's target is above B's, else 0, and
    p = Phi((mean_A - mean_B) / sqrt(2)).

    `fidelity`: 1 - sqrt of the p of the one rated above; `bce`: minus its log, nats. Equal targets
    count as B rated above A, as in the official code, or with `half_ties` as half a win for each,
    so that the order of a pair says nothing. Metric `order` as in `fidelity`.
    """
    if form not in ("fidelity", "bce"):
        raise RecipeError.of("form", form, "must be fidelity or bce")
    _same_shape(mean_a_P, mean_b_P, target_a_P, target_b_P)
    gap_P = wide(mean_a_P) - wide(mean_b_P)
    target_gap_P = _like(target_a_P, gap_P).detach() - _like(target_b_P, gap_P).detach()
    share_P = (target_gap_P > 0).to(gap_P.dtype)
    if half_ties:
        share_P = torch.where(target_gap_P == 0, 0.5, share_P)
    log_p_P, log_other_P = (torch.special.log_ndtr(side / ROOT2) for side in (gap_P, -gap_P))
    if form == "bce":
        loss_P = -share_P * log_p_P - (1.0 - share_P) * log_other_P
    else:  # the root by its logarithm: its slope stays finite where p rounds to 0
        roots_P = (0.5 * log_p_P).exp(), (0.5 * log_other_P).exp()
        loss_P = 1.0 - share_P * roots_P[0] - (1.0 - share_P) * roots_P[1]
    return LossTerm(loss_P.sum(), _count(loss_P), _order(gap_P, target_gap_P))


def in_level(
    logits_NV: Tensor, level_ids_L: Tensor, *, bound: float = 0.01, batchwise: bool = False
) -> LossTerm:
    """max(bound, 1 - the vocabulary's probability of the levels): no gradient once `bound` is met.

    By row, or with `batchwise` on the mean of the N rows given (the official code, where the bound
    lets sure rows make up for others); `total` is N times that. Metric `level_mass`.
    """
    if not 0.0 <= bound < 1.0:
        raise RecipeError.of("bound", bound, "must lie in [0, 1)", "default: 0.01")
    probs_NV = F.softmax(wide(logits_NV), dim=-1)
    mass_N = probs_NV.index_select(-1, level_ids_L).sum(-1)
    outside_N = 1.0 - mass_N
    if batchwise and len(mass_N):
        total = outside_N.mean().clamp_min(bound) * len(mass_N)
    else:
        total = outside_N.clamp_min(bound).sum()
    return LossTerm(total, _count(mass_N), {"level_mass": mass_N.detach().sum()})


def check_std_mode(std_mode: str, *, key: str = "std_mode") -> None:
    """RecipeError with the nearest name for a std_mode there is not."""
    if std_mode not in STD_MODES:
        ways = near_names(std_mode, dict.fromkeys(STD_MODES))
        raise RecipeError.of(key, std_mode, "there is no such std_mode", *ways)


def _spread(std_a_P: Tensor, std_b_P: Tensor) -> Tensor:
    return (std_a_P.square() + std_b_P.square() + EPS).sqrt()


def _like(values: Tensor, model_P: Tensor) -> Tensor:
    return values.to(device=model_P.device, dtype=model_P.dtype)


def _same_shape(*tensors: Tensor) -> None:
    shapes = [tuple(one.shape) for one in tensors]
    if len(set(shapes)) != 1:  # [P] and [P, 1] would be broadcast to P^2 pairs
        raise ValueError(f"means of pairs differ in shape: {shapes}")


def _order(gap_P: Tensor, target_gap_P: Tensor) -> dict[str, Tensor]:
    agree_P = torch.sign(gap_P.detach()) * torch.sign(target_gap_P)
    return {"order": (0.5 + 0.5 * agree_P).sum()}


def _count(loss_N: Tensor) -> Tensor:
    return torch.tensor(loss_N.numel(), device=loss_N.device)
