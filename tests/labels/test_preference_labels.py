"""The three kinds of annotation as tables of logits (`llmkd/labels/preference.py`)."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmkd.errors import DataError
from llmkd.labels.preference import Logits, Scores, Votes

NAN = math.nan


def test_scores_are_gaps():
    scores = Scores(np.array([1.0, -0.5, 4.0]))
    assert scores.count == 3
    assert_array_equal(scores.logits(), [[0, 1.5, -3], [-1.5, 0, -4.5], [3, 4.5, 0]])


def test_score_distributions():
    # spec 5: (4, sd .5) against (3, sd .5) is 2.461; the second pair has z = 1 / sqrt(.25 + .75)
    table = Scores(np.array([4.0, 3.0, 2.0]), np.array([0.25, 0.25, 0.75])).logits()
    assert table[0, 1] == pytest.approx(2.461, abs=5e-4)
    assert table[1, 2] == pytest.approx(math.log(0.8413447 / 0.1586553), abs=1e-6)
    assert_allclose(table, -table.T)
    assert_array_equal(np.diag(table), 0)


def test_votes_are_haldane_and_unasked_pairs_nan():
    wins = np.array([[0, 4, 0], [1, 0, 0], [0, 0, 0]])
    table = Votes(wins, np.array([[0, 5, 0], [5, 0, 0], [0, 0, 0]])).logits()
    log3 = math.log(3)
    assert_allclose(table, [[0, log3, NAN], [-log3, 0, NAN], [NAN, NAN, 0]])
    with pytest.raises(DataError):
        Votes(np.array([[0, 6], [0, 0]]), np.array([[0, 5], [5, 0]])).logits()


def test_logits_are_what_they_are():
    table = np.array([[0, 1.2], [-1.2, 0]])
    assert Logits(table).logits() is table and Logits(table).count == 2
