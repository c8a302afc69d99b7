"""Responses that an annotator need not see."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkd.data.screen import screen


def test_each_response_is_dropped_for_one_reason():
    texts = ["a", " ", "b", "a\n", "", "c", "c"]
    done = [True, True, False, True, False, False, True]
    # the first c is cut off, so the second is no duplicate of one that is kept
    assert screen(texts, done) == ([0, 6], {"duplicate": 1, "truncated": 2, "empty": 2})
    assert screen(texts, done, drop_truncated=False) == (
        [0, 2, 5],
        {"duplicate": 2, "truncated": 0, "empty": 2},
    )


def test_case_and_inner_white_space_make_another_response():
    assert screen(["a b", "A b", "a  b"], [True] * 3)[0] == [0, 1, 2]


def test_all_alike_leaves_one_and_none_leaves_none():
    assert screen(["x"] * 4, [True] * 4) == ([0], {"duplicate": 3, "truncated": 0, "empty": 0})
    assert screen([], []) == ([], {"duplicate": 0, "truncated": 0, "empty": 0})


def test_marks_must_match():
    with pytest.raises(ValueError, match="2 responses and 1 marks"):
        screen(["a", "b"], [True])


@given(st.lists(st.tuples(st.sampled_from(["a", "b ", " a", "c", " ", ""]), st.booleans())))
def test_kept_are_different_finished_and_said_something(rows):
    texts, done = [text for text, _ in rows], [mark for _, mark in rows]
    kept, dropped = screen(texts, done)
    assert len(kept) + sum(dropped.values()) == len(rows)
    assert kept == sorted(set(kept))
    said = [texts[place].strip() for place in kept]
    assert len(set(said)) == len(said) and all(said) and all(done[place] for place in kept)
    assert set(said) == {text.strip() for text, mark in rows if mark and text.strip()}
