"""RAD: golden values, the linear program, the cap, zero gains, and dependent rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize  # the dev extra brings it, by way of lm_eval

from llmkd.errors import DataError, RecipeError
from llmkd.selection import SelectionConfig, rad
from llmkd.selection.margin import pick_robust

GAINS = np.array([0.9, 0.6, 0.3, 0.1])


def best_value(gains, m, batch):
    """The optimum of a linear program: max sum pi g - (m t + sum u), u >= pi g - t, sum pi = b."""
    n = len(gains)
    cost = np.concatenate([-gains, [m], np.ones(n)])
    above = np.hstack([np.diag(gains), -np.ones((n, 1)), -np.eye(n)])
    total = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    bounds = [(0, 1)] * n + [(None, None)] + [(0, None)] * n
    found = optimize.linprog(
        cost, A_ub=above, b_ub=np.zeros(n), A_eq=total, b_eq=[batch], bounds=bounds
    )
    return -found.fun


@pytest.mark.parametrize(
    ("m", "q", "left"),
    [
        (0, [1, 0, 0, 0], 0.9),
        (1, [0.4, 0.6, 0, 0], 0.36),  # 1/.9 : 1/.6 = 2 : 3; each wins .36, one is voided
        (2, [2 / 11, 3 / 11, 6 / 11, 0], 0.9 * 2 / 11),
    ],
)
def test_golden_values(m, q, left):
    assert rad.one_row(GAINS, m) == pytest.approx(q)
    assert rad.marginals(GAINS, m, 1) == pytest.approx(q)
    assert rad.value(rad.one_row(GAINS, m), GAINS, m) == pytest.approx(left)
    shuffled = [2, 0, 3, 1]
    assert rad.one_row(GAINS[shuffled], m) == pytest.approx(np.array(q)[shuffled])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_closed_form_and_marginals_are_the_optimum(data):
    gains = np.array(data.draw(st.lists(st.integers(0, 100), min_size=2, max_size=12))) / 100
    m = data.draw(st.integers(0, len(gains) - 1))
    batch = data.draw(st.integers(0, len(gains)))
    q = rad.one_row(gains, m)
    assert q.sum() == pytest.approx(1) and (q >= 0).all()
    assert rad.value(q, gains, m) == pytest.approx(best_value(gains, m, 1), abs=1e-8)
    odds = rad.marginals(gains, m, batch)
    assert odds.sum() == pytest.approx(batch) and odds.min() >= 0 and odds.max() <= 1 + 1e-12
    assert rad.value(odds, gains, m) == pytest.approx(best_value(gains, m, batch), abs=1e-8)
    if (gains > 0).sum() > m and (batch * q <= 1).all():  # the cap is nowhere felt
        assert rad.value(odds, gains, m) == pytest.approx(batch * rad.value(q, gains, m), abs=1e-8)


def test_a_batch_spills_over_the_cap():
    # m=1, b=2: without the cap 2 q = (.8, 1.2, 0, 0). Under it t = .6: the second row wholly, .6/.9
    # of the first, the rest of 2 to the third: wins .6, .6, .1, and one .6 is voided.
    assert rad.marginals(GAINS, 1, 2) == pytest.approx([2 / 3, 1, 1 / 3, 0])
    assert best_value(GAINS, 1, 2) == pytest.approx(0.7)
    assert rad.marginals(GAINS, 1, 4).tolist() == [1, 1, 1, 1]
    assert rad.marginals(GAINS, 1, 0).tolist() == [0, 0, 0, 0]
    assert rad.marginals(GAINS, 0, 2) == pytest.approx([1, 1, 0, 0])


def test_zero_gains_divide_nothing():
    with np.errstate(all="raise"):
        some = np.array([0.0, 0.5, 0.0, 0.25])
        assert rad.one_row(some, 0).tolist() == [0, 1, 0, 0]
        assert rad.one_row(some, 1) == pytest.approx([0, 1 / 3, 0, 2 / 3])
        assert rad.marginals(some, 0, 3) == pytest.approx([0.5, 1, 0.5, 1])
        for hopeless, m in ((np.zeros(4), 0), (some, 2)):  # nothing can be won: all alike
            assert rad.one_row(hopeless, m) == pytest.approx([0.25] * 4)
            assert rad.marginals(hopeless, m, 2) == pytest.approx([0.5] * 4)


def test_bad_gains_and_counts():
    for bad in (-0.1, np.nan, np.inf):
        with pytest.raises(DataError, match="is the gain of row 1"):
            rad.one_row(np.array([0.5, bad]), 0)
    with pytest.raises(RecipeError, match="below the 4 rows"):
        rad.one_row(GAINS, 4)
    with pytest.raises(DataError, match="5 rows': there are only 4"):
        rad.marginals(GAINS, 1, 5)


def test_how_many_mistakes():
    assert rad.mistakes(None, 50) == 5  # the default share
    assert rad.mistakes(None, 50, held_out_error=0.3) == 15
    assert rad.mistakes(0.2, 50, held_out_error=0.3) == 10
    assert rad.mistakes(0.0, 50) == 0 and rad.mistakes(1, 50) == 1 and rad.mistakes(7.0, 50) == 7
    for bad in (-1, 1.5, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="selection_rad_mistakes"):
            rad.mistakes(bad, 50)
    for setting, error in ((50, None), (None, 1.0)):
        with pytest.raises(RecipeError, match="leaves no row of 50"):
            rad.mistakes(setting, 50, held_out_error=error)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(0, 10**6), st.data())
def test_rounding_gives_exactly_the_batch(weights, seed, data):
    batch = data.draw(st.integers(0, len(weights)))
    odds = rad.marginals(np.array(weights) / 100, 0, batch)
    odds = (odds + batch / len(weights)) / 2  # no corner: most rows undecided
    rows = rad.dep_round(odds, np.random.default_rng(seed))
    assert len(rows) == batch == len(set(rows.tolist()))
    assert set(np.flatnonzero(odds >= 1)) <= set(rows) <= set(np.flatnonzero(odds > 0))


@pytest.mark.parametrize(
    "odds", [[0.9, 0.6, 0.3, 0.2], [0.5] * 6, [0.25, 0.75, 1.0, 0.0, 0.5, 0.5]]
)
def test_rounding_keeps_the_marginals(odds):
    rng, draws = np.random.default_rng(0), 20_000
    counts = np.zeros(len(odds))
    for _ in range(draws):
        counts[rad.dep_round(np.array(odds), rng)] += 1
    # 5 standard errors of a share near 1/2
    assert counts / draws == pytest.approx(odds, abs=5 * 0.5 / draws**0.5)
    assert all((counts[i] == draws * p) for i, p in enumerate(odds) if p in (0.0, 1.0))


def test_rounding_refuses_what_are_no_marginals():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no whole number"):
        rad.dep_round(np.array([0.5, 0.2]), rng)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        rad.dep_round(np.array([1.5, 0.5]), rng)


def test_a_draw_leaves_out_rows_without_a_score_and_follows_the_marginals():
    scores = np.array([-np.inf, *GAINS])
    config, draws = SelectionConfig(selection_rad_mistakes=1), 4000
    counts = np.zeros(5)
    for seed in range(draws):
        counts[pick_robust(scores, 1, seed=seed, config=config)] += 1
    assert counts / draws == pytest.approx([0, 0.4, 0.6, 0, 0], abs=0.04)
    with pytest.raises(RecipeError, match="selection_rad_mistakes"):
        pick_robust(scores, 1, seed=0, config=SelectionConfig(selection_rad_mistakes=4))
