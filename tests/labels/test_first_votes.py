"""Votes that know which response was shown first survive JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from llmkd.labels.pairs import from_json, to_json
from llmkd.labels.preference import Votes

NAN = math.nan


def through_json(votes):
    name, found = from_json(json.loads(json.dumps(to_json("judge", votes), allow_nan=False)))
    assert name == "judge" and type(found) is Votes
    return found


@given(
    st.integers(2, 4).flatmap(
        lambda k: st.lists(st.floats(-9, 9) | st.just(NAN), min_size=k * k, max_size=k * k)
    )
)
def test_first_votes_are_what_they_were(leans):
    count = math.isqrt(len(leans))
    first_KK = np.array(leans).reshape(count, count)
    wins_KK, votes_KK = np.full((count, count), 1.5), np.full((count, count), 3.0)
    found = through_json(Votes(wins_KK, votes_KK, first_KK))
    assert_array_equal(found.wins_KK, wins_KK)
    assert_array_equal(found.votes_KK, votes_KK)
    assert_array_equal(found.first_KK, first_KK)
    assert_array_equal(found.logits(), np.zeros((count, count)))  # half of all votes


def test_votes_without_them_stay_without():
    votes = Votes(np.array([[0.0, 2.0], [1.0, 0.0]]), np.array([[0.0, 3.0], [3.0, 0.0]]))
    assert "first" not in to_json("judge", votes)
    found = through_json(votes)
    assert found.first_KK is None
    assert found.logits()[0, 1] == pytest.approx(math.log(2.5 / 1.5))
