"""Vote logits and tournaments: the spec's golden values, definitions, brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.optimize import minimize
from scipy.stats import binom, norm

from llmkd.errors import DataError, RecipeError
from llmkd.labels.votes import (
    both_orders,
    bradley_terry,
    clipped_logit,
    debias,
    debias_logit,
    fit_temperature,
    probability,
    score_logit,
    vote_logit,
    zermelo,
)

INF, NAN = math.inf, math.nan


def test_haldane_by_hand():
    assert vote_logit(4, 5) == pytest.approx(math.log(3), abs=1e-15)  # 4.5 / 1.5
    assert_allclose(vote_logit([0, 1, 2.5], [1, 1, 5]), [-math.log(3), math.log(3), 0], atol=1e-15)
    assert_allclose(vote_logit([[0], [3]], [3, 6]).shape, (2, 2))
    assert vote_logit(0, 0) == 0


# votes, then mean and sd of Haldane's and of the clipped logit at p = .8 (spec 5)
TABLE = [(1, 0.66, 0.88, 2.76, 3.68), (5, 1.28, 0.88, 2.13, 1.80), (20, 1.39, 0.58, 1.51, 0.69)]


@pytest.mark.parametrize("votes, mean, sd, clip_mean, clip_sd", TABLE)
def test_the_specs_table_of_vote_logits(votes, mean, sd, clip_mean, clip_sd):
    wins = np.arange(votes + 1)
    weights = binom.pmf(wins, votes, 0.8)
    for logits, m, s in (
        (vote_logit(wins, votes), mean, sd),
        (clipped_logit(wins / votes, 0.01), clip_mean, clip_sd),
    ):
        average = weights @ logits
        assert average == pytest.approx(m, abs=0.005)
        assert math.sqrt(weights @ (logits - average) ** 2) == pytest.approx(s, abs=0.005)


def test_impossible_votes_are_refused():
    for wins, votes in ((3, 2), (-1, 2), ([1, 0, 4], [2, 2, 3])):
        with pytest.raises(DataError, match="wins must lie in"):
            vote_logit(wins, votes)
    with pytest.raises(DataError, match=r"4 wins of 3 votes \(at \[2\]\)"):
        vote_logit([1, 0, 4], [2, 2, 3])


def test_clipping_by_hand():
    limit = math.log(99)
    expected = [-limit, -limit, 0, math.log(4), limit]
    assert_allclose(clipped_logit([0.0, 0.005, 0.5, 0.8, 1.0], 0.01), expected, atol=1e-14)
    assert clipped_logit(1.0, 1e-20) == pytest.approx(20 * math.log(10))  # 1 - eps is 1 here
    for bad in (1.1, -0.1):
        with pytest.raises(DataError):
            clipped_logit(bad, 0.01)
    for eps in (0.0, 0.5):
        with pytest.raises(RecipeError):
            clipped_logit(0.3, eps)


def test_score_logit_by_hand_and_in_the_tails():
    # (4, sd .5) against (3, sd .5): z = sqrt 2, Phi = .9214
    value = score_logit(4, 0.25, 3, 0.25)
    assert probability(value) == pytest.approx(0.9214, abs=5e-5)
    assert value == pytest.approx(2.461, abs=5e-4)
    z = np.array([-3.0, 0.2, 5.0])
    assert_allclose(score_logit(z, 0.5, 0, 0.5), norm.logcdf(z) - norm.logsf(z), rtol=1e-12)
    # z = 100: log(1 - Phi) = -z^2/2 - log(z sqrt(2 pi)) + log(1 - 1/z^2 + ...), Phi = 1
    far = 5000 + math.log(100 * math.sqrt(2 * math.pi)) + 1e-4
    assert score_logit(100, 1, 0, 0) == pytest.approx(far, abs=1e-6)
    assert score_logit(0, 0, 100, 1) == -score_logit(100, 1, 0, 0)
    assert_allclose(score_logit([1, 1, 0], 0, [1, 0, 1], 0), [0, INF, -INF])
    assert math.isnan(score_logit(NAN, 1, 0, 1))
    with pytest.raises(DataError, match="variance"):
        score_logit(1, -1, 0, 5)


def test_debias_by_hand():
    # p = .9 flipped at .2: .9 * .8 + .1 * .2 = .74
    assert debias(0.74, 0.2) == pytest.approx(0.9, abs=1e-12)
    assert debias_logit(math.log(0.74 / 0.26), 0.2) == pytest.approx(math.log(9), abs=1e-12)
    assert_allclose(debias([0.0, 0.2, 0.5, 1.0], 0.2), [0.01, 0.01, 0.5, 0.99])
    assert debias(1.0, 0.2, floor=1e-3) == pytest.approx(0.999)
    # Haldane's 5 of 5 at 35 % flips is far outside [e, 1 - e]: the floor
    assert debias_logit(vote_logit(5, 5), 0.35) == pytest.approx(math.log(99))
    assert debias_logit(8.0, 0.2) == 8.0  # surer than the floor before: not weakened
    assert debias_logit(8.0, 0.0) == 8.0 and math.isnan(debias_logit(NAN, 0.2))
    for bad in (0.5, -0.1, NAN):
        with pytest.raises(RecipeError, match="flip_rate"):
            debias(0.6, bad)
        with pytest.raises(RecipeError, match="flip_rate"):
            debias_logit(0.6, bad)
    with pytest.raises(DataError):
        debias(1.2, 0.1)


@settings(deadline=None)
@given(st.floats(-50, 50), st.floats(0, 0.49))
def test_debias_undoes_flips_is_odd_and_never_weakens(logit, flip):
    assert debias_logit(-logit, flip) == -debias_logit(logit, flip)
    clean = debias_logit(logit, flip)
    assert abs(clean) >= abs(logit) - 1e-9 and clean * logit >= 0
    p = float(np.clip(probability(logit), 0.02, 0.98))
    assert debias(p * (1 - flip) + (1 - p) * flip, flip) == pytest.approx(p, abs=1e-9)


def test_both_orders_by_hand():
    # truly 1.0 for the first text, and .6 for whatever is shown first
    logit, lean = both_orders([1.6, 1.6, NAN, NAN], [-0.4, NAN, -0.4, NAN])
    assert_allclose(logit, [1.0, 1.6, 0.4, NAN])
    assert_allclose(lean, [0.6, NAN, NAN, NAN])
    swapped, same = both_orders(-0.4, 1.6)  # the other text called 1
    assert swapped == pytest.approx(-1.0) and same == pytest.approx(0.6)


WINS = np.array([[0, 7, 2, 5], [3, 0, 4, 9], [8, 1, 0, 2], [0, 1, 6, 0]], dtype=float)


def likelihood_by_brute_force(wins, pseudo=0.0):
    """The maximum of sum w_ij log sigma(a_i - a_j), by an optimiser that knows nothing of it."""
    wins = wins + pseudo * (1 - np.eye(len(wins)))

    def loss(rest):
        a = np.append(rest, 0.0)
        return (wins * np.logaddexp(0, -(a[:, None] - a[None, :]))).sum()

    found = minimize(loss, np.zeros(len(wins) - 1), method="BFGS", options={"gtol": 1e-9})
    a = np.append(found.x, 0.0)
    return a - a.mean()


@pytest.mark.parametrize("fit", [bradley_terry, zermelo])
def test_two_players_are_haldane(fit):
    for wins, losses in ((4, 1), (5, 0), (0, 1), (2.5, 2.5)):
        a, b = fit([[0, wins], [losses, 0]])
        assert a - b == pytest.approx(vote_logit(wins, wins + losses), abs=1e-11)
    a, b = fit([[0, 4], [1, 0]])
    assert a - b == pytest.approx(1.0986, abs=5e-5)
    a, b = fit([[0, 3], [1, 0]], pseudo=0)
    assert a - b == pytest.approx(math.log(3), abs=1e-11)


@pytest.mark.parametrize("pseudo", [0.0, 0.5, 2.0])
def test_tournament_against_its_definition_and_brute_force(pseudo):
    fast = bradley_terry(WINS, pseudo)
    assert_allclose(fast, zermelo(WINS, pseudo), atol=1e-9)
    assert_allclose(fast, likelihood_by_brute_force(WINS, pseudo), atol=1e-6)
    assert fast.sum() == pytest.approx(0, abs=1e-12)
    assert_allclose(bradley_terry(WINS + 5 * np.eye(4), pseudo), fast)  # nobody beats oneself


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_random_tournaments(players, seed):
    rng = np.random.default_rng(seed)
    wins = rng.integers(0, 6, (players, players)).astype(float)
    fast = bradley_terry(wins)
    assert_allclose(fast, zermelo(wins), atol=1e-8)
    order = rng.permutation(players)
    assert_allclose(bradley_terry(wins[np.ix_(order, order)]), fast[order], atol=1e-9)
    # what a maximum is: everybody's expected wins are the wins
    smoothed = (wins + 0.5) * (1 - np.eye(players))
    expected = ((smoothed + smoothed.T) * probability(fast[:, None] - fast[None, :])).sum(1)
    assert_allclose(expected, smoothed.sum(1), rtol=1e-9)


def test_groups_that_hardly_meet_settle_too(monkeypatch):
    """Newman's iteration alone takes 10^5 rounds where a group loses one game in a million."""
    monkeypatch.setattr("llmkd.labels.votes.ROUNDS", 100)
    strength = np.array([7.0, 6.5, -7.0, -6.5])
    wins = probability(strength[:, None] - strength[None, :])
    assert_allclose(bradley_terry(wins, pseudo=0), strength, atol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(50):
        players = rng.integers(3, 8)
        wins = np.exp(6 * rng.normal(size=(players, players)))
        np.fill_diagonal(wins, 0.0)
        found = bradley_terry(wins, pseudo=0)
        expected = (wins + wins.T) * probability(found[:, None] - found[None, :])
        assert_allclose(expected.sum(1), wins.sum(1), rtol=1e-6)


def test_tournaments_without_a_maximum():
    beaten_by_all = WINS.copy()
    beaten_by_all[2] = 0
    with pytest.raises(DataError, match=r"\[2\].*pseudo=0.5|pseudo=0.5") as caught:
        bradley_terry(beaten_by_all, pseudo=0)
    assert "[2]" in str(caught.value)
    with pytest.raises(DataError, match="groups"):
        zermelo(np.kron(np.eye(2), [[0, 2], [1, 0]]), pseudo=0)  # two halves that never met
    assert np.isfinite(bradley_terry(beaten_by_all)).all()
    assert_allclose(bradley_terry([[0]]), [0])
    for bad in ([[0, 1]], [[0, NAN], [1, 0]], [[0, -1], [1, 0]], [[0, INF], [1, 0]]):
        with pytest.raises(DataError):
            bradley_terry(bad)
    with pytest.raises(RecipeError):
        bradley_terry(WINS, pseudo=-1)


def votes_at(logits, temperature, votes, seed=0):
    return np.random.default_rng(seed).binomial(votes, probability(logits / temperature))


def test_temperature_by_hand():
    # one logit: sigma(L / T) must be the share .8, so T = L / log 4
    logits = [2.0, 2.0, -2.0]
    fitted = fit_temperature(logits, [8, 8, 2], 10)
    assert fitted == pytest.approx(2 / math.log(4), rel=1e-10)
    assert fit_temperature([*logits, 0.0, 5.0], [8, 8, 2, 9, 0], [10, 10, 10, 10, 0]) == fitted
    assert fit_temperature([2e6, 2e6, -2e6], [8, 8, 2], 10) == pytest.approx(1e6 * fitted)


@pytest.mark.parametrize("true", [0.3, 1.0, 7.0])
def test_temperature_is_found_again_and_is_the_maximum(true):
    logits = np.random.default_rng(1).normal(size=3000) * 2 * true
    wins = votes_at(logits, true, 3)
    fitted = fit_temperature(logits, wins, 3)
    assert fitted == pytest.approx(true, rel=0.06)

    def likelihood(temperature):
        return binom.logpmf(wins, 3, probability(logits / temperature)).sum()

    assert likelihood(fitted) > max(likelihood(fitted * 1.01), likelihood(fitted / 1.01))


def test_temperature_that_cannot_be_fitted():
    with pytest.raises(DataError, match="too few"):
        fit_temperature([2.0, 1.0, 0.0], [3, 4, 100], [5, 5, 200])
    assert fit_temperature([2.0, 1.0], [3, 4], [5, 5], least=10) > 0
    logits = np.linspace(-3, 3, 30)
    with pytest.raises(DataError, match="no vote contradicts"):
        fit_temperature(logits, np.where(logits > 0, 3, 0), 3)
    with pytest.raises(DataError, match="contradict the votes"):
        fit_temperature(logits, np.where(logits > 0, 1, 2), 3)
    with pytest.raises(DataError, match="finite"):
        fit_temperature([*logits, NAN], 1, 2)
    with pytest.raises(DataError, match="wins"):
        fit_temperature(logits, 4, 3)


def test_votes_that_balance_fit_no_temperature_however_they_are_rounded():
    logits, wins = np.array([-1.0, 2, 2, 2, 3, -3]), np.array([4.0, 4, 2, 2, 3, 3])
    assert (logits * (wins - 2)).sum() == 2 * 2 - 2 + 3 - 3  # agrees on balance
    assert fit_temperature(logits, wins, np.full(6, 4.0), least=1) > 0
    wins[1] = 3.0
    for scale in (1.0, 0.1, 1 / 3, 1e-3, 7.7):
        with pytest.raises(DataError, match="contradict the votes on balance"):
            fit_temperature(scale * logits, wins, np.full(6, 4.0), least=1)
