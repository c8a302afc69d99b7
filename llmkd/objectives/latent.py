"""How far a student's insides lie from a teacher's: attention and hidden states, padding left out.

TinyBERT (arXiv 1909.10351) has them in this form and ERNIE-Tiny (arXiv 2106.02241) is believed to.
Letters beside the house's: A attention heads, D hidden size. Everything is a sum over counted
tokens: a token's own mean over heads, keys and entries is what a mean over a batch without padding
gives, and totals of micro-batches and ranks add up.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.objectives.targets import wide
from llmkd.types import LossTerm

ALMOST_NEVER = -1e30  # a score whose exponential is 0 and which arithmetic survives
RowForm = Callable[[Tensor, Tensor, Tensor], Tensor]


def hidden_mse(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor) -> LossTerm:
    """Mean over D of the squared difference, summed over the masked-in tokens.

    `student_BTD` is projected to the teacher's width already (TinyBERT, equation 8).
    """
    student_ND, teacher_ND = wide(student_BTD[mask_BT]), wide(teacher_BTD[mask_BT])
    total = (student_ND - teacher_ND.to(student_ND.dtype)).square().mean(-1).sum()
    return LossTerm(total, mask_BT.sum())


def attention_loss(
    student_BATT: Tensor,
    teacher_BATT: Tensor,
    mask_BT: Tensor,
    *,
    form: str,
    visible_BTT: Tensor | None = None,
) -> LossTerm:
    """Distance of attention from raw scores, head by head, summed over the masked-in queries.

    Scores are what a model's softmax gets, scaled but without its mask: row q, column k. A pair
    counts where query and key are masked in and `visible_BTT` (causal masks, windows; [B, 1 or A,
    T, T], any broadcastable shape) is true. Each query gives its mean over heads and keys
    (`mse_scores`, `mse_probs`) or its mean over heads of the sum over keys (`kl_probs`, nats).
    Raises RecipeError for an unknown `form`, ValueError for another number of heads.
    """
    if form not in ATTENTION_FORMS:
        near = difflib.get_close_matches(form, ATTENTION_FORMS, n=1)
        ways = [f"did you mean {match!r}?" for match in near]
        raise RecipeError.of("attn", form, "unknown", *ways, f"known: {', '.join(ATTENTION_FORMS)}")
    if student_BATT.shape[1] != teacher_BATT.shape[1]:
        heads = student_BATT.shape[1], teacher_BATT.shape[1]
        raise ValueError("attention of {} and of {} heads cannot be compared".format(*heads))
    pairs_BATT = (mask_BT[:, None, :, None] & mask_BT[:, None, None, :]).expand(
        -1, student_BATT.shape[1], -1, -1
    )
    if visible_BTT is not None:
        pairs_BATT = pairs_BATT & visible_BTT
    # Filled before the arithmetic, so that NaN outside changes neither loss nor gradient.
    student_BATT = wide(student_BATT).masked_fill(~pairs_BATT, 0.0)
    teacher_BATT = wide(teacher_BATT).masked_fill(~pairs_BATT, 0.0).to(student_BATT.dtype)
    queries_BAT = ATTENTION_FORMS[form](student_BATT, teacher_BATT, pairs_BATT)
    return LossTerm(queries_BAT.mean(1).sum(), mask_BT.sum())


def _mse_scores(student_BATT: Tensor, teacher_BATT: Tensor, pairs_BATT: Tensor) -> Tensor:
    """TinyBERT's: raw scores, before the softmax (equation 7)."""
    keys_BAT = pairs_BATT.sum(-1).clamp(min=1)
    return (student_BATT - teacher_BATT).square().sum(-1) / keys_BAT


def _mse_probs(student_BATT: Tensor, teacher_BATT: Tensor, pairs_BATT: Tensor) -> Tensor:
    keys_BAT = pairs_BATT.sum(-1).clamp(min=1)
    student_BATT, teacher_BATT = (
        _log_probs(scores, pairs_BATT).exp().masked_fill(~pairs_BATT, 0.0)
        for scores in (student_BATT, teacher_BATT)
    )
    return (student_BATT - teacher_BATT).square().sum(-1) / keys_BAT


def _kl_probs(student_BATT: Tensor, teacher_BATT: Tensor, pairs_BATT: Tensor) -> Tensor:
    """KL(teacher || student) of each query's distribution over keys, as in MiniLM."""
    log_p_BATT = _log_probs(teacher_BATT, pairs_BATT)
    log_q_BATT = _log_probs(student_BATT, pairs_BATT)
    terms_BATT = log_p_BATT.exp() * (log_p_BATT - log_q_BATT)
    return terms_BATT.masked_fill(~pairs_BATT, 0.0).sum(-1)


def _log_probs(scores_BATT: Tensor, pairs_BATT: Tensor) -> Tensor:
    return F.log_softmax(scores_BATT.masked_fill(~pairs_BATT, ALMOST_NEVER), dim=-1)


ATTENTION_FORMS: dict[str, RowForm] = {
    "mse_scores": _mse_scores,
    "mse_probs": _mse_probs,
    "kl_probs": _kl_probs,
}


def add_terms(terms: list[LossTerm]) -> LossTerm:
    """Terms over the same positions, one for each layer, as one: totals added, the count kept."""
    total = torch.stack([term.total for term in terms]).sum()
    return LossTerm(total, terms[0].count)
