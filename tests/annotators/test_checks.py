"""What annotators may give, and what is refused before anybody learns from it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmkd.annotators.base import Item
from llmkd.annotators.checks import as_annotation, checked
from llmkd.errors import AnnotatorError, RecipeError
from llmkd.labels.preference import Logits, Scores, Votes

NAN, INF = float("nan"), float("inf")
ITEM = Item(7, "p", ("a", "b"))


def says(*answers, items=(ITEM,)):
    """`checked` of an annotator that gives these answers."""
    return checked(SimpleNamespace(name="mine", annotate=lambda _: list(answers)), items)


def table(*rows):
    return np.array(rows, dtype=np.float64)


def test_scores_are_lists_arrays_or_tensors():
    for value in ([1, 2.5, -3], np.array([1, 2.5, -3], np.float32), torch.tensor([1, 2.5, -3])):
        found = as_annotation(value, 3)
        assert isinstance(found, Scores) and found.scores_K.dtype == np.float64
        assert found.scores_K.tolist() == [1, 2.5, -3]
    grad = torch.tensor([1.0, 2.0], requires_grad=True)
    assert as_annotation(grad, 2).logits().tolist() == [[0, -1], [1, 0]]
    assert as_annotation((1, 2, 4), 3).scores_K.tolist() == [1, 2, 4]  # no pair of numbers


def test_a_table_is_logits_and_none_is_not_asked():
    found = as_annotation([[0, 1.5, None], [-1.5, 0, 2], [None, -2, 0]], 3)
    assert isinstance(found, Logits)
    np.testing.assert_array_equal(found.logits_KK, [[0, 1.5, NAN], [-1.5, 0, 2], [NAN, -2, 0]])


def test_of_two_a_number_is_the_logit_and_two_numbers_are_votes():
    assert as_annotation(1.25, 2).logits().tolist() == [[0, 1.25], [-1.25, 0]]
    assert as_annotation(np.float32(-1), 2).logits().tolist() == [[0, -1], [1, 0]]
    found = as_annotation((4, 5), 2)
    assert isinstance(found, Votes)
    assert found.wins_KK.tolist() == [[0, 4], [1, 0]]
    assert found.votes_KK.tolist() == [[0, 5], [5, 0]]
    assert found.logits()[0, 1] == pytest.approx(np.log(3))  # Haldane, 4 of 5: log 4.5 / 1.5


def test_a_tuple_of_tables_is_wins_and_votes():
    found = as_annotation(([[9, 2.5], [0.5, 9]], [[9, 3], [3, 9]]), 2)  # the diagonal is nobody's
    assert found.wins_KK.tolist() == [[0, 2.5], [0.5, 0]]
    assert found.votes_KK.tolist() == [[0, 3], [3, 0]]


@pytest.mark.parametrize(
    "value, count, problem",
    [
        ([1, 2, 3], 2, r"scores of shape \[3\] for 2 responses"),
        ([1, NAN], 2, "not all of them finite"),
        ([1, None], 2, "no number, list or table"),
        ([INF, 1], 2, "not all of them finite"),
        (1.0, 3, "one number for 3 responses"),
        (NAN, 2, "only NaN"),
        (INF, 2, "infinite"),
        (True, 2, r"a vote for the first of two is \(1, 1\)"),
        ("A", 2, "no number, list or table"),
        (["1", "2"], 2, "no number, list or table"),
        (None, 2, "no number, list or table"),
        ({"a": 1}, 2, "no number, list or table"),
        ([[0, 1], [1]], 2, "returned"),
        ([[0, 1], [1, 0]], 2, "not antisymmetric: entry 0, 1 is 1, entry 1, 0 is 1"),
        ([[0.5, 0.8], [0.2, 0.5]], 2, "not antisymmetric.*probabilities become logits"),
        ([[0, NAN], [NAN, 0]], 2, "NaN among its logits"),
        ([[0, None], [None, 0]], 2, "no logit of any pair"),
        ([[0, None], [1, 0]], 2, "not antisymmetric"),
        ([[0, 1, 2], [-1, 0, 1], [-2, -1, 0]], 2, r"logits of shape \[3, 3\] for 2"),
        (np.zeros((2, 2, 2)), 2, r"shape \[2, 2, 2\]"),
        ((6, 5), 2, "wins beyond 0 and the votes: of responses 0 and 1, wins 6 and -1"),
        ((-1, 5), 2, "of responses 0 and 1, wins -1 and 6, votes 5 and 5"),
        ((0.3, 0.9), 2, "no number of votes; two scores are a list"),
        ((1, 2), 3, "tuple of two numbers for 3"),
        (([[0, 1], [1, 0]], [[0, 3], [3, 0]]), 2, "wins of both that are not the votes"),
        (([[0, 4], [0, 0]], [[0, 3], [3, 0]]), 2, "wins beyond 0 and the votes"),
        (([[0, 3], [0, 0]], [[0, 3], [4, 0]]), 2, "other votes the other way round"),
        (([[0, NAN], [0, 0]], [[0, 3], [3, 0]]), 2, "not finite"),
    ],
)
def test_what_a_function_may_not_return(value, count, problem):
    with pytest.raises(AnnotatorError, match=problem) as caught:
        as_annotation(value, count, name="f.py:f", row=12)
    message = str(caught.value)
    assert "annotators: 'f.py:f': row 12: " in message and "a list of K numbers" in message


def test_rounding_of_half_precision_tables_is_no_contradiction():
    odd = np.float32(1.1) - np.float32(0.3)
    found = as_annotation(np.array([[0, odd], [-odd * (1 + 1e-7), 0]]), 2).logits()
    assert found[0, 1] == -found[1, 0] == pytest.approx(odd)


def test_checked_gives_float64_and_leaves_the_annotators_arrays_alone():
    own = table([3, 1.0], [1.0, 5])
    votes = table([0, 2], [2, 0])
    (found,) = says(Votes(own, votes))
    assert own[0, 0] == 3 and found.wins_KK[0, 0] == 0
    (found,) = says(Scores(np.array([1, 2], np.float16), np.array([1, 0], np.float32)))
    assert found.scores_K.dtype == found.variance_K.dtype == np.float64
    lean = table([NAN, 0.5], [0.5, NAN])
    (found,) = says(Logits(table([0, 1], [-1, 0]), lean))
    np.testing.assert_array_equal(found.first_KK, lean)
    assert says(items=()) == []


@pytest.mark.parametrize(
    "answer, problem",
    [
        (Scores(np.array([1.0])), r"scores of shape \[1\] for 2"),
        (Scores(np.array([NAN, 1.0])), "finite"),
        (Scores(np.zeros(2), np.array([1.0, -1])), "variances"),
        (Scores(np.zeros(2), np.ones(3)), "variances of shape"),
        (Scores(np.zeros(2), np.zeros(2)), "several variances of 0"),
        (Logits(table([0, NAN], [NAN, 0])), "only NaN"),
        (Logits(table([0, INF], [-INF, 0])), "infinite"),
        (Logits(table([0, 1], [1, 0])), "antisymmetric"),
        (Logits(table([0, 1], [-1, 0]), table([0, INF], [INF, 0])), "lean"),
        (Logits(table([0, 1], [-1, 0]), np.zeros(2)), "leans of shape"),
        (Votes(table([0, 2], [0, 0]), table([0, 1], [1, 0])), "wins beyond 0 and the votes"),
        ([1, 2], "no Scores, Votes or Logits"),
        (None, "no Scores, Votes or Logits"),
    ],
)
def test_what_an_annotator_may_not_give(answer, problem):
    with pytest.raises(AnnotatorError, match=problem) as caught:
        says(answer)
    assert "annotators: 'mine': row 7: " in str(caught.value)
    assert "run the same command again" in str(caught.value)


def test_one_answer_an_item():
    good = Scores(np.zeros(2))
    with pytest.raises(AnnotatorError, match="rows 7 to 9: gave 1 answers for 2 prompts"):
        says(good, items=(ITEM, Item(9, "p", ("a", "b"))))
    with pytest.raises(AnnotatorError, match="row 7: gave NoneType for 1 prompts"):
        checked(SimpleNamespace(name="mine", annotate=lambda _: None), [ITEM])


def test_an_exception_names_annotator_rows_and_place():
    def broken(_):
        raise KeyError("stars")

    with pytest.raises(AnnotatorError, match=r"'mine': row 7: raised KeyError: 'stars'") as caught:
        checked(SimpleNamespace(name="mine", annotate=broken), [ITEM])
    assert "test_checks.py, line " in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_our_own_errors_and_interrupts_pass():
    for error in (RecipeError("own words"), KeyboardInterrupt()):

        def broken(_, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            checked(SimpleNamespace(name="mine", annotate=broken), [ITEM])
        assert caught.value is error


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=5))
def test_scores_and_their_table_of_differences_say_the_same(scores):
    table_KK = [[a - b for b in scores] for a in scores]
    one, two = as_annotation(scores, len(scores)), as_annotation(table_KK, len(scores))
    np.testing.assert_allclose(one.logits(), two.logits(), atol=1e-12)
