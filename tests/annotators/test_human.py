"""Pairs that people rated, and the file of those they are asked."""

import json

import pytest
from task_kit import write_rows

from llmkd.annotators.base import Item
from llmkd.annotators.checks import checked
from llmkd.annotators.human import HumanAnnotator
from llmkd.errors import AnnotatorError, DataError, MissingFileError, RecipeError

CHAT = [{"role": "user", "content": "hi"}]
ITEMS = [Item(0, "p", ("a", "b", "c")), Item(1, CHAT, ("x", "y"))]


def pair(one, two, prompt="p", **rating):
    return {"prompt": prompt, "response_1": one, "response_2": two, **rating}


ALL = [
    pair("a", "b", wins=2, votes=3),
    pair("c", "a", preferred=1),
    pair("b", "c", preferred="tie"),
    pair("y", "x", CHAT, preferred=2),
]


def human(tmp_path, rows, **keys):
    return HumanAnnotator(write_rows(tmp_path / "rated.jsonl", rows), **keys)


def waiting(tmp_path):
    return [json.loads(line) for line in (tmp_path / "to_rate.jsonl").read_text().splitlines()]


def test_votes_are_found_in_either_order(tmp_path):
    one, two = checked(human(tmp_path, ALL), ITEMS)
    assert one.wins_KK.tolist() == [[0, 2, 0], [1, 0, 0.5], [1, 0.5, 0]]
    assert one.votes_KK.tolist() == [[0, 3, 1], [3, 0, 1], [1, 1, 0]]
    assert two.wins_KK.tolist() == [[0, 1], [0, 0]]  # x, against y first in the file


def test_several_lines_on_one_pair_add_up(tmp_path):
    rows = [pair("x", "y", wins=2, votes=3), pair("y", "x", wins=1.5, votes=2)]
    (found,) = human(tmp_path, rows).annotate([Item(0, "p", ("x", "y"))])
    assert found.wins_KK.tolist() == [[0, 2.5], [2.5, 0]] and found.votes_KK[0, 1] == 5


def test_missing_pairs_are_written_and_rated_ones_found_again(tmp_path):
    annotator = human(tmp_path, ALL[:1])
    with pytest.raises(AnnotatorError, match="3 pairs are not rated") as caught:
        annotator.annotate(ITEMS)
    assert "to_rate.jsonl" in str(caught.value) and "same command again" in str(caught.value)
    rows = waiting(tmp_path)
    assert rows[0] == pair("a", "c", wins=None, votes=None)
    assert rows[2] == pair("x", "y", CHAT, wins=None, votes=None) and len(rows) == 3
    with annotator.file.open("a") as handle:  # as a person does
        for row in rows:
            handle.write(json.dumps({**row, "wins": 1, "votes": 1}) + "\n")
    annotator.load("cpu")
    assert annotator.annotate(ITEMS)[1].wins_KK.tolist() == [[0, 1], [0, 0]]


def test_people_are_asked_once_for_all_items(tmp_path):
    annotator = human(tmp_path, ALL[:1])
    with pytest.raises(AnnotatorError, match="3 pairs are not rated"):
        annotator.prepare(ITEMS)
    assert len(waiting(tmp_path)) == 3
    human(tmp_path, ALL).prepare(ITEMS)


def test_the_file_to_rate_gathers_calls_and_keeps_what_is_filled_in(tmp_path):
    annotator = human(tmp_path, [])
    with pytest.raises(AnnotatorError, match="1 pairs are not rated"):
        annotator.annotate(ITEMS[1:])
    (row,) = waiting(tmp_path)
    write_rows(tmp_path / "to_rate.jsonl", [{**row, "wins": 1, "votes": 1}])
    with pytest.raises(AnnotatorError, match=r"3 pairs .* holds the 4 that wait"):
        annotator.annotate(ITEMS[:1])
    assert {**row, "wins": 1, "votes": 1} in waiting(tmp_path)
    annotator = human(tmp_path, ALL[1:2])
    with pytest.raises(AnnotatorError, match="holds the 3 that wait"):  # a, c is rated by now
        annotator.annotate(ITEMS)


def test_unfilled_lines_are_not_rated(tmp_path):
    with pytest.raises(AnnotatorError, match="1 pairs"):
        human(tmp_path, [pair("x", "y", CHAT, wins=None, votes=None)]).annotate(ITEMS[1:])


def test_partial_takes_what_there_is(tmp_path):
    annotator = human(tmp_path, ALL[:1], partial=True)
    (found,) = checked(annotator, ITEMS[:1])
    assert found.votes_KK.tolist() == [[0, 3, 0], [3, 0, 0], [0, 0, 0]]
    with pytest.raises(AnnotatorError, match="1 pairs"):  # of this item nothing is rated
        annotator.annotate(ITEMS)


def test_the_fingerprint_stays_while_people_rate(tmp_path):
    assert human(tmp_path, ALL).fingerprint == human(tmp_path, ALL[:1]).fingerprint


def test_no_file_yet_holds_no_ratings(tmp_path):
    with pytest.raises(AnnotatorError, match="1 pairs"):
        HumanAnnotator(tmp_path / "new.jsonl", folder=tmp_path / "run").annotate(ITEMS[1:])
    assert (tmp_path / "run" / "to_rate.jsonl").is_file()


@pytest.mark.parametrize(
    "row, problem",
    [
        (pair("a", "b", wins=4, votes=3), "more wins than the 3 votes"),
        (pair("a", "b", wins=-1, votes=3), "wins: -1: must be a number, at least 0"),
        (pair("a", "b", wins=1), "votes: None"),
        (pair("a", "b", wins=True, votes=1), "wins: True"),
        (pair("a", "b", wins=float("nan"), votes=1), "wins: nan"),
        (pair("a", "b", preferred=3), "must be 1, 2 or 'tie'"),
        (pair("a", "b", preferred=1, votes=1), "stand alone"),
        (pair("a", "a", preferred=1), "is both responses"),
        (pair("a", None, preferred=1), "no text as response_2"),
        (pair("a", "b", 3, preferred=1), "is no prompt"),
        (pair("a", "b", [{"role": "user"}], preferred=1), "is no prompt"),
        ([1], "is no mapping"),
    ],
)
def test_lines_that_are_no_rating(tmp_path, row, problem):
    with pytest.raises(DataError, match=problem) as caught:
        human(tmp_path, [ALL[0], row])
    assert "rated.jsonl, line 2" in str(caught.value)


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(MissingFileError, match="no such folder"):
        HumanAnnotator(tmp_path / "gone" / "rated.jsonl")
    with pytest.raises(RecipeError, match="the file of the ratings itself"):
        HumanAnnotator(tmp_path / "a.jsonl", to_rate=tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match=r"line 1: .* is not JSON"):
        HumanAnnotator(tmp_path / "b.jsonl")
