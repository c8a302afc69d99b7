"""Losses on pairs: values by hand, the identities between them, and what their minima are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmkd.errors import RecipeError
from llmkd.objectives import PREFERENCE_LOSSES, find_preference_loss

F64 = torch.float64
EXTRA = {"robust_dpo": {"flip_rate": 0.2}}
NAMES = sorted(PREFERENCE_LOSSES)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def term(name, delta, logit, beta=0.5, **options):
    options = EXTRA.get(name, {}) | options
    return find_preference_loss(name).function(delta, logit, beta=beta, **options)


def gradient(name, delta, logit, beta=0.5, **options):
    delta = delta.clone().requires_grad_()
    return torch.autograd.grad(term(name, delta, logit, beta, **options).total, delta)[0]


def nll(z):
    return math.log1p(math.exp(-z))


P = 0.8
L = math.log(4)  # logit .8 = 1.3862944
# D = 1.4, beta .5: z = .7; p = .8
BY_HAND = [
    ("irepo", {}, (0.7 - L) ** 2),
    ("irepo_weighted", {}, 4 * 0.16 * (0.7 - L) ** 2),
    ("soft_dpo", {}, 0.8 * nll(0.7) + 0.2 * nll(-0.7)),
    ("dpo", {}, 0.4031860),
    ("ipo", {}, (1.4 - 1.0) ** 2),
    ("rebel", {}, (1.4 - 2 * L) ** 2),
    ("robust_dpo", {}, (0.8 * nll(0.7) - 0.2 * nll(-0.7)) / 0.6),
    # huber .5: |r| = .6862944 -> 2 * .5 * |r| - .25; rebel's r is twice that
    ("irepo", {"huber": 0.5}, L - 0.7 - 0.25),
    ("irepo_weighted", {"huber": 0.5}, 0.64 * (L - 0.95)),
    ("rebel", {"huber": 0.5}, 2 * (L - 0.7) - 0.25),
    ("ipo", {"huber": 0.5}, 0.16),
    ("ipo", {"huber": 0.1}, 2 * 0.1 * 0.4 - 0.01),
    # max_logit 1: p = sigma(1) = .7310586
    ("irepo", {"max_logit": 1.0}, 0.09),
    ("irepo_weighted", {"max_logit": 1.0}, 0.09 * 4 * 0.7310585786 * 0.2689414214),
    ("rebel", {"max_logit": 1.0}, 0.36),
    ("soft_dpo", {"max_logit": 1.0}, 0.7310585786 * nll(0.7) + 0.2689414214 * nll(-0.7)),
]


@pytest.mark.parametrize("name, options, expected", BY_HAND)
def test_value_by_hand(name, options, expected):
    one = term(name, f64(1.4), f64(L), **options)
    assert one.total.item() == pytest.approx(expected, abs=1e-7)
    two = term(name, f64(1.4, 1.4), f64(L, L), **options)  # a sum, never a mean
    assert two.total.item() == pytest.approx(2 * expected, abs=1e-7) and two.count.item() == 2


def test_every_loss_and_every_option_has_a_value_by_hand():
    tried = {name: {key for n, o, _ in BY_HAND if n == name for key in o} for name in NAMES}
    assert tried == {n: set(PREFERENCE_LOSSES[n].options) - {"flip_rate"} for n in NAMES}
    soft = {name for name in NAMES if PREFERENCE_LOSSES[name].wants_soft}
    assert soft == {"irepo", "irepo_weighted", "soft_dpo", "rebel"}
    assert PREFERENCE_LOSSES["robust_dpo"].options == ("flip_rate",)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_losses_that_want_soft_labels_read_the_size(name):
    delta = f64(0.3, -2.0)
    small, large = (term(name, delta, f64(*pair)).total for pair in ((0.1, -0.2), (3.0, -1.0)))
    assert (small != large).item() == PREFERENCE_LOSSES[name].wants_soft


def test_metrics_by_hand():
    # pair 1 agrees, 2 disagrees, 3 has a tied label, 4 a tied policy; beta .5
    delta, logit = f64(2.0, 3.0, 1.0, 0.0), f64(1.5, -1.0, 0.0, 2.0)
    for name in NAMES:
        sums = term(name, delta, logit).metrics
        assert sums["accuracy"].item() == 1 + 0 + 0.5 + 0.5
        assert sums["margin"].item() == 1.0 - 1.5
        assert sums["target"].item() == 4.5
        assert sums["squared_error"].item() == 0.5**2 + 2.5**2 + 0.5**2 + 2**2
    assert term("irepo", delta, logit, max_logit=1.0).metrics["target"].item() == 3.0


pairs = st.lists(st.tuples(st.floats(-50, 50), st.floats(-8, 8)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=30)
@given(pairs, st.sampled_from(NAMES), st.floats(0.01, 2.0))
def test_swapping_the_responses_changes_nothing(rows, name, beta):
    delta, logit = f64(*(d for d, _ in rows)), f64(*(one for _, one in rows))
    here, there = term(name, delta, logit, beta), term(name, -delta, -logit, beta)
    assert_close(here.total, there.total)
    assert_close(here.metrics, there.metrics)
    assert_close(gradient(name, delta, logit, beta), -gradient(name, -delta, -logit, beta))


@settings(deadline=None, max_examples=30)
@given(pairs, st.floats(0.01, 2.0))
def test_irepo_is_beta_squared_times_rebel(rows, beta):
    """Spec 5: gradient(iREPO) = beta^2 gradient(REBEL at eta = 1 / beta), under Huber too."""
    delta, logit = f64(*(d for d, _ in rows)), f64(*(one for _, one in rows))
    mine, theirs = (gradient(n, delta, logit, beta) for n in ("irepo", "rebel"))
    assert_close(mine, beta**2 * theirs)
    eta = 1 / beta
    assert_close(theirs, 2 * (delta - eta * logit))  # REBEL's own form, with its eta
    mine = gradient("irepo", delta, logit, beta, huber=1.5)
    assert_close(mine, beta**2 * gradient("rebel", delta, logit, beta, huber=1.5 / beta))


@pytest.mark.parametrize("beta, eps", [(0.1, 0.01), (0.5, 0.2), (1.0, 0.001)])
def test_ipo_is_irepo_on_one_vote_clipped(beta, eps):
    clip = math.log((1 - eps) / eps)
    tau = beta / (2 * clip)  # 1 / (2 tau) = logit(1 - eps) / beta
    delta, winner = f64(3.0, -1.0, 0.2, 40.0), f64(1.0, 1.0, -1.0, -1.0)
    mine = gradient("irepo", delta, clip * winner, beta)
    assert_close(mine, beta**2 * gradient("ipo", delta, winner, tau))
    assert_close(gradient("ipo", delta, winner, tau), 2 * (delta - winner * clip / beta))


@pytest.mark.parametrize("p", [0.5, 0.8, 0.01])
def test_soft_dpo_has_its_minimum_where_irepo_has_it(p):
    """Spec 5: zero gradient, second derivative p (1 - p) by beta D: irepo times p (1 - p) / 2."""
    beta, logit = 0.3, f64(math.log(p / (1 - p)))
    z = logit.clone().requires_grad_()
    loss = term("soft_dpo", z / beta, logit, beta).total
    (slope,) = torch.autograd.grad(loss, z, create_graph=True)
    (bend,) = torch.autograd.grad(slope, z)
    assert slope.item() == pytest.approx(0, abs=1e-15)
    assert bend.item() == pytest.approx(p * (1 - p), rel=1e-12)
    weighted = gradient("irepo_weighted", (logit + 1e-4) / beta, logit, beta)
    near = gradient("soft_dpo", (logit + 1e-4) / beta, logit, beta)
    assert_close(weighted, 8 * near, rtol=1e-3, atol=0)


def test_robust_dpo_is_clean_on_average():
    # z = .7, flips .2: .8 * loss(label right) + .2 * loss(label flipped) = -log sigma(.7)
    right = term("robust_dpo", f64(1.4), f64(1.0)).total
    flipped = term("robust_dpo", f64(1.4), f64(-1.0)).total
    assert (0.8 * right + 0.2 * flipped).item() == pytest.approx(0.40319, abs=5e-6)
    assert right.item() != pytest.approx(0.40319, abs=0.1)
    delta, logit = f64(1.4, -3.0), f64(2.0, 1.0)
    assert_close(
        term("robust_dpo", delta, logit, flip_rate=0.0).total, term("dpo", delta, logit).total
    )


def test_ties_of_hard_losses():
    tie = f64(0.0)
    for name in ("dpo", "robust_dpo"):  # half a win each
        value = term(name, f64(1.4), tie).total.item()
        assert value == pytest.approx((nll(0.7) + nll(-0.7)) / 2, abs=1e-12)
    assert term("ipo", f64(1.4), tie).total.item() == pytest.approx(1.96)


# A tabular softmax policy over K answers: the logits are its parameters, all pairs its data.


def all_pairs(values):
    i, j = torch.triu_indices(len(values), len(values), 1)
    return values[i] - values[j]


def minimise(name, logit, reference, beta):
    """Newton's method on the parameters; exact in one step where the loss is a square."""
    theta = reference.clone()

    def loss(parameters):
        delta = all_pairs(parameters.log_softmax(-1) - reference.log_softmax(-1))
        return term(name, delta, logit, beta).total

    for _ in range(1 if name in ("irepo", "irepo_weighted", "rebel") else 30):
        slope = torch.func.grad(loss)(theta)
        theta = theta - torch.linalg.pinv(torch.func.hessian(loss)(theta)) @ slope
    return theta.softmax(-1)


REWARD, START = f64(0.9, -0.4, 0.1, 1.5), f64(0.3, 0.0, -0.7, 0.2)


@pytest.mark.parametrize("name", ["irepo", "irepo_weighted", "rebel", "soft_dpo"])
def test_closed_form_on_a_tabular_policy(name):
    """With Bradley-Terry labels every soft loss ends at reference * exp(reward / beta)."""
    found = minimise(name, all_pairs(REWARD), START, beta=0.8)
    assert_close(found, (START + REWARD / 0.8).softmax(-1))


def test_minimisers_differ_where_no_policy_attains_the_labels():
    logit = all_pairs(REWARD) + f64(2.0, -2.0, 0.0, 1.0, 0.0, -1.0)  # cycles
    square, entropy = (minimise(name, logit, START, 0.8) for name in ("irepo", "soft_dpo"))
    assert_close(square, minimise("rebel", logit, START, 0.8))
    assert (square - entropy).abs().max() > 0.01


@pytest.mark.parametrize("name", ["irepo", "soft_dpo"])
def test_three_steps_on_the_previous_policy_are_one_at_a_third_of_beta(name):
    policy = START
    for _ in range(3):
        policy = minimise(name, all_pairs(REWARD), policy, beta=0.5).log()
    assert_close(policy.exp(), minimise(name, all_pairs(REWARD), START, beta=0.5 / 3))
    initial = minimise(name, all_pairs(REWARD), START, beta=0.5)  # reference: initial
    assert (policy.exp() - initial).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_no_number_is_lost_far_out(name):
    """Far beyond where sigma is 0 or 1 the value is right, and half precision is widened first."""
    delta, logit = f64(1e4, -1e4, 1e4, 0.0), f64(200.0, 200.0, -300.0, 0.0)
    exact = term(name, delta, logit)
    assert exact.total.isfinite() and gradient(name, delta, logit).isfinite().all()
    single = term(name, delta.float(), logit)  # a float64 column beside a float32 model
    assert single.total.dtype == torch.float32
    assert_close(single.total.double(), exact.total, rtol=1e-5, atol=1e-5)
    half = torch.tensor([300.0, -300.0], dtype=torch.bfloat16, requires_grad=True)
    value = term(name, half, torch.tensor([3.0, 1.0], dtype=torch.bfloat16))
    wide = term(name, half.detach().float(), torch.tensor([3.0, 1.0]))
    assert value.total.dtype == torch.float32 and torch.equal(value.total, wide.total)
    value.total.backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()


def test_certain_labels():
    """sigma(L) of 0 or 1: a cross-entropy takes it, a clamp or a weight of 0 makes it finite."""
    delta, sure = f64(1.4, -1.0), f64(math.inf, -math.inf)
    assert term("soft_dpo", delta, sure).total.item() == pytest.approx(nll(0.7) + nll(0.5))
    assert term("irepo", delta, sure, max_logit=1.0).total.item() == pytest.approx(0.09 + 0.25)
    assert term("irepo_weighted", delta, sure).total.item() == 0
    assert gradient("irepo_weighted", delta, sure).eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_pairs_and_no_gradient_into_labels(name):
    empty = torch.zeros(0, requires_grad=True)
    nothing = term(name, empty, torch.zeros(0))
    nothing.total.backward()
    assert nothing.total.item() == 0 and nothing.count.item() == 0 and empty.grad.shape == (0,)
    logit, delta = f64(1.0).requires_grad_(), f64(3.0).requires_grad_()
    one = term(name, delta, logit)
    one.total.backward()
    assert logit.grad is None and delta.grad.item() != 0
    assert not any(value.requires_grad for value in one.metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    logit = f64(1.0, -0.3, 2.0)
    delta = f64(0.4, 2.0, -3.0).requires_grad_()
    for options in ({}, {"huber": 0.7}) if "huber" in PREFERENCE_LOSSES[name].options else ({},):
        check = torch.autograd.gradcheck
        assert check(lambda d, o=options: term(name, d, logit, **o).total, delta)


def test_settings_are_checked():
    one = f64(1.0)
    for name, options in (
        ("irepo", {"beta": 0.0}),
        ("dpo", {"beta": math.nan}),
        ("irepo", {"huber": 0.0}),
        ("rebel", {"max_logit": -1.0}),
        ("robust_dpo", {"flip_rate": 0.5}),
        ("robust_dpo", {"flip_rate": -0.1}),
    ):
        with pytest.raises(RecipeError, match=next(iter(options))):
            term(name, one, one, **options)
    with pytest.raises(TypeError):
        find_preference_loss("robust_dpo").function(one, one, beta=0.1)  # it has no default
    with pytest.raises(ValueError, match=r"\(1,\).*\(1, 1\)"):
        term("irepo", one, one[:, None])
    with pytest.raises(RecipeError, match="did you mean 'soft_dpo'"):
        find_preference_loss("softdpo")
