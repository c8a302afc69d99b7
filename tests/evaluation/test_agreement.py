import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.errors import DataError
from llmkd.evaluation.agreement import (
    agreement,
    bootstrap,
    brier,
    cross_temperature,
    ece,
    hits,
    kappa,
    log_loss,
    position_bias,
    rater_agreement,
    raw_agreement,
    reliability,
)
from llmkd.evaluation.agreement_plots import draw_reliability

LOG3 = math.log(3)  # sigma = 3/4


def f64(*values):
    return np.array(values, dtype=np.float64)


def test_hits_by_hand():
    logits, wins, votes = f64(2, -2, 2, 0, 2, 0), f64(3, 3, 0, 3, 1, 1), f64(3, 3, 3, 3, 2, 2)
    # right, wrong, wrong, own tie, people's tie, both
    np.testing.assert_array_equal(hits(logits, wins, votes), [1, 0, 0, 0.5, 0.5, 0.5])


def test_ece_brier_and_log_loss_by_hand():
    logits, share = f64(LOG3, -LOG3, 0), f64(1, 1, 0)
    # Turned: said .75 .75 .5, found 1 and 0 (one mean, .5) and .5 for the tie.
    said, found, count = reliability(logits, share)
    np.testing.assert_allclose(said, [0.5, 0.75, 0.75])
    np.testing.assert_allclose(found, [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(count, [1, 1, 1])
    assert ece(logits, share) == pytest.approx((0 + 0.25 + 0.25) / 3)
    assert brier(logits, share) == pytest.approx((0.0625 + 0.5625 + 0.25) / 3)
    # Votes 2 of 2 at .75, 1 of 1 at .25, 1 of 2 at .5.
    wanted = (2 * math.log(4 / 3) + math.log(4) + 2 * math.log(2)) / 5
    assert log_loss(logits, f64(2, 1, 1), f64(2, 1, 2)) == pytest.approx(wanted)


def test_bins_hold_equal_numbers_of_pairs():
    logits = np.linspace(0.1, 3, 25)
    said, _, count = reliability(logits, np.ones(25))
    assert count.tolist() == [3] * 5 + [2] * 5 and (np.diff(said) > 0).all()
    assert said[0] == pytest.approx(np.mean(1 / (1 + np.exp(-logits[:3]))))


def test_a_calibrated_judge_has_no_ece_and_a_sure_one_has():
    logits = np.repeat(f64(LOG3, -LOG3), 4)
    share = f64(1, 1, 1, 0, 0, 0, 0, 1)
    assert ece(logits, share) == pytest.approx(0)
    assert ece(2 * logits, share) == pytest.approx(0.9 - 0.75)


def test_log_loss_is_finite_for_a_judge_that_is_surely_wrong():
    assert log_loss(f64(800), f64(0), f64(1)) == pytest.approx(800)


def test_kappa_by_hand():
    assert raw_agreement(f64(1, 2, -1, -3), f64(1, -1, -1, -1)) == 0.75
    assert kappa(f64(1, 2, -1, -3), f64(1, -1, -1, -1)) == pytest.approx(0.5)
    # A quarter ties each: chance .25² + .75² / 2 = .34375.
    wanted = (0.75 - 0.34375) / (1 - 0.34375)
    assert kappa(f64(0, 1, 1, 1), f64(0, 1, -1, 1)) == pytest.approx(wanted)
    assert kappa(f64(1, np.nan), f64(np.nan, 1)) is None
    assert kappa(f64(0, 0), f64(0, 0)) is None
    assert raw_agreement(f64(np.nan), f64(1)) is None


def test_kappa_does_not_profit_from_which_response_is_called_1():
    # Both always say 1 because the file has the better one first: chance is still one half.
    assert kappa(np.ones(10), f64(*[1] * 5, *[-1] * 5)) == pytest.approx(0)


def test_rater_agreement_by_hand():
    assert rater_agreement(f64(2, 3, 1), f64(3, 3, 1)) == pytest.approx((1 / 3 + 1) / 2)
    assert rater_agreement(f64(1), f64(1)) is None


def test_position_bias_by_hand():
    bias = position_bias(f64(2, 0.5, np.nan, 1), f64(1, 1, 5, np.nan))
    # First pair: its own in both orders. Second: the first shown in both, so the orders disagree.
    assert (bias.lean, bias.disagree, bias.first, bias.pairs) == (1.0, 0.5, 0.75, 2)
    assert bias.words == ""
    assert position_bias(f64(1), f64(np.nan)) is None


def test_a_tie_in_one_order_is_no_disagreement():
    bias = position_bias(f64(1), f64(1))  # 2 and 0
    assert bias.disagree == 0 and bias.first == pytest.approx(0.75)


@pytest.mark.parametrize("lean, place", [(9.0, "first"), (-9.0, "second")])
def test_a_judge_of_places_is_told_in_words(lean, place):
    bias = position_bias(np.linspace(-1, 1, 20), np.full(20, lean))
    assert bias.disagree == 1 and f"prefers the {place} response" in bias.words
    assert "100%" in bias.words


def test_votes_disagree_by_their_orders_whatever_their_number():
    from llmkd.labels.votes import vote_logit

    n = 20
    for w1 in range(n + 1):
        for w2 in range(n + 1):  # wins of the one shown first, in either order
            bias = position_bias(vote_logit([w1 + n - w2], [2 * n]), vote_logit([w1 + w2], [2 * n]))
            assert bias.disagree == float((w1 - n / 2) * (w2 - n / 2) > 0)
            first = sum((w > n / 2) + (w == n / 2) / 2 for w in (w1, w2)) / 2
            assert bias.first == pytest.approx(first)


def test_the_temperature_is_found_and_judged_on_other_pairs():
    make = np.random.default_rng(0)
    true = make.normal(0, 1.5, 3000)
    votes = np.full(3000, 5.0)
    wins = make.binomial(5, 1 / (1 + np.exp(-true))).astype(float)
    found = cross_temperature(3 * true, wins, votes)
    assert found.value == pytest.approx(3, rel=0.05)
    assert found.ece < 0.03 < 0.1 < ece(3 * true, wins / votes)
    assert found.log_loss < log_loss(3 * true, wins, votes)


def test_where_no_temperature_fits_it_says_so():
    few = cross_temperature(f64(1, -1), f64(1, 0), f64(1, 1))
    assert few.value is None and few.words
    against = cross_temperature(np.ones(100), np.zeros(100), np.ones(100))
    assert against.value is None and against.words


def test_the_bootstrap_covers_the_mean():
    hit = np.repeat([0.0, 1.0], [20, 80])
    found = bootstrap(hit, seed=1)
    spread = 1.96 * math.sqrt(0.8 * 0.2 / 100)
    assert found.mean == 0.8
    assert found.low == pytest.approx(0.8 - spread, abs=0.02)
    assert found.high == pytest.approx(0.8 + spread, abs=0.02)
    assert found == bootstrap(hit, seed=1)
    many = bootstrap(np.linspace(0, 1, 101), draws=500)
    assert many.low < 0.5 < many.high and many.high - many.low < 0.15


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4), st.booleans()), min_size=1))
def test_nothing_depends_on_which_response_is_called_1_or_on_the_order_of_pairs(rows):
    l, w, swap = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))  # noqa: E741
    h, swap, lean = np.full(len(l), 4.0), swap > 0, np.linspace(-1, 1, len(l))
    one = agreement("x", l, w, h, first_N=lean)
    turned = np.where(swap, -l, l), np.where(swap, h - w, w)
    back = slice(None, None, -1)
    other = agreement("x", turned[0][back], turned[1][back], h, first_N=lean[back])
    for key in ("ece", "brier", "log_loss"):
        assert getattr(one, key) == pytest.approx(getattr(other, key), abs=1e-12)
    assert one.accuracy.mean == pytest.approx(other.accuracy.mean)
    assert one.position.disagree == other.position.disagree
    assert one.position.first == pytest.approx(other.position.first)
    assert 0 <= one.ece <= 1 and 0 <= one.brier <= 1


def test_unanswered_and_unrated_pairs_are_counted_and_left_out():
    found = agreement("x", f64(1, np.nan, 1, 1), f64(2, 2, 0, 1), f64(2, 2, 0, 2))
    assert (found.pairs, found.unanswered) == (2, 1)
    assert found.accuracy.mean == 0.75 and found.decided.mean == 1.0
    assert found.as_dict()["accuracy"]["mean"] == 0.75
    assert agreement("x", f64(1), f64(1), f64(2)).decided is None


@pytest.mark.parametrize(
    "logits, wins, votes, wanted",
    [
        (f64(np.nan), f64(1), f64(1), "no answer to any of 1"),
        (f64(1), f64(1), f64(0), "wins"),
        (f64(1), f64(-1), f64(1), "wins"),
        (f64(1, 1), f64(1), f64(1), "one number a pair"),
        (f64(np.inf), f64(1), f64(1), "infinite"),
        (f64(1), f64(np.nan), f64(1), "NaN"),
    ],
)
def test_input_that_does_not_fit_is_refused(logits, wins, votes, wanted):
    with pytest.raises(DataError, match=wanted):
        agreement("judge", logits, wins, votes)


def test_the_reliability_plot_is_a_picture():
    logits = np.linspace(-2, 2, 40)
    share = (logits > 0.3).astype(float)
    picture = draw_reliability({f"j{i}": (logits, share, t) for i, t in enumerate([None, 2.0, 3])})
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert draw_reliability({"none": (f64(), f64(), None)}) is None
