"""Score metrics: by hand, against scipy and scikit-learn, and where they are not defined."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import cohen_kappa_score

from llmkd.errors import DataError, RecipeError
from llmkd.evaluation.score_metrics import (
    SCORE_METRICS,
    Scored,
    UndefinedError,
    discrete_js,
    discrete_kl,
    discrete_wasserstein,
    gauss_kl,
    gauss_w2,
    kendall,
    logistic,
    logistic_fit,
    pearson,
    quadratic_kappa,
    spearman,
)
from llmkd.evaluation.score_report import (
    find_score_metric,
    measured,
    paired_scores,
    score_reliability,
    score_report,
)

FIVE = np.array([5.0, 4.0, 3.0, 2.0, 1.0])


def make_rows(rows=60, seed=0, noise=0.4):
    make = np.random.default_rng(seed)
    human = make.dirichlet(np.ones(5), size=rows)
    pred = human + noise * make.dirichlet(np.ones(5), size=rows)
    return Scored.from_probs(pred / (1 + noise), FIVE), Scored.from_probs(human, FIVE)


def test_correlations_by_hand_and_by_scipy():
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert pearson(x, y) == pytest.approx(0.8) == spearman(x, y)
    assert kendall(x, y) == pytest.approx(4 / 6)
    pred, human = make_rows()
    x, y = np.round(pred.mean_N, 1), np.round(human.mean_N, 1)  # with ties
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y)[0])
    assert pearson(1e200 * x, y) == pytest.approx(pearson(x, y))


def test_quadratic_kappa_is_sklearns():
    pred, human = make_rows(200, noise=1.0)
    mine = quadratic_kappa(pred.mean_N, human.mean_N, FIVE)
    levels = (np.round(side.mean_N).astype(int) for side in (pred, human))
    assert mine == pytest.approx(cohen_kappa_score(*levels, weights="quadratic"))
    # 1 2 against 2 1 of two levels: E(i - j)^2 = 1, chance .5 + .5 - .5.
    assert quadratic_kappa(np.array([1.0, 2]), np.array([2.0, 1]), np.array([1.0, 2])) == -1
    with pytest.raises(UndefinedError, match="one and the same level"):
        quadratic_kappa(np.array([1.1, 0.9]), np.array([1.0, 1.2]), FIVE)


def test_errors_by_hand():
    pred, human = Scored.of([1, 2, 5]), Scored.of([1, 4, 4])
    report = score_report(pred, human, FIVE, draws=0).measures
    assert report["mae"].value == pytest.approx(1)
    assert report["rmse"].value == pytest.approx(math.sqrt(5 / 3))


def test_discrete_distances_by_hand():
    pred = Scored.from_probs([[0.5, 0.25, 0.25], [0, 0, 1]], [4, 2, 1])
    human = Scored.from_probs([[0.25, 0.25, 0.5], [1, 0, 0]], [4, 2, 1])
    values = np.array([4.0, 2, 1])
    assert pred.mean_N.tolist() == [2.75, 1] and pred.std_N[0] == pytest.approx(math.sqrt(1.6875))
    kl = discrete_kl(pred, human, values)
    assert_allclose(kl, [0.25 * math.log(0.5) + 0.5 * math.log(2), -math.log(1e-12)])
    js = discrete_js(pred, human, values)
    assert_allclose(js, [jensenshannon(p, q) ** 2 for p, q in _rows(pred, human)])
    assert js[1] == pytest.approx(math.log(2))
    found = discrete_wasserstein(pred, human, values)
    assert_allclose(found, [0.25 * 3, 3])  # a quarter goes from 4 to 1; all does
    assert_allclose(
        found,
        [stats.wasserstein_distance(values, values, p, q) for p, q in _rows(pred, human)],
    )


def _rows(pred, human):
    return zip(pred.probs_NL, human.probs_NL, strict=True)


def test_gaussian_distances():
    """W2 and KL of the spec; the official "JS" of (1, .3) and (5, .3), 22.2, is not offered: it
    exceeds log 2.
    """
    pred, human = Scored.of([5.0, 2, 3], [0.3, 0.5, 0.0]), Scored.of([1.0, 2, 3], [0.3, 1.0, 0.4])
    kl = gauss_kl(pred, human, FIVE)
    assert_allclose(kl[:2], [0.5 * 16 / 0.09, math.log(0.5) + 0.5 * (4 - 1)])
    assert math.isnan(kl[2])
    assert_allclose(gauss_w2(pred, human, FIVE), [4, 0.5, 0.4])
    m, s, r = 4.0, 0.3, 0.3  # the official form has 1e-8 in it
    official = np.log(r / (s + 1e-8)) + (s**2 + m**2) / (2 * r**2 + 1e-8) - 0.5
    assert kl[0] == pytest.approx(official, rel=1e-6)
    one = measured(find_score_metric("gauss_kl"), pred, human, FIVE, draws=0)
    assert one.value == pytest.approx(kl[:2].mean()) and "1 of 3 rows left out" in one.words


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 7))
def test_distances_are_zero_at_home_and_positive_elsewhere(seed, levels):
    make = np.random.default_rng(seed)
    p, q = make.dirichlet(np.ones(levels), size=(2, 3))
    values = np.arange(levels)[::-1]
    pred, human = Scored.from_probs(p, values), Scored.from_probs(q, values)
    for distance in (discrete_kl, discrete_js, discrete_wasserstein, gauss_kl, gauss_w2):
        assert_allclose(distance(pred, pred, values), 0, atol=1e-9)
        assert (distance(pred, human, values) > 0).all()
    gaps = np.abs(pred.mean_N - human.mean_N)
    assert (discrete_wasserstein(pred, human, values) >= gaps - 1e-12).all()
    assert (discrete_js(pred, human, values) <= math.log(2)).all()


def test_logistic_fit_finds_its_own_curve():
    x = np.linspace(1, 5, 40)
    y = logistic(x, 80.0, 10.0, 3.0, 0.5)
    assert_allclose(logistic_fit(x, y), y, atol=1e-5)
    assert pearson(x, y) < 0.99
    report = score_report(Scored.of(x), Scored.of(y), FIVE, draws=0).measures
    assert report["plcc_logistic"].value == pytest.approx(1, abs=1e-9)
    assert report["plcc"].value == pytest.approx(stats.pearsonr(x, y)[0])


def test_a_scorer_that_is_backwards_shows_in_the_raw_numbers():
    x = np.linspace(1, 5, 40)
    y = logistic(-x, 5.0, 1.0, -3.0, 0.5)
    report = score_report(Scored.of(x), Scored.of(y), FIVE, draws=0).measures
    assert report["plcc_logistic"].value > 0.99  # which is why it never stands alone
    assert report["plcc"].value < -0.9 and report["srcc"].value == pytest.approx(-1)


def test_the_falling_start_finds_what_the_official_one_misses():
    x = np.array([2.2, 3.2, 1.3, 3.7, 4.1, 2.5, 3.4, 3.3, 2.6, 2.1, 1.0, 4.4])
    y = np.array([2.8, 4.3, 4.5, 1.6, 0.2, 3.8, 1.1, 3.3, 2.0, 3.0, 2.5, 2.9])
    squares = ((logistic_fit(x, y) - y) ** 2).sum()
    assert squares == pytest.approx(9.165, abs=1e-3)  # from the official start alone: 14.388


def test_a_failed_fit_leaves_the_raw_number(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("maxfev")

    pred, human = make_rows()
    monkeypatch.setattr("llmkd.evaluation.score_metrics.curve_fit", fail)
    report = score_report(pred, human, FIVE, draws=0).measures
    assert report["plcc_logistic"].value is None
    assert "did not converge" in report["plcc_logistic"].words
    assert report["plcc"].value > 0.5


def test_constants_are_none_with_a_reason_and_never_nan():
    pred, human = make_rows(20)
    same = Scored.from_probs(np.full((20, 5), 0.2), FIVE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat = score_report(same, human, FIVE, draws=20).measures
        people = score_report(pred, same, FIVE, draws=20).measures
    for name in ("plcc", "plcc_logistic", "srcc", "krcc", "std_plcc", "std_srcc"):
        assert (flat[name].value, people[name].value) == (None, None)
        assert flat[name].words == "the predictions are all equal"
        assert people[name].words == "the people's answers are all equal"
    assert flat["qwk"].value == 0 and flat["mae"].value > 0
    json.dumps(score_report(same, human, FIVE, draws=5).as_dict(), allow_nan=False)


def test_what_is_missing_is_said():
    report = score_report(Scored.of([1, 2, 3]), Scored.of([1, 2, 4], [1, 1, 1]), FIVE, draws=0)
    assert report.measures["std_plcc"].words == "the predictions have no std"
    assert report.measures["kl"].words == "the predictions have no probs"
    assert report.measures["plcc_logistic"].words == "3 rows are too few to fit four parameters"
    one = score_report(Scored.of([1]), Scored.of([2]), FIVE).measures
    assert one["srcc"].words == "1 rows: a correlation needs three" and one["mae"].value == 1
    two = score_report(Scored.of([1, 2]), Scored.of([2, 4]), FIVE, draws=0).measures
    assert two["plcc"].value is None and two["krcc"].value is None  # 1, whatever they say


def test_intervals_hold_the_value_and_narrow_with_rows():
    few, many = (
        score_report(*make_rows(rows), FIVE, draws=200, metrics=["plcc", "mae", "qwk", "kl"])
        for rows in (40, 640)
    )
    for name, one in many.measures.items():
        assert one.low < one.value < one.high
        wide = few.measures[name]
        assert one.high - one.low < 0.5 * (wide.high - wide.low)
    again = score_report(*make_rows(40), FIVE, draws=200, metrics=["plcc", "mae", "qwk", "kl"])
    assert again.measures == few.measures  # the seed decides


def test_interval_of_a_mean_is_the_textbooks():
    pred, human = make_rows(400)
    one = measured(find_score_metric("mae"), pred, human, FIVE, draws=4000)
    error = np.abs(pred.mean_N - human.mean_N)
    half = 1.96 * error.std() / math.sqrt(400)
    assert_allclose(
        [one.low, one.high], [error.mean() - half, error.mean() + half], atol=0.1 * half
    )


def test_no_interval_where_it_would_take_minutes(monkeypatch):
    monkeypatch.setattr("llmkd.evaluation.score_report.SLOW", 100)
    report = score_report(*make_rows(20), FIVE, metrics=["krcc", "srcc"], draws=10).measures
    assert report["krcc"].low is None and "no interval" in report["krcc"].words
    assert report["srcc"].low is not None


def test_groups_are_reported_on_their_own():
    """Two data sets, each ordered backwards, look good together: their means differ."""
    pred, human = Scored.of([1, 1.5, 2, 4, 4.5, 5]), Scored.of([2, 1.5, 1, 5, 4.5, 4])
    report = score_report(pred, human, FIVE, groups=[*"aaabbb"], draws=0)
    assert report.measures["plcc"].value > 0.8
    assert {name: one.measures["plcc"].value for name, one in report.groups.items()} == {
        "a": pytest.approx(-1),
        "b": pytest.approx(-1),
    }
    assert report.groups["b"].rows == 3


def test_reliability_by_hand():
    pred, human = Scored.of([1, 2, 3, 4]), Scored.of([2, 2, 3, 5])
    found = score_reliability(pred, human, bins=2)
    assert (found.said, found.found, found.count) == ((1.5, 3.5), (2.0, 4.0), (2, 2))
    assert found.ece == pytest.approx(0.5)
    # Equal predictions share a bin, whatever the order of rows: no bin can look badly off.
    tied = score_reliability(Scored.of([3, 3, 3, 3]), Scored.of([1, 5, 2, 4]), bins=4)
    assert (tied.said, tied.found, tied.ece) == ((3.0,), (3.0,), 0.0)


def test_paired_differences():
    human = make_rows(80)[1]
    good = [make_rows(80, noise=0.2)[0]] * 2
    bad = [make_rows(80, noise=3.0)[0]] * 2
    assert_allclose(make_rows(80, noise=3.0)[1].mean_N, human.mean_N)
    for metric in ("plcc", "plcc_logistic", "srcc", "qwk", "mae", "rmse", "kl", "std_plcc"):
        ahead = paired_scores(metric, good, bad, human, FIVE, draws=100)
        behind = paired_scores(metric, bad, good, human, FIVE, draws=100)
        assert ahead.adds and not behind.adds  # better is positive, for errors too
        assert ahead.low < ahead.mean < ahead.high and len(ahead.per_seed) == 2
        assert_allclose([behind.mean, behind.low], [-ahead.mean, -ahead.high], atol=1e-9)
        none = paired_scores(metric, good, good, human, FIVE, draws=20)
        assert (none.mean, none.low, none.high) == (0, 0, 0)


def test_paired_mean_is_the_difference_of_the_metric():
    human, a, b = make_rows()[1], make_rows()[0], make_rows(noise=2.0)[0]
    for name in ("krcc", "mae"):
        x, y = (score_report(p, human, FIVE, draws=0).measures[name].value for p in (a, b))
        sign = 1 if SCORE_METRICS[name].higher_is_better else -1
        found = paired_scores(name, [a], [b], human, FIVE, draws=20)
        assert found.mean == pytest.approx(sign * (x - y))


def test_rows_without_a_std_are_left_out_of_both_arms():
    human = Scored.of([1, 2, 3], [1, 1, 1])
    a, b = Scored.of([1, 2, 3], [1, 0, 1]), Scored.of([2, 2, 3], [1, 1, 0])
    assert paired_scores("gauss_kl", [a], [b], human, FIVE, draws=5).mean == pytest.approx(0.5)


ERRORS = [
    (lambda: Scored.of([1, math.nan]), DataError, "row 1: is no mean"),
    (lambda: Scored.of([1, 2], [1, -1]), DataError, "row 1: is no std"),
    (lambda: Scored.of([1, 2], [1]), DataError, "needs 2 numbers"),
    (lambda: Scored.of([[1, 2]]), DataError, "one a row"),
    (lambda: Scored.of([1], probs=[[0.5, 0.6]]), DataError, "row 0: must be >= 0 and sum to one"),
    (lambda: Scored.of([1, 2], probs=[[0.5, 0.5]]), DataError, "needs 2 rows"),
    (lambda: score_report(Scored.of([1]), Scored.of([1, 2]), FIVE), DataError, "one answer"),
    (lambda: score_report(Scored.of([]), Scored.of([]), FIVE), DataError, "one answer"),
    (
        lambda: score_report(Scored.from_probs([[1, 0]], [2, 1]), Scored.of([1]), FIVE),
        DataError,
        "5 levels",
    ),
    (
        lambda: score_report(Scored.of([1]), Scored.of([1]), FIVE, groups=["a", "b"]),
        DataError,
        "needs 1 names",
    ),
    (lambda: find_score_metric("plc"), RecipeError, "did you mean 'plcc'"),
    (
        lambda: score_report(Scored.of([1]), Scored.of([1]), FIVE, draws=-1),
        RecipeError,
        "draws must be >= 0",
    ),
    (
        lambda: paired_scores("mae", [Scored.of([1])], [], Scored.of([1]), FIVE),
        DataError,
        "same seeds",
    ),
    (
        lambda: paired_scores(
            "plcc", [Scored.of([1, 1, 1])], [Scored.of([1, 2, 3])], Scored.of([1, 2, 3]), FIVE
        ),
        DataError,
        "seed 0: the predictions are all equal",
    ),
]


@pytest.mark.parametrize("wrong, kind, words", ERRORS)
def test_mistakes_are_named(wrong, kind, words):
    with pytest.raises(kind, match=words):
        wrong()
