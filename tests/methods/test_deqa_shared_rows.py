"""Ranks share the rows that are scored: each row once, in order, and an error on all of them."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import PartialState
from score_kit import score_levels

from llmkd.errors import NonFiniteError
from llmkd.methods import deqa_finish
from llmkd.methods.deqa_finish import shared_table
from llmkd.models.scorer import ScoreTable

LEVELS = score_levels()
ROWS = [{"row": 10 + number, "text": "a"} for number in range(5)]


def scorer(broken: int | None = None):
    """Its logits are the row's number; it cuts each text; `broken` is a row that it fails on."""

    def score(rows):
        if broken in [row["row"] for row in rows]:
            raise NonFiniteError("NaN")
        made_NL = np.array([[row["row"]] * len(LEVELS.words) for row in rows], dtype=float)
        return ScoreTable.of(made_NL, LEVELS, len(rows))

    return SimpleNamespace(score=score, levels=LEVELS)


def on_ranks(monkeypatch, world, rows=ROWS, **keys):
    """What each rank ends with: a table or its error."""
    said = {}

    def gather(mine):
        said[len(said)] = mine
        return mine

    monkeypatch.setattr(deqa_finish, "gather_object", gather)
    for rank in range(world):  # first what each hands in, ...
        with contextlib.suppress(NonFiniteError, KeyError):
            shared_table(scorer(**keys), rows, rank, world)
    whole = [one for rank in range(world) for one in said[rank]]
    monkeypatch.setattr(deqa_finish, "gather_object", lambda mine: whole)
    ends = []
    for rank in range(world):  # ... then all of it for each
        try:
            ends.append(shared_table(scorer(**keys), rows, rank, world))
        except NonFiniteError as error:
            ends.append(error)
    return ends


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_row_once_in_order(monkeypatch, world):
    _ = PartialState()
    for table in on_ranks(monkeypatch, world):
        assert table.level_logits_NL[:, 0].tolist() == [10, 11, 12, 13, 14]
        assert table.cut == 5 and table.level_logits_NL.shape == (5, 5)


def test_no_row_is_an_empty_table(monkeypatch):
    for table in on_ranks(monkeypatch, 2, rows=[]):
        assert table.level_logits_NL.shape == (0, 5) and len(table) == 0


@pytest.mark.parametrize("broken", [12, 13])
def test_an_error_of_any_rank_is_one_of_all(monkeypatch, broken):
    """A launcher shows that of rank 0 alone, and the others would wait for it for ever."""
    ends = on_ranks(monkeypatch, 2, broken=broken)
    assert [type(end) for end in ends] == [NonFiniteError] * 2
