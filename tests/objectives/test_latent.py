"""Latent losses: values by hand, the plain definition in loops, and what must change nothing.

What they owe to every caller (padding, NaN, sums, dtypes) is in `contracts/test_latent_contracts`.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from llmkd.errors import RecipeError
from llmkd.objectives.latent import ATTENTION_FORMS, add_terms, attention_loss, hidden_mse
from llmkd.types import LossTerm

F64 = torch.float64
B, A, T, D = 3, 2, 5, 4
FORMS = sorted(ATTENTION_FORMS)
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def maps():
    """Student and teacher scores, and a mask that pads row 0 on the right and row 1 on the left."""
    torch.manual_seed(0)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3:] = mask[1, :2] = False
    return *(torch.randn(2, B, A, T, T, dtype=F64) * 2), mask


def softmax_of(scores, keys):
    """The distribution over `keys` in plain arithmetic, {key: probability}."""
    weights = {k: math.exp(scores[k].item()) for k in keys}
    return {k: weight / sum(weights.values()) for k, weight in weights.items()}


def one_query(form, student, teacher, keys):
    """What one query of one head gives: the definition."""
    if form == "mse_scores":
        return sum((student[k] - teacher[k]).item() ** 2 for k in keys) / len(keys)
    q, p = softmax_of(student, keys), softmax_of(teacher, keys)
    if form == "mse_probs":
        return sum((q[k] - p[k]) ** 2 for k in keys) / len(keys)
    return sum(p[k] * math.log(p[k] / q[k]) for k in keys)


def naive(form, student, teacher, mask, visible=None):
    """Over rows, queries and heads in loops."""
    total = 0.0
    for b in range(len(mask)):
        for q in range(mask.shape[1]):
            if not mask[b, q]:
                continue
            for a in range(student.shape[1]):
                keys = [k for k in range(mask.shape[1]) if mask[b, k]]
                if visible is not None:
                    keys = [k for k in keys if visible[b, a, q, k]]
                if keys:
                    total += one_query(form, student[b, a, q], teacher[b, a, q], keys)
    return total / student.shape[1]


def test_hidden_by_hand():
    # token 0: (1 + 4) / 2 = 2.5; token 1 is padding; token 2: (9 + 1) / 2 = 5
    student = torch.tensor([[[1.0, 2.0], [50.0, 50.0], [3.0, 0.0]]])
    teacher = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    term = hidden_mse(student, teacher, torch.tensor([[True, False, True]]))
    assert term.total.item() == 7.5 and term.count.item() == 2


def test_hidden_is_its_loop():
    torch.manual_seed(1)
    student, teacher = torch.randn(2, B, T, D, dtype=F64)
    mask = torch.rand(B, T) > 0.4
    total = sum(
        (student[b, t, d] - teacher[b, t, d]).item() ** 2 / D
        for b in range(B)
        for t in range(T)
        for d in range(D)
        if mask[b, t]
    )
    term = hidden_mse(student, teacher, mask)
    assert term.total.item() == pytest.approx(total, rel=1e-12)
    assert term.count.item() == mask.sum().item() and 0 < term.count.item() < B * T


LN3 = math.log(3.0)
# One head, two tokens and one of padding. Query 0: student scores (0, 0), teacher's (ln 3, 0):
# probabilities (1/2, 1/2) and (3/4, 1/4). Query 1: both (1, 1).
BY_HAND = {
    "mse_scores": LN3**2 / 2,
    "mse_probs": (0.25**2 + 0.25**2) / 2,
    "kl_probs": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
}


@every_form
def test_attention_by_hand(form):
    student = torch.tensor([[[[0.0, 0.0, 7.0], [1.0, 1.0, 7.0], [7.0, 7.0, 7.0]]]])
    teacher = torch.tensor([[[[LN3, 0.0, -9.0], [1.0, 1.0, -9.0], [-9.0, 3.0, 2.0]]]])
    term = attention_loss(student, teacher, torch.tensor([[True, True, False]]), form=form)
    assert term.total.item() == pytest.approx(BY_HAND[form], rel=1e-6)
    assert term.count.item() == 2
    # a second head that agrees halves the mean over heads
    two = (torch.cat([x, teacher], dim=1) for x in (student, teacher))
    term = attention_loss(*two, torch.tensor([[True, True, False]]), form=form)
    assert term.total.item() == pytest.approx(BY_HAND[form] / 2, rel=1e-6)


@every_form
@pytest.mark.parametrize("view", [None, "causal", "window of each head", "nothing"])
def test_attention_is_its_loop(form, view, maps):
    student, teacher, mask = maps
    place = torch.arange(T)
    near = (place[:, None] - place).abs()
    visible = {
        None: None,
        "causal": torch.ones(T, T).tril().bool()[None, None],
        "window of each head": torch.stack([near <= 1, near <= 2])[None],
        "nothing": torch.zeros(1, 1, T, T, dtype=torch.bool),
    }[view]
    found = attention_loss(student, teacher, mask, form=form, visible_BTT=visible)
    whole = None if visible is None else visible.expand(B, A, T, T)
    assert found.total.item() == pytest.approx(
        naive(form, student, teacher, mask, whole), rel=1e-12
    )
    assert (found.total.item() > 0.01) is (view != "nothing")
    assert found.count.item() == mask.sum().item()


@every_form
def test_gradients_are_right(form, maps):
    student, teacher, mask = maps
    student = student[:2, :, :4, :4].clone().requires_grad_()
    teacher, mask = teacher[:2, :, :4, :4], mask[:2, :4]
    causal = torch.ones(1, 1, 4, 4).tril().bool()
    for visible in (None, causal):
        assert torch.autograd.gradcheck(
            lambda x, seen=visible: (
                attention_loss(x, teacher, mask, form=form, visible_BTT=seen).total
            ),
            student,
        )


@every_form
def test_equal_scores_have_no_loss_and_no_gradient(form, maps):
    student = maps[0].float().requires_grad_()
    term = attention_loss(student, maps[0].float(), maps[2], form=form)
    term.total.backward()
    assert term.total.item() == 0
    assert student.grad.abs().max() < (1e-7 if form == "kl_probs" else 1e-30)


@pytest.mark.parametrize("form", ["mse_probs", "kl_probs"])
def test_probabilities_do_not_see_a_constant_added_to_a_querys_scores(form, maps):
    student, teacher, mask = maps
    moved = student + torch.randn(B, A, T, 1, dtype=F64) * 5
    one, two = (attention_loss(x, teacher, mask, form=form).total for x in (student, moved))
    assert_close(one, two)
    raw = [attention_loss(x, teacher, mask, form="mse_scores").total for x in (student, moved)]
    assert (raw[0] - raw[1]).abs() > 1  # while scores do


@every_form
def test_heads_in_another_order_in_both_change_nothing_in_one_they_do(form, maps):
    student, teacher, mask = maps
    plain = attention_loss(student, teacher, mask, form=form).total
    both = attention_loss(student.flip(1), teacher.flip(1), mask, form=form).total
    one = attention_loss(student.flip(1), teacher, mask, form=form).total
    assert_close(both, plain)
    assert (one - plain).abs() > 1e-3 * plain


@every_form
def test_extreme_scores_stay_finite(form):
    """Float32 scores of a sure teacher and a student that is sure of something else."""
    sure = torch.eye(4).expand(1, 1, 4, 4) * 1e4
    student = sure.flip(-1).clone().requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    term = attention_loss(student, sure, mask, form=form)
    term.total.backward()
    assert term.total.isfinite() and term.total > 0 and student.grad.isfinite().all()


def test_the_kl_is_the_teachers_to_the_student_and_not_symmetric():
    # (3/4, 1/4) from (1/2, 1/2): .75 ln 1.5 + .25 ln .5; back: .5 ln (2/3) + .5 ln 2
    even, uneven = torch.zeros(1, 1, 2, 2), torch.tensor([LN3, 0.0]).expand(1, 1, 2, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    there = attention_loss(even, uneven, mask, form="kl_probs").total.item() / 2
    back = attention_loss(uneven, even, mask, form="kl_probs").total.item() / 2
    assert there == pytest.approx(0.1308121, abs=1e-6)
    assert back == pytest.approx(0.1438410, abs=1e-6)


def test_layers_add_up_over_the_same_tokens():
    terms = [LossTerm(torch.tensor(float(n)), torch.tensor(7)) for n in (1, 2, 4)]
    whole = add_terms(terms)
    assert whole.total.item() == 7 and whole.count.item() == 7


def test_an_unknown_form_is_refused_with_the_nearest_name(maps):
    student, teacher, mask = maps
    with pytest.raises(RecipeError, match=r"(?s)^attn: .*mse_score'.*mean 'mse_scores'"):
        attention_loss(student, teacher, mask, form="mse_score")


def test_unequal_heads_cannot_be_compared(maps):
    student, teacher, mask = maps
    with pytest.raises(ValueError, match="of 1 and of 2 heads"):
        attention_loss(student[:, :1], teacher, mask, form="mse_scores")
