"""Divergences: values worked by hand, limits, slopes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.errors import RecipeError
from llmkd.objectives.divergences import DIVERGENCES, find_divergence
from llmkd.types import TAILS, DenseLogits, MixtureTarget, SparseTarget

F64 = torch.float64
P, Q = (0.9, 0.1), (0.5, 0.5)


def log(*rows):
    return torch.tensor(rows, dtype=F64).log()


def value(name, p=P, q=Q, **options):
    return DIVERGENCES[name].rows(log(p), log(q), **options).item()


# p = (.9, .1) the teacher, q = (.5, .5) the student; ln 1.8 = .5877867, ln .2 = -1.6094379
BY_HAND = [
    ("forward_kl", {}, 0.9 * math.log(1.8) + 0.1 * math.log(0.2)),  # .3680642
    ("soft_cross_entropy", {}, math.log(2)),
    ("reverse_kl", {}, 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5)),  # .5108256
    ("jeffreys", {}, 0.3680642 + 0.5108256),
    # m = (.7, .3): .5 (.9 ln(9/7) + .1 ln(1/3) + .5 ln(5/7) + .5 ln(5/3)) = .1017462
    (
        "js",
        {},
        0.5 * (0.9 * math.log(9 / 7) - 0.1 * math.log(3) + 0.5 * math.log(25 / 21)),
    ),
    # beta .1: m = .1 p + .9 q = (.54, .46)
    (
        "js",
        {"beta": 0.1},
        0.1 * (0.9 * math.log(0.9 / 0.54) + 0.1 * math.log(0.1 / 0.46))
        + 0.9 * (0.5 * math.log(0.5 / 0.54) + 0.5 * math.log(0.5 / 0.46)),
    ),
    # .1 p + .9 q = (.54, .46); .1 q + .9 p = (.86, .14)
    ("skew_kl", {}, 0.9 * math.log(0.9 / 0.54) + 0.1 * math.log(0.1 / 0.46)),
    ("skew_reverse_kl", {}, 0.5 * math.log(0.5 / 0.86) + 0.5 * math.log(0.5 / 0.14)),
    ("tvd", {}, 0.4),
]


@pytest.mark.parametrize("name, options, expected", BY_HAND)
def test_value_by_hand(name, options, expected):
    assert value(name, **options) == pytest.approx(expected, abs=1e-7)


def test_every_divergence_has_a_value_by_hand():
    assert {name for name, _, _ in BY_HAND} == set(DIVERGENCES)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_gradients_are_slopes(name):
    torch.manual_seed(0)
    log_p = torch.randn(3, 5, dtype=F64).log_softmax(-1)
    student = torch.randn(3, 5, dtype=F64, requires_grad=True)
    rows = DIVERGENCES[name].rows
    assert torch.autograd.gradcheck(lambda z: rows(log_p, z.log_softmax(-1)), student)


SPARSE = [
    (name, tail)
    for name, divergence in DIVERGENCES.items()
    for tail in TAILS
    if tail != "renorm" or not divergence.needs_everywhere({})
]


@pytest.mark.parametrize("name, tail", SPARSE)
def test_gradients_over_sparse_labels_are_slopes(name, tail):
    divergence = DIVERGENCES[name]
    torch.manual_seed(1)
    ids = torch.tensor([[4, 1, 0], [2, 3, 6]])
    probs = torch.tensor([[0.5, 0.2, 0.0], [0.3, 0.3, 0.1]], dtype=F64)  # one unused place
    target = SparseTarget(ids, probs, 7, tail)
    student = torch.randn(2, 9, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: divergence.of_rows(z, target), student)


DISTRIBUTIONS = st.tuples(st.integers(2, 30), st.sampled_from([0.3, 3.0, 30.0]), st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(DISTRIBUTIONS)
def test_bounds_limits_and_symmetry(case):
    size, spread, seed = case
    torch.manual_seed(seed)
    log_p, log_q = (spread * torch.randn(2, 4, size, dtype=F64)).log_softmax(-1)

    def rows(name, a=log_p, b=log_q, **options):
        return DIVERGENCES[name].rows(a, b, **options)

    for name in set(DIVERGENCES) - {"soft_cross_entropy"}:
        assert rows(name).min() >= -1e-12
    assert rows("js").max() <= math.log(2) + 1e-12
    assert rows("tvd").max() <= 1 + 1e-12
    for name in ("js", "jeffreys", "tvd"):
        torch.testing.assert_close(rows(name), rows(name, log_q, log_p), rtol=1e-9, atol=1e-12)
    same = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(rows("js", beta=0.0), rows("forward_kl"), **same)
    torch.testing.assert_close(rows("js", beta=1.0), rows("reverse_kl"), **same)
    torch.testing.assert_close(rows("skew_kl", skew=0.0), rows("forward_kl"), **same)
    torch.testing.assert_close(rows("skew_reverse_kl", skew=0.0), rows("reverse_kl"), **same)
    assert rows("skew_kl", skew=1.0).abs().max() == 0
    # Pinsker: TVD**2 <= KL / 2
    assert (rows("tvd") ** 2 <= rows("forward_kl") / 2 + 1e-12).all()


def test_js_over_beta_tends_to_forward_and_reverse_kl():
    """Divided by beta or 1 - beta: the limits that beta = 0 and 1 stand for."""
    assert value("js", beta=1e-6) / 1e-6 == pytest.approx(value("forward_kl"), rel=1e-4)
    assert value("js", beta=1 - 1e-6) / 1e-6 == pytest.approx(value("reverse_kl"), rel=1e-4)


def test_js_of_disjoint_distributions_is_ln_2():
    assert value("js", (1.0, 0.0), (0.0, 1.0)) == pytest.approx(math.log(2), abs=1e-12)
    assert value("tvd", (1.0, 0.0), (0.0, 1.0)) == 1.0


def test_jeffreys_is_twice_what_paddleclas_calls_js_and_has_no_bound():
    assert value("jeffreys", (1 - 1e-9, 1e-9), (1e-9, 1 - 1e-9)) > 40


def test_t2_keeps_the_gradient_when_the_temperature_grows():
    # Hinton et al. section 2: T**2 dKL/dz tends to (z - v) / V for logits with mean 0
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 1, 1, 6, dtype=F64)
    teacher, student = teacher - teacher.mean(), student - student.mean()
    student.requires_grad_()
    temperatures = {"teacher_temperature": 1e4, "student_temperature": 1e4}
    mask = torch.ones(1, 1, dtype=torch.bool)
    term = DIVERGENCES["forward_kl"](
        student, DenseLogits(teacher, 6), mask, **temperatures, t2_scale=True
    )
    (grad,) = torch.autograd.grad(term.total, student)
    # one T of the T**2 is the chain rule's 1 / T, the other the softmax's own flattening
    torch.testing.assert_close(grad, ((student - teacher) / 6).detach(), rtol=1e-3, atol=1e-4)


RENORM = SparseTarget(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]), 4, "renorm")
INFINITE = [
    ("reverse_kl", {}),
    ("jeffreys", {}),
    ("js", {"beta": 1.0}),
    ("skew_reverse_kl", {"skew": 0.0}),
]


@pytest.mark.parametrize("name, options", INFINITE)
def test_what_would_be_infinite_is_refused(name, options):
    for target in (RENORM, MixtureTarget((RENORM, RENORM), (0.5, 0.5))):
        with pytest.raises(RecipeError, match="infinite on labels"):
            DIVERGENCES[name].of_rows(torch.zeros(1, 4), target, **options)
    dense = DenseLogits(torch.zeros(1, 4), 4)
    mixed = MixtureTarget((RENORM, dense), (0.5, 0.5))
    assert DIVERGENCES[name].of_rows(torch.zeros(1, 4), mixed, **options).isfinite()


@pytest.mark.parametrize("name, options", INFINITE)
def test_what_would_be_infinite_is_conditioned_on_the_shared_entries(name, options):
    divergence = DIVERGENCES[name]
    torch.manual_seed(0)
    student, narrow, wide = (torch.randn(2, entries, dtype=F64) for entries in (12, 9, 12))
    dense = divergence.of_rows(student, DenseLogits(narrow, 9), **options)
    within = divergence.of_rows(student[:, :9], DenseLogits(narrow, 9), **options)
    torch.testing.assert_close(dense, within)
    # a mixture of teachers with 9 and 12 entries: within the 9 that all share
    parts = (DenseLogits(narrow, 9), DenseLogits(wide, 12))
    mixture = divergence.of_rows(student, MixtureTarget(parts, (0.5, 0.5)), **options)
    p = 0.5 * narrow.softmax(-1) + 0.5 * wide.softmax(-1)[:, :9]
    log_p = (p / p.sum(-1, keepdim=True)).log()
    by_hand = divergence.rows(log_p, student[:, :9].log_softmax(-1), **options)
    torch.testing.assert_close(mixture, by_hand)


def test_a_tail_that_rounded_to_nothing_is_not_impossible():
    for tail in ("bucket", "smooth"):
        target = SparseTarget(torch.tensor([[2, 0]]), torch.tensor([[0.75, 0.25]]), 4, tail)
        student = torch.zeros(1, 5, requires_grad=True)
        rows = DIVERGENCES["jeffreys"].of_rows(student, target)
        rows.sum().backward()
        assert rows.isfinite().all() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_tokens_that_both_rule_out_do_no_harm(name):
    ruled_out = torch.tensor([[0.0, 1.0, float("-inf"), float("-inf")]], dtype=F64)
    student = ruled_out.flip(-1).roll(2, -1).requires_grad_()  # (1, 0, -inf, -inf)
    rows = DIVERGENCES[name].of_rows(student, DenseLogits(ruled_out, 4))
    rows.sum().backward()
    small = DIVERGENCES[name].of_rows(student[:, :2], DenseLogits(ruled_out[:, :2], 2))
    torch.testing.assert_close(rows, small)
    assert student.grad[:, :2].isfinite().all() and student.grad[:, :2].abs().min() > 0


def test_settings_are_checked():
    target = DenseLogits(torch.zeros(1, 4), 4)
    for name, options in (
        ("js", {"beta": 1.5}),
        ("js", {"skew": 0.5}),
        ("skew_kl", {"skew": 1.0}),
        ("js", {"beta": math.nan}),
    ):
        with pytest.raises(RecipeError):
            DIVERGENCES[name].of_rows(torch.zeros(1, 4), target, **options)
    with pytest.raises(RecipeError, match="did you mean 'tvd'"):
        find_divergence("tv")
