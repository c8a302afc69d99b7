"""Score targets: the spec's golden rows, the official label as a plain loop, and properties."""

import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from llmkd.errors import DataError, RecipeError
from llmkd.labels.score import (
    SCORE_BUILDERS,
    find_score_builder,
    gauss_adjusted,
    gauss_deqa,
    gauss_tilt,
    histogram,
    max_entropy,
    onehot_bin,
    onehot_round,
    ordinal,
    pooled_sigma,
    two_token,
)
from llmkd.labels.score_solve import log_interval
from llmkd.labels.score_stats import LevelValues, check_probs, mean_std, pool_sigma, to_levels

FIVE = np.array([5.0, 4.0, 3.0, 2.0, 1.0])  # excellent ... bad
MU, SIGMA = [4.522821594986413], [0.692276759337908]
UNEVEN = [0.0, 1.0, 1.5, 4.0]
NORMALISED = sorted(set(SCORE_BUILDERS) - {"gauss_deqa", "histogram"})
forms = st.sampled_from(["density", "integral"])
EXACT_MEAN = ["gauss_tilt", "max_entropy", "pooled_sigma", "two_token"]


def build(name, mean, std, values, **options):
    builder = find_score_builder(name)
    rows = (mean,) if builder.wants == "mean" else (mean, std)
    return builder.function(*rows, values, **options).probs_NL


def phi(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def plain_deqa(mu, sigma, form):
    """Spec 2 as its formulas, one row: `(label, adjusted before clipping)`."""
    if form == "density":
        root = math.sqrt(2 * math.pi)
        p = [math.exp(-(((c - mu) / sigma) ** 2) / 2) / root / sigma for c in (5, 4, 3, 2, 1)]
    else:
        p = [phi((c + 0.5 - mu) / sigma) - phi((c - 0.5 - mu) / sigma) for c in (5, 4, 3, 2, 1)]
    total, first = sum(p), sum(each * c for each, c in zip(p, (5, 4, 3, 2, 1), strict=True))
    alpha = (mu - 3) / (first - 3 * total + 1e-9)
    beta = (1 - alpha * total) / 5
    adjusted = [alpha * each + beta for each in p]
    label = [max(each, 0.0) for each in adjusted]
    mean = sum(each * c for each, c in zip(label, (5, 4, 3, 2, 1), strict=True))
    if sigma < 0.2 or abs(mean - mu) > 0.1:
        label = [0.0] * 5
        low = next(k for k in (1, 2, 3, 4) if mu <= k + 1 + 1e-8)
        label[5 - low] = (low + 1 + 1e-8 - mu) / (1 + 2e-8)
        label[4 - low] = (mu - low + 1e-8) / (1 + 2e-8)
    return label, adjusted


# --- golden rows (spec 5)


def test_golden_density():
    label = gauss_deqa(MU, SIGMA, FIVE)
    p = np.exp(-0.5 * ((FIVE - MU[0]) / SIGMA[0]) ** 2) / SIGMA[0] / math.sqrt(2 * math.pi)
    assert_allclose(p, [0.45442, 0.43329, 0.05127, 0.00075, 1.4e-6], atol=6e-6)
    probs = label.probs_NL[0]
    assert_allclose(probs, [0.50252, 0.47853, 0.04484, 0, 0], atol=6e-6)
    assert probs.sum() == pytest.approx(1.0259, abs=6e-5)
    assert probs @ FIVE == pytest.approx(4.561, abs=6e-4)
    assert probs @ FIVE / probs.sum() == pytest.approx(4.446, abs=6e-4)
    assert label.counts == {"two_token": 0, "clipped": 1}
    scaled = gauss_deqa(MU, SIGMA, FIVE, renormalise=True).probs_NL[0]
    assert_allclose(scaled, probs / probs.sum(), rtol=1e-15)


def test_golden_integral():
    probs = gauss_deqa(MU, SIGMA, FIVE, form="integral").probs_NL[0]
    assert_allclose(probs, [0.49650, 0.47630, 0.06219, 0, 0], atol=6e-6)
    assert probs.sum() == pytest.approx(1.0350, abs=6e-5)


def test_golden_two_token_fallback():
    label = gauss_deqa([4.238048], [0.223317], FIVE)
    assert_allclose(label.probs_NL[0], [0.238048, 0.761952, 0, 0, 0], atol=2e-8)
    assert label.counts == {"two_token": 1, "clipped": 0}


def test_golden_tilt():
    probs = gauss_tilt(MU, SIGMA, FIVE).probs_NL[0]
    assert_allclose(probs, [0.55976, 0.40370, 0.03613, 0.00040, 0], atol=6e-6)
    assert probs @ FIVE == pytest.approx(MU[0], abs=1e-14)


def test_the_middle_of_the_scale():
    assert_allclose(gauss_deqa([3.0], [0.6], FIVE).probs_NL[0], [0.2] * 5)  # the release's trap
    beside = gauss_deqa([3 + 1e-9], [0.6], FIVE).probs_NL[0]
    assert beside[0] == pytest.approx(0.1, abs=1e-3)  # half way to uniform
    for offset in (0.0, 1e-9, -1e-7):
        for form in ("density", "integral"):
            row = gauss_deqa([3 + offset], [0.6], FIVE, form=form, repaired=True).probs_NL[0]
            assert row.sum() == pytest.approx(1, abs=1e-6) and row[2] > 0.55
            assert_allclose(row, row[::-1], atol=1e-6)
    tilted = gauss_tilt([3.0], [0.6], FIVE).probs_NL[0]
    assert_allclose(tilted, tilted[::-1], atol=1e-15)
    assert tilted[2] > 0.6
    assert_allclose(tilted, gauss_deqa([3.0], [0.6], FIVE, repaired=True).probs_NL[0], atol=1e-12)


def test_repaired_leaves_everything_else_alone():
    mean = np.linspace(1, 5, 41)[[0, 3, 17, 19, 21, 40]]
    for form in ("density", "integral"):
        rows = [gauss_deqa(mean, [0.5] * 6, FIVE, form=form, repaired=r).probs_NL for r in (0, 1)]
        assert_allclose(*rows, rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.floats(1, 5), st.floats(0.01, 2.5), forms)
def test_gauss_deqa_is_the_official_loop(mu, sigma, form):
    assume(abs(mu - 3) > 1e-6)  # there 1e-9 decides, and rounding with it
    label, adjusted = plain_deqa(mu, sigma, form)
    mean = sum(np.maximum(adjusted, 0) * FIVE)
    if abs(abs(mean - mu) - 0.1) > 1e-6:
        mine = gauss_deqa([mu], [sigma], FIVE, form=form).probs_NL[0]
        assert_allclose(mine, label, rtol=1e-6, atol=1e-9)
    assert_allclose(
        gauss_adjusted([mu], [sigma], FIVE, form=form)[0], adjusted, rtol=1e-6, atol=1e-9
    )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 9),
    st.floats(0, 1),
    st.floats(0.2, 1.5),
    st.sampled_from(["density", "integral"]),
)
def test_gauss_deqa_before_and_after_clipping(count, share, sigma, form):
    values = np.arange(count, dtype=float)
    mu, middle = share * (count - 1), (count - 1) / 2
    assume(abs(mu - middle) > 1e-3)
    adjusted = gauss_adjusted([mu], [sigma], values, form=form)[0]
    assert adjusted.sum() == pytest.approx(1, abs=1e-9)
    assert adjusted @ values == pytest.approx(mu, abs=1e-5)
    label = gauss_deqa([mu], [sigma], values, form=form)
    probs = label.probs_NL[0]
    assert (probs >= 0).all() and abs(probs @ (values + 1) - (mu + 1)) <= 0.1 + 1e-12
    if not label.counts["two_token"]:
        assert_allclose(probs, np.maximum(adjusted, 0))
        assert label.counts["clipped"] == int((adjusted < 0).any())


def test_most_rows_are_clipped():
    make = np.random.default_rng(0)
    mean, std = make.uniform(1, 5, 4000), make.uniform(0.25, 1.0, 4000)
    for form in ("density", "integral"):
        counts = gauss_deqa(mean, std, FIVE, form=form).counts
        assert 0.5 < (counts["clipped"] + counts["two_token"]) / 4000 < 0.85


# --- by hand


def test_onehot_bins_and_rounding():
    mean = [1, 1.8, 1.81, 2.6, 3, 3.4, 4.2, 4.21, 5]
    bins = onehot_bin(mean, FIVE).probs_NL
    assert (bins @ FIVE).tolist() == [1, 1, 2, 2, 3, 3, 4, 5, 5]  # a bound belongs below
    over = onehot_bin([1.8 + 5e-9, 1.8 + 2e-8], FIVE).probs_NL @ FIVE
    assert over.tolist() == [1, 2]  # the release's 1e-8
    assert bins.max(1).tolist() == [1.0] * 9 and bins.sum() == 9
    nearest = onehot_round([1, 1.5, 1.51, 2.5, 4.5, 4.6], FIVE).probs_NL
    assert (nearest @ FIVE).tolist() == [1, 1, 2, 2, 4, 5]
    assert (onehot_round([1.3, 2.7, 2.8], UNEVEN).probs_NL @ UNEVEN).tolist() == [1.5, 1.5, 4]


def test_two_token_by_hand():
    rows = two_token([1, 2.25, 4, 5], FIVE).probs_NL
    assert rows.tolist() == [
        [0, 0, 0, 0, 1],
        [0, 0, 0.25, 0.75, 0],
        [0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
    ]
    assert two_token([2.0], UNEVEN).probs_NL[0].tolist() == [0, 0, 0.8, 0.2]


def test_max_entropy_by_hand():
    # The uniform label has mean 3, variance 2, and nothing is flatter.
    assert_allclose(max_entropy([3.0], [math.sqrt(2)], FIVE).probs_NL[0], [0.2] * 5, atol=1e-10)
    label = max_entropy([2.0, 4.0, 3.0, 2.5, 1.0, 2.5], [9.0, 9.0, 2.0, 0.0, 0.3, 0.5], FIVE)
    assert_allclose(label.probs_NL[0], [0.25, 0, 0, 0, 0.75], atol=1e-9)  # all on the ends
    assert_allclose(label.probs_NL[1], [0.75, 0, 0, 0, 0.25], atol=1e-9)
    assert_allclose(label.probs_NL[2], [0.5, 0, 0, 0, 0.5], atol=1e-9)  # exactly feasible
    for row in (3, 5):
        assert_allclose(label.probs_NL[row], [0, 0, 0.5, 0.5, 0], atol=1e-9)
    assert_allclose(label.probs_NL[4], [0, 0, 0, 0, 1], atol=1e-9)
    assert label.counts == {"raised": 1, "lowered": 3}


def test_ordinal_by_hand():
    row = ordinal([4.0], FIVE).probs_NL[0]
    powers = np.exp([-1.0, 0, -1, -2, -3])
    assert_allclose(row, powers / powers.sum())
    row = ordinal([4.5], FIVE, distance="squared", temperature=2.0).probs_NL[0]
    powers = np.exp([-0.125, -0.125, -1.125, -3.125, -6.125])
    assert_allclose(row, powers / powers.sum())


def test_histogram_by_hand():
    rows = [[4, 4, 5, 2], [3.5], [1, 5]]
    probs = histogram(rows, FIVE).probs_NL
    assert_allclose(probs, [[0.25, 0.5, 0, 0.25, 0], [0, 0.5, 0.5, 0, 0], [0.5, 0, 0, 0, 0.5]])
    # One pseudo-rater: (n p + b) / (n + 1).
    uniform = histogram(rows, FIVE, dirichlet=1.0).probs_NL
    assert_allclose(uniform[1], (probs[1] + 0.2) / 2)
    pooled = histogram(rows, FIVE, dirichlet=2.0, base="pooled").probs_NL
    assert_allclose(pooled[0], (4 * probs[0] + 2 * probs.mean(0)) / 6)
    own = histogram(rows, FIVE, dirichlet=2.0, base=[1, 0, 0, 0, 0]).probs_NL
    assert_allclose(own[2], [3 / 4, 0, 0, 0, 1 / 4])


def test_histogram_of_vader_ratings():
    """-4 ... 4 onto 1 ... 5: 3 + r / 2, odd ratings half on each neighbour (spec 6)."""
    probs = histogram([[-4, 3, 0, 1]], FIVE, low=-4, high=4).probs_NL[0]
    assert_allclose(probs, [0.125, 0.25, 0.375, 0, 0.25])
    assert probs @ FIVE == pytest.approx(3 + 0 / 2)


def test_log_interval_in_the_tails():
    assert log_interval(np.array(-0.5), np.array(1.5)) == pytest.approx(
        math.log(phi(1.5) - phi(-0.5))
    )
    # log(Phi(41) - Phi(40)) = log Phi(-40) to 1e-17 relative
    assert log_interval(np.array(40.0), np.array(41.0)) == pytest.approx(-804.608442, abs=1e-5)
    assert log_interval(np.array(-41.0), np.array(-40.0)) == pytest.approx(-804.608442, abs=1e-5)


# --- no std, small std


def test_without_a_std_everything_is_two_token():
    expected = two_token([2.25, 5], FIVE).probs_NL
    for name in ("gauss_deqa", "gauss_tilt", "max_entropy"):
        label = find_score_builder(name).function([2.25, 5], None, FIVE)
        assert_allclose(label.probs_NL, expected, atol=2e-8)
        assert label.counts["two_token"] == 2
    with pytest.raises(RecipeError, match="no std to pool"):
        pooled_sigma([2.25], None, FIVE)
    assert_allclose(pooled_sigma([2.25], None, FIVE, sigma=0.0).probs_NL, expected[:1])


@pytest.mark.parametrize("name", ["gauss_deqa", "gauss_tilt", "max_entropy", "pooled_sigma"])
def test_std_0_is_two_token(name):
    mean = [1, 2.25, 3, 4.9, 5]
    assert_allclose(build(name, mean, [0.0] * 5, FIVE), two_token(mean, FIVE).probs_NL, atol=2e-8)
    if name == "gauss_deqa":
        none = gauss_deqa(mean, [0.0] * 5, FIVE, least_std=0.0, most_shift=9.0).probs_NL
        assert_allclose(none, two_token(mean, FIVE).probs_NL, atol=2e-8)


def test_tilt_goes_over_to_two_token_without_a_jump():
    for form in ("density", "integral"):
        above, below = (gauss_tilt([3.3], [s], FIVE, form=form) for s in (0.0501, 0.0499))
        assert (above.counts["two_token"], below.counts["two_token"]) == (0, 1)
        assert_allclose(above.probs_NL, below.probs_NL, atol=1e-13)


def test_pooled_sigma_pools():
    std = np.array([0.3, 0.9])
    label = pooled_sigma([2.0, 3.5], std, FIVE).probs_NL
    one = math.sqrt((0.09 + 0.81) / 2)
    assert_allclose(label, gauss_tilt([2.0, 3.5], [one, one], FIVE).probs_NL)
    assert pool_sigma(std) == pytest.approx(one)
    assert pool_sigma(std, [2, 4]) == pytest.approx(math.sqrt((0.09 + 3 * 0.81) / 4))
    with pytest.raises(DataError, match="two ratings"):
        pool_sigma(std, [1, 1])


# --- properties

scales = st.sampled_from(
    [FIVE, FIVE[::-1], np.arange(2.0), np.arange(11.0), np.linspace(-1, 1, 4), np.arange(101.0)]
)
shares = st.lists(st.floats(0, 1), min_size=2, max_size=6)


@settings(deadline=None, max_examples=40)
@given(scales, shares, st.floats(0, 1.2), st.sampled_from(NORMALISED))
def test_sums_means_and_order(values, share, width, name):
    levels = LevelValues.of(values)
    mean = levels.low + np.sort(share) * (levels.high - levels.low)
    probs = build(name, mean, np.full(len(mean), width * levels.gap), values)
    assert (probs >= 0).all()
    assert_allclose(probs.sum(1), 1, atol=1e-12)
    found = probs @ values
    if name in EXACT_MEAN:
        assert_allclose(found, mean, atol=1e-11 * (levels.high - levels.low))
    assert (np.diff(found) >= -1e-9).all()  # never falls as the mean rises


@settings(deadline=None, max_examples=40)
@given(scales, shares, st.floats(0.05, 1.2), st.sampled_from(NORMALISED))
def test_mirrored_means_have_mirrored_labels(values, share, width, name):
    levels = LevelValues.of(values)
    mean = levels.low + np.array(share) * (levels.high - levels.low)
    if name.startswith("onehot"):  # their bounds belong to one side
        away = np.abs((mean - levels.low) / levels.gap % 0.1)
        mean = mean[(away > 1e-3) & (away < 0.099)]
        assume(len(mean) and len(values) in (2, 5))
    std = np.full(len(mean), width * levels.gap)
    here, there = (build(name, m, std, values) for m in (mean, levels.low + levels.high - mean))
    assert_allclose(here, there[:, ::-1], atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(shares, st.floats(0.25, 1.2), st.sampled_from([*NORMALISED, "gauss_deqa"]))
@example([0.0, 1.0], 0.5625, "gauss_deqa")
def test_units_and_the_order_given_change_nothing(share, width, name):
    mean, std = 1 + 4 * np.array(share), np.full(len(share), width)
    if name == "gauss_deqa":
        mean = mean[np.abs(mean - 3) > 1e-3]
        std = std[: len(mean)]
        assume(len(mean) and np.all(np.abs(np.abs(_shift(mean, std)) - 0.1) > 1e-6))
    if name.startswith("onehot"):
        mean = np.round(mean, 2) + 0.001  # off the bounds
        mean = np.minimum(mean, 5)
    probs = build(name, mean, std, FIVE)
    assert_allclose(build(name, mean, std, FIVE[::-1]), probs[:, ::-1], atol=1e-10)
    moved = build(name, 20 * mean - 7, 20 * std, 20 * FIVE - 7)
    assert_allclose(moved, probs, atol=1e-7)


def _shift(mean, std):
    return np.maximum(gauss_adjusted(mean, std, FIVE), 0) @ FIVE - mean


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([FIVE, np.array(UNEVEN), np.arange(31.0)]), st.floats(0, 1), st.floats(0, 1))
def test_max_entropy_reaches_every_variance_there_is(values, share, place):
    levels = LevelValues.of(values)
    mean = levels.low + share * (levels.high - levels.low)
    pair = two_token([mean], values).probs_NL[0]
    least = pair @ (values - mean) ** 2
    most = (mean - levels.low) * (levels.high - mean)
    wanted = least + place * (most - least)
    label = max_entropy([mean], [math.sqrt(wanted)], values)
    probs = label.probs_NL[0]
    assert probs @ values == pytest.approx(mean, abs=1e-10 * levels.high)
    assert probs @ (values - mean) ** 2 == pytest.approx(wanted, abs=1e-7 * levels.high**2)
    if min(share, 1 - share) > 0.01:
        assert label.counts == {"raised": 0, "lowered": 0}


def test_max_entropy_is_the_flattest():
    """Moving along the one direction that keeps sum, mean and variance lowers the entropy."""
    probs = max_entropy([3.4], [1.1], FIVE).probs_NL[0]
    turn = np.array([1, -3, 3, -1, 0]) * 1e-4  # third difference: no moment below the third
    entropy = [-(p * np.log(p)).sum() for p in (probs, probs + turn, probs - turn)]
    assert entropy[0] > entropy[1] and entropy[0] > entropy[2]


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 0.99), st.floats(0.06, 3))
def test_tilt_keeps_odds_of_the_base(share, sigma):
    """log(q / p) is a straight line in the values, here unevenly spaced ones."""
    mean = 4 * share
    probs = gauss_tilt([mean], [sigma], UNEVEN, form="integral").probs_NL[0]
    edges = np.array([-0.5, 0.5, 1.25, 2.75, 5.25])
    base = log_interval((edges[:-1] - mean) / sigma, (edges[1:] - mean) / sigma)
    assume(probs.min() > 1e-250)
    slope = np.diff(np.log(probs) - base) / np.diff(UNEVEN)
    assert_allclose(slope, slope[0], rtol=1e-6, atol=1e-7)
    assert probs @ UNEVEN == pytest.approx(mean, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(-4, 4), min_size=1, max_size=5), min_size=1, max_size=4))
def test_histogram_keeps_the_mean(rows):
    probs = histogram(rows, FIVE, low=-4, high=4).probs_NL
    assert_allclose(probs @ FIVE, [3 + np.mean(row) / 2 for row in rows], atol=1e-12)
    assert_allclose(probs.sum(1), 1)


# --- statistics and errors


def test_mean_std_by_hand():
    stats = mean_std([[1, 2, 3], [4], [2, 2], [1, 5]])
    assert stats.mean_N.tolist() == [2, 4, 2, 3] and stats.count_N.tolist() == [3, 1, 2, 2]
    assert_allclose(stats.std_N, [1, 0, 0, math.sqrt(8)])
    assert_allclose(mean_std([[1, 2, 3]], ddof=0).std_N, [math.sqrt(2 / 3)])
    # Sums of squares 2, 0, 0, 8 on 2 + 0 + 1 + 1 degrees: pooled 2.5, two pseudo-raters.
    shrunk = mean_std([[1, 2, 3], [4], [2, 2], [1, 5]], shrink=2)
    assert_allclose(shrunk.std_N**2, [(5 + 2) / 4, 2.5, 5 / 3, 13 / 3])


def test_raters_who_agree_have_no_spread():
    stats = mean_std([[0.1] * 3, [1.1] * 7, [0.7] * 11])
    assert stats.mean_N.tolist() == [0.1, 1.1, 0.7] and stats.std_N.tolist() == [0, 0, 0]


def test_to_levels_moves_the_mean_and_scales_both():
    mean, std = to_levels([0, 50, 100, 25], [10, 0, 5, 25], 0, 100, FIVE)
    assert_allclose(mean, [1, 3, 5, 2])
    assert_allclose(std, [0.4, 0, 0.2, 1])
    mean, std = to_levels([-4, 1], None, -4, 4, [0, 10])
    assert_allclose(mean, [0, 6.25])
    assert std is None


ERRORS = [
    (lambda: mean_std([[1, 2], [1, 9]], low=1, high=5), "ratings: 9.0: row 1: lies outside"),
    (lambda: mean_std([[1, 2], []]), "row 1: has no ratings"),
    (lambda: mean_std([[1, 2], [3, math.nan]]), "row 1: is not a number"),
    (lambda: mean_std([[1, 2], None]), "row 1"),
    (lambda: mean_std([["good"]]), "row 0: must be a list of numbers"),
    (lambda: mean_std([]), "no rows"),
    (lambda: mean_std([[1], [2]], shrink=1), "no row has two ratings"),
    (lambda: to_levels([1, 7], [1, 1], 1, 5, FIVE), "mean: 7.0: row 1: lies outside"),
    (lambda: to_levels([1, 4], [1, -1], 1, 5, FIVE), "std: -1.0: row 1: must be >= 0"),
    (lambda: to_levels([1, math.nan], None, 1, 5, FIVE), "row 1: is not a number"),
    (lambda: to_levels([1, 2], [1], 1, 5, FIVE), "there are 2 means"),
    (lambda: gauss_tilt([2, 5.1], [1, 1], FIVE), "row 1: lies outside the scale 1 to 5"),
    (lambda: gauss_deqa([2, 3], [1, math.nan], FIVE), "std: nan: row 1"),
    (lambda: two_token([[2, 3]], FIVE), "one number a row"),
    (lambda: histogram([[1], [0, 8]], FIVE), "ratings: 0.0: row 1: .*and 1 more"),
    (lambda: check_probs(np.array([[0.5, 0.5], [0.5, 0.6]])), "row 1: must be >= 0 and sum"),
]


@pytest.mark.parametrize("wrong, words", ERRORS)
def test_bad_rows_are_named(wrong, words):
    with pytest.raises(DataError, match=words):
        wrong()


SETTINGS = [
    (lambda: to_levels([3], None, 3, 3, FIVE), "scale.*all ratings may be equal"),
    (lambda: two_token([1], [1]), "at least two levels"),
    (lambda: two_token([1], [1, 3, 2]), "ascend or descend"),
    (lambda: two_token([1], [1, math.inf]), "finite"),
    (lambda: onehot_bin([1], UNEVEN), "unevenly spaced"),
    (lambda: gauss_deqa([1], [1], UNEVEN), "unevenly spaced"),
    (lambda: gauss_tilt([1], [1], UNEVEN), "unevenly spaced"),
    (lambda: gauss_tilt([1], [1], FIVE, form="cdf"), "density or integral"),
    (lambda: ordinal([1], FIVE, temperature=0), "> 0"),
    (lambda: ordinal([1], FIVE, distance="cubed"), "absolute or squared"),
    (lambda: pooled_sigma([1], [1], FIVE, sigma=-1), ">= 0"),
    (lambda: histogram([[1]], FIVE, dirichlet=-1), "pseudo-raters"),
    (lambda: histogram([[1]], FIVE, dirichlet=1, base="flat"), "uniform, pooled"),
    (lambda: histogram([[1]], FIVE, dirichlet=1, base=[1, 1, 0, 0, 0]), "sum to one"),
    (lambda: mean_std([[1]], ddof=2), "0 or 1"),
    (lambda: mean_std([[1]], shrink=-1), ">= 0"),
    (lambda: find_score_builder("gaus_tilt"), "did you mean 'gauss_tilt'"),
]


@pytest.mark.parametrize("wrong, words", SETTINGS)
def test_bad_settings(wrong, words):
    with pytest.raises(RecipeError, match="(?s)" + words):
        wrong()


def test_the_table():
    wants = {name: one.wants for name, one in SCORE_BUILDERS.items()}
    assert [name for name, want in wants.items() if want == "ratings"] == ["histogram"]
    assert sorted(name for name, want in wants.items() if want == "std") == [
        "gauss_deqa",
        "gauss_tilt",
        "max_entropy",
        "pooled_sigma",
    ]
    assert SCORE_BUILDERS["ordinal"].options == ("temperature", "distance")
