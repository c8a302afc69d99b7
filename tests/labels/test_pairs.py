"""Tables of several annotators, and pairs of a table: by hand, and what noise does to them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from llmkd.errors import DataError, RecipeError
from llmkd.labels.pairs import (
    PAIR_CHOICES,
    choose_pairs,
    combine,
    from_json,
    numbers_from_json,
    numbers_to_json,
    pooled_votes,
    to_json,
)
from llmkd.labels.preference import Logits, Scores, Votes
from llmkd.labels.votes import bradley_terry, vote_logit

NAN, INF = math.nan, math.inf
LOG3 = math.log(3)


def table(count, **upper):
    """`table(3, p01=2.0)`: that logit and its mirror image, all other pairs not asked."""
    found = np.full((count, count), NAN)
    np.fill_diagonal(found, 0.0)
    for key, value in upper.items():
        i, j = int(key[1]), int(key[2])
        found[i, j], found[j, i] = value, -value
    return found


def of_scores(*scores):
    return Scores(np.array(scores)).logits()


# means of sigma: 0 has (.881 + .018) / 2, 1 (.119 + .731) / 2, 2 (.982 + .269) / 2
CYCLE = table(3, p01=2.0, p02=-4.0, p12=1.0)


def test_all_pairs_keep_their_order_and_sign():
    assert choose_pairs(CYCLE, "all") == [(0, 1, 2.0), (0, 2, -4.0), (1, 2, 1.0)]
    assert choose_pairs(table(3, p02=-4.0), "all") == [(0, 2, -4.0)]


def test_best_and_worst_by_hand():
    # means .450, .425, .625: 2 is best and 1 worst, and their own logit says the opposite
    assert choose_pairs(CYCLE, "best_worst") == [(1, 2, 1.0)]
    assert choose_pairs(of_scores(0.0, 3.0, -1.0, 2.0), "best_worst") == [(1, 2, 4.0)]
    assert choose_pairs(of_scores(-1.0, 0.0, 3.0), "best_worst") == [(0, 2, -4.0)]
    assert choose_pairs(of_scores(1.0, 1.0, 1.0), "best_worst") == [(0, 1, 0.0)]


def test_best_and_worst_must_have_been_asked_together():
    # means: 0 .881, 1 (.119 + .953) / 2 = .536, 2 .047: 0 and 2 were never compared
    chain = table(3, p01=2.0, p12=3.0)
    assert choose_pairs(chain, "best_worst") == [(1, 2, 3.0)]
    # means, not sums, over what was asked: 0 .881, 1 (.119 + .525 + .525) / 3 = .390, 2 and 3 .475
    uneven = table(4, p01=2.0, p12=0.1, p13=0.1)
    assert choose_pairs(uneven, "best_worst") == [(0, 1, 2.0)]


def test_tournament_by_hand():
    # a table that agrees with itself: its own gaps, between the extremes, however large
    for scale in (1.0, 1e3, 1e9):
        ((i, j, logit),) = choose_pairs(scale * of_scores(0.0, 3.0, -1.0, 2.0), "tournament")
        assert (i, j) == (1, 2) and logit == pytest.approx(4.0 * scale, rel=1e-12)
    # hardly less so: a judge too sure of three answers still gets a finite, ordered strength
    nearly = 100.0 * of_scores(0.0, 3.0, -1.0) + table(3, p01=0.1, p02=0.0, p12=0.0)
    ((i, j, logit),) = choose_pairs(nearly, "tournament")
    assert (i, j) == (1, 2) and 15.0 < logit < 40.0
    # two responses: the logit itself
    ((i, j, logit),) = choose_pairs(table(2, p01=-1.3), "tournament")
    assert (i, j) == (0, 1) and logit == pytest.approx(-1.3, abs=1e-10)
    # a chain: gaps add up although the ends were never compared
    ((i, j, logit),) = choose_pairs(table(3, p01=2.0, p12=3.0), "tournament")
    assert (i, j) == (0, 2) and logit == pytest.approx(5.0, abs=1e-8)
    # a perfect cycle: nobody is stronger
    ((i, j, logit),) = choose_pairs(table(3, p01=2.0, p12=2.0, p02=-2.0), "tournament")
    assert logit == pytest.approx(0.0, abs=1e-9)


def test_tournament_is_the_fit_to_soft_wins():
    soft = 1 / (1 + np.exp(-CYCLE)) * (1 - np.eye(3))
    strength = bradley_terry(soft, pseudo=0)
    ((i, j, logit),) = choose_pairs(CYCLE, "tournament")
    assert {i, j} == {int(strength.argmax()), int(strength.argmin())} and i < j
    assert logit == pytest.approx(strength[i] - strength[j], abs=1e-12)


def test_tournament_of_votes():
    wins = np.array([[0, 4.0, 3], [1, 0, 5], [2, 0, 0]])
    logits = Votes(wins, wins + wins.T).logits()
    strength = bradley_terry(wins)
    ((i, j, logit),) = choose_pairs(logits, "tournament", wins_KK=wins)
    assert (i, j) == (0, 2) and logit == pytest.approx(strength[0] - strength[2])
    # as many votes on every pair: soft wins are the smoothed shares, so that the fit is the same
    ((_, _, again),) = choose_pairs(logits, "tournament")
    assert again == pytest.approx(logit, abs=1e-9)
    # more votes on one pair: only the votes know
    wins = wins * np.array([[0, 9, 1], [9, 0, 1], [1, 1, 0]])
    logits = Votes(wins, wins + wins.T).logits()
    pairs = [choose_pairs(logits, "tournament", wins_KK=w)[0][2] for w in (wins, None)]
    assert abs(pairs[0] - pairs[1]) > 0.01


def test_tournament_stays_within_the_largest_group():
    two_groups = table(5, p01=9.0, p23=1.0, p34=1.0)
    ((i, j, logit),) = choose_pairs(two_groups, "tournament")
    assert (i, j) == (2, 4) and logit == pytest.approx(2.0, abs=1e-8)


@pytest.mark.parametrize("how", PAIR_CHOICES)
def test_nothing_to_choose_from(how):
    for logits in (table(3), table(1), np.zeros((0, 0))):
        assert choose_pairs(logits, how) == []
    assert len(choose_pairs(table(3, p12=0.0), how)) == 1


@pytest.mark.parametrize("how", PAIR_CHOICES)
def test_tables_that_are_none(how):
    lopsided = CYCLE.copy()
    lopsided[0, 1] = 5.0
    half_asked = CYCLE.copy()
    half_asked[0, 1] = NAN
    for bad in (lopsided, half_asked, table(2, p01=INF), np.zeros((2, 3))):
        with pytest.raises(DataError):
            choose_pairs(bad, how)
    with pytest.raises(RecipeError, match="best_worst"):
        choose_pairs(CYCLE, "best_wors")


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from(PAIR_CHOICES))
def test_renumbering_the_responses_renumbers_the_pairs(count, seed, how):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.normal(size=(count, count)) * 3, 1)
    logits = upper - upper.T
    order = rng.permutation(count)
    found = {
        frozenset(((int(order[i]), logit), (int(order[j]), -logit)))
        for i, j, logit in _rounded(choose_pairs(logits[np.ix_(order, order)], how))
    }
    expected = {
        frozenset(((i, logit), (j, -logit))) for i, j, logit in _rounded(choose_pairs(logits, how))
    }
    assert found == expected


def _rounded(pairs):
    return [(i, j, round(logit, 6)) for i, j, logit in pairs]


def test_the_winners_curse_as_documented():
    """4 responses that are all alike, 5 votes a pair: the best looks better than it is."""
    rng, favour = np.random.default_rng(0), {"best_worst": [], "tournament": [], "all": []}
    for _ in range(1500):
        upper = np.triu(rng.binomial(5, 0.5, (4, 4)), 1).astype(float)
        wins = upper + np.tril(5 - upper.T, -1)
        logits = Votes(wins, wins + wins.T).logits()
        share_K = (1 / (1 + np.exp(-logits))).sum(1)
        for how in ("best_worst", "tournament"):
            ((i, j, logit),) = choose_pairs(logits, how)
            favour[how].append(logit * np.sign(share_K[i] - share_K[j]))
        favour["all"] += [logit for _, _, logit in choose_pairs(logits, "all")]
    means = {how: np.mean(logits) for how, logits in favour.items()}
    assert means["best_worst"] == pytest.approx(0.93, abs=0.07)  # 3 standard errors
    assert means["tournament"] == pytest.approx(0.81, abs=0.03)
    assert means["all"] == pytest.approx(0.0, abs=0.04)


def test_average_by_hand():
    one, two = Scores(np.array([1.0, 0.0, 0.0])), Logits(table(3, p01=3.0))
    combined = combine([one, two])
    assert_allclose(combined, table(3, p01=2.0, p02=1.0, p12=0.0))
    nobody = combine([Logits(table(3, p01=3.0)), two])
    assert math.isnan(nobody[0, 2]) and nobody[0, 1] == 3.0


def test_votes_by_hand():
    """A sign is one vote, own votes count as they are, ties are halves, NaN is no vote."""
    wins = np.array([[0, 4.0, 0], [1, 0, 0], [0, 0, 0]])
    own = Votes(wins, wins + wins.T)
    others = [Scores(np.array([2.0, 1.9, 1.9])), Logits(table(3, p01=-7.0))]
    pooled_wins, pooled = pooled_votes([own, *others])
    assert_array_equal(pooled_wins, [[0, 5, 1], [2, 0, 0.5], [0, 0.5, 0]])
    assert_array_equal(pooled, [[0, 7, 1], [7, 0, 1], [1, 1, 0]])
    combined = combine([own, *others], "votes")
    assert_allclose(combined, table(3, p01=vote_logit(5, 7), p02=LOG3, p12=0.0), atol=1e-12)
    assert combine([own], "votes")[0, 1] == pytest.approx(LOG3)
    assert math.isnan(combine([own], "votes")[0, 2])


def test_tournament_combination_by_hand():
    """Three judges who all say 0 > 1 > 2, and who never compared 0 with 2."""
    judges = [Logits(table(4, p01=1.0, p12=0.2))] * 3
    combined = combine(judges, "tournament")
    wins = np.array([[0.0, 3, 0], [0, 0, 3], [0, 0, 0]])
    strength = bradley_terry(wins)
    assert_allclose(combined[:3, :3], strength[:, None] - strength[None, :], atol=1e-12)
    assert combined[0, 2] > combined[0, 1] > 0
    assert np.isnan(combined[3, :3]).all() and combined[3, 3] == 0
    two = combine([Votes(np.array([[0, 4], [1, 0]]), np.array([[0, 5], [5, 0]]))], "tournament")
    assert two[0, 1] == pytest.approx(LOG3, abs=1e-11)


def test_what_is_done_to_the_combined_logit():
    judge = Logits(table(3, p01=math.log(0.74 / 0.26), p02=0.2))
    clean = combine([judge], flip_rate=0.2)
    assert clean[0, 1] == pytest.approx(math.log(9))
    cooler = combine([judge], flip_rate=0.2, temperature=2.0)  # flips first, then temperature
    assert cooler[0, 1] == pytest.approx(math.log(9) / 2)
    clamped = combine([judge], flip_rate=0.2, temperature=2.0, max_logit=1.0)
    assert clamped[0, 1] == 1.0 and clamped[1, 0] == -1.0 and math.isnan(clamped[1, 2])
    assert combine([judge], max_logit=1.0)[0, 2] == 0.2
    assert_allclose(clamped, -clamped.T)


def test_infinite_scores():
    sure = Scores(np.array([1.0, 0.0]), np.zeros(2))
    with pytest.raises(DataError, match="max_logit"):
        combine([sure])
    assert combine([sure], max_logit=4.0)[0, 1] == 4.0
    with pytest.raises(DataError, match="opposites"):
        combine([sure, Scores(np.array([0.0, 1.0]), np.zeros(2))], max_logit=4.0)


def test_combinations_that_cannot_be():
    one = Scores(np.array([1.0, 0.0]))
    for annotations in ([], [one, Scores(np.zeros(3))]):
        with pytest.raises(DataError, match="annotations"):
            combine(annotations)
    for settings_, key in (
        ({"how": "mean"}, "combine"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_logit": -1.0}, "max_logit"),
        ({"flip_rate": 0.5}, "flip_rate"),
    ):
        with pytest.raises(RecipeError, match=key):
            combine([one], **settings_)


def test_combining_does_not_write_on_what_annotators_said():
    logits = table(2, p01=3.0)
    logits[0, 0] = NAN
    combined = combine([Logits(logits)], max_logit=1.0)
    assert combined[0, 0] == 0 and math.isnan(logits[0, 0]) and logits[0, 1] == 3.0


ANNOTATIONS = [
    Scores(np.array([0.1, 2.0, 1 / 3])),
    Scores(np.array([0.1, 2.0]), np.array([0.5, 1e-9])),
    Votes(np.array([[0, 2.5], [0.5, 0]]), np.array([[0, 3], [3, 0]])),
    Logits(table(3, p01=math.pi)),
    Logits(table(2, p01=1.0), table(2)),
]


@pytest.mark.parametrize("annotation", ANNOTATIONS, ids=lambda a: type(a).__name__)
def test_json_brings_back_what_was_said(annotation):
    written = json.dumps(to_json("judge", annotation), allow_nan=False)
    name, again = from_json(json.loads(written))
    assert name == "judge" and type(again) is type(annotation)
    for field in type(annotation).__dataclass_fields__:
        before, after = getattr(annotation, field), getattr(again, field)
        assert (before is None) == (after is None)
        if before is not None:
            assert_array_equal(after, before)
    assert_array_equal(again.logits(), annotation.logits())


def test_json_of_the_brief():
    entry = to_json("rm", Scores(np.array([1.0, 2.0])))
    assert entry == {"annotator": "rm", "scores": [1.0, 2.0], "variance": None}
    votes = to_json("h", Votes(np.array([[0, 1], [2, 0]]), np.array([[0, 3], [3, 0]])))
    assert votes == {"annotator": "h", "wins": [[0, 1], [2, 0]], "votes": [[0, 3], [3, 0]]}
    asked = to_json("j", Logits(table(2), None))
    assert asked == {"annotator": "j", "logits": [[0.0, None], [None, 0.0]], "first": None}
    assert_array_equal(numbers_from_json(numbers_to_json(CYCLE)), CYCLE)
    for bad in ({"annotator": "x"}, {"scores": [1, 2]}, {"annotator": "x", "wins": [[0]]}):
        with pytest.raises(DataError, match="annotation"):
            from_json(bad)
