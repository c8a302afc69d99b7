"""Leanings and agreement of annotators, from annotation rows worked by hand."""

import math

import numpy as np
import pytest

from llmkd.evaluation.annotator_summary import annotator_summary
from llmkd.labels.pairs import to_json
from llmkd.labels.preference import Logits, Scores, Votes

NAN = math.nan


def of_two(logit, first=NAN):
    """A table of two responses, and the lean to whichever was shown first."""
    return Logits(np.array([[0.0, logit], [-logit, 0.0]]), np.array([[NAN, first], [first, NAN]]))


def summary(*prompts):
    """`summary({"a": annotation, ...}, ...)`, one mapping a prompt, by name."""
    said = [[to_json(name, one) for name, one in prompt.items()] for prompt in prompts]
    return {one["name"]: one for one in annotator_summary(said)}


def test_agreement_counts_pairs_on_which_both_take_a_side():
    found = summary(
        {"a": Scores(np.array([1.0, 0.0, 0.0])), "b": Scores(np.array([3.0, 2.0, 1.0]))},
        {"a": of_two(-2.0), "b": of_two(0.5)},
        {"a": of_two(NAN), "b": of_two(1.0)},
    )
    # a: + + 0, -, nothing; b: + + +, +, +: of three shared sides two are the same
    assert found["a"]["agreement_with"] == {"b": pytest.approx(2 / 3)}
    assert found["b"]["agreement_with"] == {"a": pytest.approx(2 / 3)}
    assert [found[name]["questions"] for name in "ab"] == [4, 5]  # a tie was a question too
    assert list(found) == ["a", "b"] and "first_share" not in summary({"a": of_two(1.0)})["a"]


def test_nobody_agrees_where_nobody_takes_a_side():
    found = summary({"a": of_two(0.0), "b": of_two(1.0)})
    assert found["a"]["agreement_with"] == {"b": None}
    # an annotator that was there for some prompts only cannot be laid beside the other
    found = summary({"a": of_two(1.0), "b": of_two(1.0)}, {"a": of_two(1.0)})
    assert found["a"]["agreement_with"] == {"b": None} and found["a"]["questions"] == 2
    assert annotator_summary([]) == []


@pytest.mark.parametrize(
    ("logit", "first", "share", "disagree"),
    [
        (0.5, 4.0, 1.0, 1.0),  # the first shown wins in both orders
        (0.5, -4.0, 0.0, 1.0),  # the second does
        (2.0, 0.5, 0.5, 0.0),  # one response wins in both orders
        (0.0, 0.0, 0.5, 0.0),  # nobody wins
        (1.0, 1.0, 0.75, 0.0),  # won when shown first, a tie when shown second
    ],
)
def test_leanings_of_one_question(logit, first, share, disagree):
    # shown first, response i has the logit first + logit; shown second, its rival has first - logit
    found = summary({"a": of_two(logit, first)})["a"]
    assert found["first_lean"] == first
    assert found["first_share"] == share and found["orders_disagree"] == disagree


def test_leanings_are_means_over_questions_asked_in_both_orders():
    found = summary(
        {"a": of_two(0.5, 4.0)},
        {"a": of_two(2.0, -1.0)},
        {"a": of_two(2.0)},  # one order only
        {"a": of_two(NAN, 9.0)},  # no answer
    )["a"]
    assert found["first_lean"] == 1.5 and found["questions"] == 3
    assert found["first_share"] == 0.75 and found["orders_disagree"] == 0.5


def test_votes_know_which_was_shown_first():
    # 5 votes, all for whichever stood first: 2 for the one, 3 for the other
    wins_KK, votes_KK = np.array([[0.0, 2.0], [3.0, 0.0]]), np.array([[0.0, 5.0], [5.0, 0.0]])
    lean = math.log(5.5 / 0.5)
    first_KK = np.array([[NAN, lean], [lean, NAN]])
    found = summary({"a": Votes(wins_KK, votes_KK, first_KK)})["a"]
    assert found["first_lean"] == pytest.approx(2.3979, abs=1e-4)
    assert found["first_share"] == 1.0 and found["orders_disagree"] == 1.0
    assert "first_lean" not in summary({"a": Votes(wins_KK, votes_KK)})["a"]
