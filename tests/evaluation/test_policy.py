"""Numbers of a policy: win rates, KL, repetition and matched KL, by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkd.errors import DataError
from llmkd.evaluation.policy import (
    between,
    describe_responses,
    distinct,
    interpolate_at_kl,
    kl_on_samples,
    repetition,
    reward_mean,
    share_identical,
    win_rate,
    win_rate_of_scores,
)

LOG3 = math.log(3)  # sigma(log 3) = 3/4


def test_a_win_rate_by_hand():
    found = win_rate([LOG3, -LOG3, 0.0, LOG3])
    assert found["soft"] == pytest.approx((0.75 + 0.25 + 0.5 + 0.75) / 4)
    assert found["hard"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["prompts"] == 4 and found["low"] < found["soft"] < found["high"]


def test_every_prompt_counts_the_same_and_unasked_pairs_do_not():
    logits = [LOG3, LOG3, LOG3, -LOG3, math.nan, math.nan]
    found = win_rate(logits, ["a", "a", "a", "b", "b", "c"])
    assert found["soft"] == pytest.approx((0.75 + 0.25) / 2) and found["prompts"] == 2
    assert found["hard"] == 0.5


def test_the_bootstrap_draws_prompts_not_pairs():
    """Four pairs of one prompt are one observation: repeating them narrows nothing."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=40)
    once = win_rate(logits)
    again = win_rate(np.repeat(logits, 4), np.repeat(np.arange(40), 4).tolist())
    assert (again["low"], again["high"]) == pytest.approx((once["low"], once["high"]))
    naive = win_rate(np.repeat(logits, 4))
    assert naive["high"] - naive["low"] < 0.6 * (once["high"] - once["low"])
    # 1.96 standard errors of the mean, to the accuracy of a bootstrap
    error = np.std(1 / (1 + np.exp(-logits)), ddof=1) / math.sqrt(40)
    assert once["high"] - once["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=12))
def test_two_policies_share_the_wins(logits):
    mine, theirs = win_rate(logits, draws=50), win_rate([-one for one in logits], draws=50)
    assert mine["soft"] + theirs["soft"] == pytest.approx(1)
    assert mine["hard"] + theirs["hard"] == pytest.approx(1)
    assert mine["low"] == pytest.approx(1 - theirs["high"], abs=1e-9)
    assert 0 <= mine["low"] <= mine["high"] <= 1


def test_certain_wins_and_what_nobody_judged():
    assert win_rate([math.inf, math.inf])["soft"] == 1.0
    for logits, prompts in (([], None), ([math.nan], None), ([[1.0]], None), ([1.0], ["a", "b"])):
        with pytest.raises(DataError, match="logits"):
            win_rate(logits, prompts)


def test_scores_of_several_samples_meet_each_other():
    # prompt one: 2 against 1, 3 -> one win, one loss; prompt two: 1, 1 against 1 -> ties
    found = win_rate_of_scores([[2.0], [1.0, 1.0]], [[1.0, 3.0], [1.0]])
    sigma = 1 / (1 + math.exp(-1))
    assert found["soft"] == pytest.approx(((sigma + 1 - sigma) / 2 + 0.5) / 2)
    assert found["hard"] == 0.5 and found["prompts"] == 2
    assert win_rate_of_scores([[LOG3], [math.nan]], [[0.0], [0.0]])["soft"] == pytest.approx(0.75)


def test_between_takes_one_policy_against_the_other():
    s_K = np.array([3.0, 1.0, 0.0])
    table_KK = s_K[:, None] - s_K[None, :]
    assert between(table_KK, 2).tolist() == [[3.0], [1.0]]
    assert between(table_KK, 1).tolist() == [[2.0, 3.0]]
    for mine in (0, 3):
        with pytest.raises(DataError, match="mine"):
            between(table_KK, mine)


def test_kl_by_hand():
    found = kl_on_samples([-1.0, -2.0, -3.0], [-2.0, -2.0, -5.0], [2, 1, 3])
    assert found["mean"] == pytest.approx(1.0) and found["per_token"] == pytest.approx(0.5)
    assert found["se"] == pytest.approx(1 / math.sqrt(3))  # of 1, 0, 2: sd 1
    assert kl_on_samples([-1.0, -2.0], [-2.0, -3.0], [1, 1], ["a", "a"])["se"] is None


def test_kl_takes_responses_of_one_prompt_together():
    logps, ref = [-1.0, -1.0, -3.0, -3.0], [-2.0, -2.0, -3.0, -3.0]
    pairs = kl_on_samples(logps, ref, [1] * 4, ["a", "a", "b", "b"])
    prompts = kl_on_samples(logps[::2], ref[::2], [1, 1])
    assert pairs["se"] == pytest.approx(prompts["se"]) == pytest.approx(0.5)


def test_kl_of_samples_is_the_kl():
    """Two tokens a response over an alphabet of three: k1 within its error of the sum by hand."""
    rng = np.random.default_rng(1)
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    exact = 2 * float(np.sum(p * np.log(p / q)))
    drawn = rng.choice(3, size=(20_000, 2), p=p)
    found = kl_on_samples(np.log(p)[drawn].sum(1), np.log(q)[drawn].sum(1), np.full(20_000, 2))
    assert abs(found["mean"] - exact) < 3 * found["se"] < 0.03
    assert found["per_token"] == pytest.approx(found["mean"] / 2)


@pytest.mark.parametrize(
    "logps, ref, lengths",
    [
        ([-1.0], [math.nan], [1]),
        ([-math.inf], [-math.inf], [1]),
        ([-1.0], [-math.inf], [1]),
        ([-1.0, -1.0], [-1.0], [1, 1]),
        ([], [], []),
        ([-1.0], [-1.0], [0]),
    ],
)
def test_kl_refuses_what_is_no_number(logps, ref, lengths):
    with pytest.raises(DataError):
        kl_on_samples(logps, ref, lengths)


def test_repetition_and_distinct_by_hand():
    assert distinct([[1, 2, 1], [1, 2]], 1) == pytest.approx(2 / 5)
    assert distinct([[1, 2, 1], [1, 2]], 2) == pytest.approx(2 / 3)  # 12 21 | 12
    assert distinct([[1]], 2) is None and distinct([], 1) is None
    assert repetition([[5, 5, 5, 5, 5], [1, 2, 3, 4, 5], [9]]) == pytest.approx((0.5 + 0) / 2)
    assert repetition([[1, 2, 3]]) is None
    assert share_identical([["a", " a\n", "b"], ["b"]]) == pytest.approx(1 / 4)
    assert share_identical([]) is None
    assert reward_mean([[1.0, math.nan], [3.0]]) == {"mean": 2.0, "values": [1.0, 3.0]}
    assert reward_mean([[math.nan]]) == {"mean": None, "values": []}


def test_rows_are_described():
    rows = [
        {"ids": [[1, 2, 0], [1, 2]], "responses": ["a b", "a b"], "finished": [True, False]},
        {"ids": [[3, 0]], "responses": ["c"], "finished": [True]},
    ]
    found = describe_responses(rows)
    assert found["responses"] == 3 and found["lengths"] == [3, 2, 2]
    assert found["distinct_1"] == pytest.approx(4 / 7)
    assert found["distinct_2"] == pytest.approx(3 / 4)
    assert found["truncated"] == pytest.approx(1 / 3) == found["identical"]
    assert describe_responses([])["truncated"] is None


def test_win_rates_at_one_kl():
    kls, wins = [4.0, 1.0, 2.0], [0.8, 0.6, 0.7]  # any order
    assert interpolate_at_kl(kls, wins, 1.5) == pytest.approx(0.65)
    assert interpolate_at_kl(kls, wins, 3.0) == pytest.approx(0.75)
    assert interpolate_at_kl(kls, wins, 4.0) == 0.8 and interpolate_at_kl(kls, wins, 1.0) == 0.6
    assert interpolate_at_kl(kls, wins, 0.99) is None and interpolate_at_kl(kls, wins, 4.01) is None
    assert interpolate_at_kl([], [], 1.0) is None and interpolate_at_kl(kls, wins, math.nan) is None
    assert interpolate_at_kl([2.0, 2.0], [0.5, 0.7], 2.0) == pytest.approx(0.6)
    assert interpolate_at_kl([1.0, math.nan, 3.0], [0.5, 9.0, 0.7], 2.0) == pytest.approx(0.6)
    with pytest.raises(ValueError):
        interpolate_at_kl([1.0], [0.5, 0.6], 1.0)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0, 50),
)
def test_no_interpolated_win_rate_leaves_its_neighbours(points, at):
    kls, wins = zip(*points, strict=True)
    found = interpolate_at_kl(kls, wins, at)
    assert (found is None) == (not min(kls) <= at <= max(kls))
    if found is not None:
        assert min(wins) - 1e-9 <= found <= max(wins) + 1e-9
