"""Score losses: values by hand, torch's own forms, the official formulas, and their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmkd.errors import RecipeError
from llmkd.objectives.score import (
    STD_MODES,
    LevelMoments,
    binary_rating,
    fidelity,
    in_level,
    level_kl,
    level_moments,
)

F64 = torch.float64
IDS = torch.tensor([7, 2, 5])  # good, fair, bad among a vocabulary of 9
VALUES = torch.tensor([3.0, 2.0, 1.0], dtype=F64)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def moments(mean, std):
    return LevelMoments(f64(*mean), f64(*std))


def random_logits(rows=4, seed=0, dtype=F64):
    return torch.randn(rows, 9, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def phi(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def plain_fidelity(pred, target, mode):
    """One pair ((m, s) of A, (m, s) of B) on each side, as the spec writes it."""
    (a, sa), (b, sb) = pred
    (ta, tsa), (tb, tsb) = target
    g = phi((ta - tb) / math.sqrt(tsa**2 + tsb**2 + 1e-8))
    under = {
        "fixed1": math.sqrt(2),
        "pred": math.sqrt(sa**2 + sb**2 + 1e-8),
        "pred_detached": math.sqrt(sa**2 + sb**2 + 1e-8),
        "target": math.sqrt(tsa**2 + tsb**2 + 1e-8),
    }[mode]
    p = phi((a - b) / under)
    return 1 - math.sqrt(p * g + 1e-8) - math.sqrt((1 - p) * (1 - g) + 1e-8)


# --- the level token


def test_level_kl_by_hand():
    logits = torch.zeros(1, 4, dtype=F64)
    logits[0, 0] = math.log(2)  # q = .4 .2 .2 .2
    target, ids = f64(0.5, 0.5, 0.0)[None], torch.tensor([0, 1, 2])
    open_set = level_kl(logits, target, ids)
    by_hand = 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.2)
    assert open_set.total.item() == pytest.approx(by_hand)
    closed = level_kl(logits, target, ids, closed_set=True)  # q = .5 .25 .25
    assert closed.total.item() == pytest.approx(0.5 * math.log(2))
    for term in (open_set, closed):
        assert term.count.item() == 1
        assert term.metrics["level_mass"].item() == pytest.approx(0.8)
        assert term.metrics["target_mass"].item() == pytest.approx(1.0)


def test_level_kl_is_a_sum_over_rows_and_torchs_kl_div():
    logits = random_logits()
    target = torch.tensor([[0.2, 0.8, 0.0], [1, 0, 0], [0.3, 0.3, 0.4], [0.5, 0.5, 0.0559]])
    target = target.double()  # the last row sums to 1.0559, as official labels do
    full = torch.zeros_like(logits).index_copy(1, IDS, target)
    torchs = F.kl_div(logits.log_softmax(-1), full, reduction="batchmean")
    term = level_kl(logits, target, IDS)
    assert_close(term.total, 4 * torchs)
    closed = F.kl_div(logits[:, IDS].log_softmax(-1), target, reduction="sum")
    assert_close(level_kl(logits, target, IDS, closed_set=True).total, closed)
    assert term.count.item() == 4
    assert term.metrics["target_mass"].item() == pytest.approx(4.0559)


@pytest.mark.parametrize("closed_set", [False, True])
def test_level_kl_gradient_is_mass_times_q_minus_t(closed_set):
    logits = random_logits(1).requires_grad_()
    target = f64(0.7, 0.31, 0.0)[None]
    (grad,) = torch.autograd.grad(level_kl(logits, target, IDS, closed_set).total, logits)
    wanted = torch.zeros(1, 9, dtype=F64)
    if closed_set:
        wanted[:, IDS] = 1.01 * logits[:, IDS].softmax(-1) - target
    else:
        wanted = 1.01 * logits.softmax(-1)
        wanted[:, IDS] -= target
    assert_close(grad, wanted.detach())


def test_level_kl_survives_impossible_tokens():
    logits = torch.full((1, 9), -math.inf)
    logits[0, 7], logits[0, 2] = 0.0, 0.0
    logits.requires_grad_()
    for closed_set in (False, True):
        term = level_kl(logits, torch.tensor([[0.5, 0.5, 0.0]]), IDS, closed_set)
        assert term.total.item() == pytest.approx(0.0, abs=1e-6)
        (grad,) = torch.autograd.grad(term.total, logits)
        assert grad.isfinite().all()
    # Where softmax and then log, as released, gives infinity: q underflows in float32.
    far = torch.zeros(1, 9)
    far[0, 0] = 200.0
    assert level_kl(far, torch.tensor([[1.0, 0, 0]]), IDS).total.item() == pytest.approx(200)


def test_level_kl_has_no_gradient_to_its_target_and_wants_one_a_row():
    target = f64(0.5, 0.5, 0.0)[None].requires_grad_()
    assert not level_kl(random_logits(1), target, IDS).total.requires_grad
    with pytest.raises(ValueError, match="targets are"):
        level_kl(random_logits(2), target, IDS)


def test_a_matching_scorer_has_no_kl():
    target = f64(0.6, 0.3, 0.1)[None]
    logits = torch.full((1, 9), -1e4, dtype=F64)
    logits[:, IDS] = target.log()
    assert level_kl(logits, target, IDS).total.item() == pytest.approx(0, abs=1e-12)


def test_bfloat16_logits_are_computed_in_float32():
    logits = random_logits(dtype=torch.bfloat16)
    target = torch.full((4, 3), 1 / 3)
    assert_close(level_kl(logits, target, IDS).total, level_kl(logits.float(), target, IDS).total)
    assert level_moments(logits, IDS, VALUES).mean_N.dtype == torch.float32


def test_level_moments_by_hand():
    logits = torch.zeros(2, 9, dtype=F64)
    logits[0, IDS] = f64(0.5, 0.25, 0.25).log()
    mean, std, probs = level_moments(logits, IDS, VALUES)
    assert_close(mean, f64(2.25, 2.0))
    assert_close(std, f64(0.6875, 2 / 3).sqrt())
    assert_close(probs, torch.stack((f64(0.5, 0.25, 0.25), f64(1, 1, 1) / 3)))
    open_set = level_moments(logits[1:], IDS, VALUES, closed_set=False)  # 1/9 each
    assert_close(open_set.mean_N, f64(6 / 9))
    spread = sum((v - 6 / 9) ** 2 for v in (3, 2, 1)) / 9
    assert_close(open_set.std_N, f64(spread).sqrt())
    taken = level_moments(logits, IDS, VALUES).take(torch.tensor([1, 1, 0]))
    assert_close(taken.mean_N, f64(2.0, 2.0, 2.25))
    assert_close(taken.probs_NL[2], probs[0])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_certain_scorer_has_finite_gradients(dtype):
    logits = torch.zeros(2, 9, dtype=dtype)
    logits[:, 7], logits[1, 2] = 1e4, 2e4
    logits.requires_grad_()
    certain = level_moments(logits, IDS, VALUES)
    assert certain.std_N.max().item() < 1e-15
    a, b = (certain.take(torch.tensor([row])) for row in (0, 1))
    targets = moments([2.0], [0.3]), moments([2.5], [0.4])
    for mode in STD_MODES:
        total = fidelity(a, b, *targets, std_mode=mode).total
        (grad,) = torch.autograd.grad(total, logits, retain_graph=True)
        assert grad.isfinite().all()
    for form in ("fidelity", "bce"):
        total = binary_rating(a.mean_N, b.mean_N, *(t.mean_N for t in targets), form=form).total
        assert torch.autograd.grad(total, logits, retain_graph=True)[0].isfinite().all()


def test_in_level_by_hand():
    logits = torch.zeros(2, 9, dtype=F64)
    logits[0, IDS] = math.log(2)  # mass 6/12
    logits[1, IDS] = 20.0
    term = in_level(logits, IDS)
    assert term.total.item() == pytest.approx(0.5 + 0.01) and term.count.item() == 2
    assert term.metrics["level_mass"].item() == pytest.approx(1.5, abs=1e-7)
    batch = in_level(logits, IDS, batchwise=True)  # max(.01, mean(.5, 0)) twice
    assert batch.total.item() == pytest.approx(0.5, abs=1e-7)
    met = in_level(logits[1:].requires_grad_(), IDS, batchwise=True)
    assert met.total.item() == pytest.approx(0.01)
    assert in_level(logits[:0], IDS, batchwise=True).total.item() == 0
    with pytest.raises(RecipeError, match="bound"):
        in_level(logits, IDS, bound=1.0)


def test_in_level_pushes_only_above_its_bound():
    logits = torch.zeros(2, 9, dtype=F64)
    logits[1, IDS] = 20.0
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(in_level(logits, IDS).total, logits)
    assert (grad[0, IDS] < 0).all() and (grad[1] == 0).all()


# --- pairs

PAIRS = [
    (((3.1, 0.7), (2.2, 0.5)), ((4.0, 0.6), (2.0, 0.8))),
    (((1.1, 0.1), (4.2, 0.3)), ((4.0, 0.6), (3.9, 0.8))),
    (((2.0, 0.4), (2.0, 0.4)), ((2.0, 0.0), (2.5, 0.0))),
]


@pytest.mark.parametrize("mode", STD_MODES)
def test_fidelity_is_its_formula(mode):
    def side(which, place):
        return moments(*zip(*(pair[which][place] for pair in PAIRS), strict=True))

    sides = [side(which, place) for which in (0, 1) for place in (0, 1)]
    term = fidelity(*sides, std_mode=mode)
    wanted = sum(plain_fidelity(*pair, mode) for pair in PAIRS)
    assert term.total.item() == pytest.approx(wanted, abs=1e-12)
    assert term.count.item() == 3
    assert term.metrics["order"].item() == 1 + 0 + 0.5


def test_fidelity_of_a_match_is_slightly_below_zero():
    """Golden (spec 5): -2e-8 at p = .3, -1e-4 at 0 and 1. So the loss is not >= 0."""
    z = -0.5244005127080407  # Phi = .3
    spread = math.sqrt(0.5 - 0.5e-8)  # s_A^2 + s_B^2 + eps = 1
    side = moments([z], [spread]), moments([0.0], [spread])
    value = fidelity(*side, *side, std_mode="pred").total.item()
    assert value == pytest.approx(-1e-8 * (1 / 0.6 + 1 / 1.4), rel=1e-3)
    assert value == pytest.approx(-2e-8, abs=5e-9)
    for sign in (1, -1):
        side = moments([sign * 60.0], [spread]), moments([0.0], [spread])
        found = fidelity(*side, *side, std_mode="pred").total.item()
        assert found == pytest.approx(-1e-4, rel=1e-3)


finite = st.floats(1, 5)
spreads = st.floats(0.2, 1.5)
modes = st.sampled_from(STD_MODES)


@settings(deadline=None, max_examples=30)
@given(
    finite, finite, spreads, spreads, finite, finite, spreads, spreads, st.sampled_from(STD_MODES)
)
def test_swapping_a_and_b_changes_nothing(a, b, sa, sb, ta, tb, tsa, tsb, mode):
    sides = moments([a], [sa]), moments([b], [sb]), moments([ta], [tsa]), moments([tb], [tsb])
    here = fidelity(*sides, std_mode=mode)
    there = fidelity(sides[1], sides[0], sides[3], sides[2], std_mode=mode)
    assert_close(here.total, there.total)
    assert_close(here.metrics, there.metrics)
    assert here.total.item() >= -2e-4


@settings(deadline=None, max_examples=30)
@given(finite, finite, spreads, spreads, st.floats(0.5, 100), st.sampled_from(STD_MODES[:3]))
def test_the_raters_unit_does_not_matter(ta, tb, tsa, tsb, unit, mode):
    pred = moments([3.2], [0.5]), moments([2.1], [0.9])
    one = fidelity(*pred, moments([ta], [tsa]), moments([tb], [tsb]), std_mode=mode)
    targets = moments([unit * ta], [unit * tsa]), moments([unit * tb], [unit * tsb])
    assert_close(one.total, fidelity(*pred, *targets, std_mode=mode).total, rtol=0, atol=1e-6)


def test_fixed_std_asks_for_gaps_wider_by_one_over_sigma():
    """Spec 4: 1.67 times at sigma = .6; with the raters' own spread the gap is the raters'."""
    targets = moments([3.6], [0.6]), moments([3.0], [0.6])
    for mode, stretch in (("fixed1", 1 / 0.6), ("target", 1.0), ("pred", 1.0)):
        mean = f64(3.0 + 0.6 * stretch).requires_grad_()
        pred = LevelMoments(mean, f64(0.6)), moments([3.0], [0.6])
        total = fidelity(*pred, *targets, std_mode=mode).total
        assert torch.autograd.grad(total, mean)[0].abs().item() < 1e-6


def test_who_gets_a_gradient_by_std_mode():
    for mode in STD_MODES:
        mean, std = f64(3.0).requires_grad_(), f64(0.5).requires_grad_()
        pred = LevelMoments(mean, std), moments([2.0], [0.7])
        target = f64(4.0).requires_grad_(), f64(0.5).requires_grad_()
        total = fidelity(*pred, LevelMoments(*target), moments([1], [1]), std_mode=mode).total
        got = torch.autograd.grad(total, (mean, std, *target), allow_unused=True)
        assert got[0] is not None and got[2] is None and got[3] is None
        assert (got[1] is not None) == (mode == "pred")


def test_binary_rating_by_hand():
    p = phi(1 / math.sqrt(2))  # both gaps 1: pair 1 right, pair 2 wrong, pair 3 tied in the target
    sides = f64(3, 3, 3), f64(2, 2, 2), f64(5, 1, 4), f64(1, 5, 4)
    fid = binary_rating(*sides)
    wrong = 1 - math.sqrt(1 - p)
    assert fid.total.item() == pytest.approx(1 - math.sqrt(p) + 2 * wrong)  # a tie is B's
    assert fid.count.item() == 3 and fid.metrics["order"].item() == 1.5
    half = binary_rating(*sides, half_ties=True)
    assert half.total.item() == pytest.approx(1.5 * (1 - math.sqrt(p)) + 1.5 * wrong)
    bce = binary_rating(*sides, form="bce")
    share = f64(1, 0, 0)
    torchs = F.binary_cross_entropy(f64(p, p, p), share, reduction="sum")
    assert_close(bce.total, torchs)


def test_mistakes_are_named():
    one, two = moments([1.0], [1.0]), moments([1.0, 2.0], [1.0, 1.0])
    with pytest.raises(RecipeError, match="did you mean 'fixed1'"):
        fidelity(one, one, one, one, std_mode="fixed")
    with pytest.raises(RecipeError, match="fidelity or bce"):
        binary_rating(*[one.mean_N] * 4, form="hinge")
    with pytest.raises(ValueError, match="differ in shape"):
        fidelity(one, one, two, two)
    with pytest.raises(ValueError, match="differ in shape"):
        binary_rating(one.mean_N, one.mean_N[:, None], one.mean_N, one.mean_N)


def test_no_pairs_cost_nothing():
    none = moments([], [])
    term = fidelity(none, none, none, none)
    assert term.total.item() == 0 and term.count.item() == 0
