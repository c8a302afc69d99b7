"""The paired bootstrap: cases whose distribution is known, symmetry, and coverage."""

import numpy as np
import pytest

from llmkd.errors import DataError, RecipeError
from llmkd.evaluation import paired
from llmkd.evaluation.paired import paired_difference


def test_a_constant_difference_has_no_spread():
    b = [np.array([0.0, 0.25, 0.5])] * 2
    found = paired_difference([row + 0.25 for row in b], b, draws=200)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)
    assert found.per_seed == (0.25, 0.25) and found.adds


def test_no_difference_adds_nothing():
    rows = [np.random.default_rng(s).integers(0, 2, 50) for s in range(3)]
    found = paired_difference(rows, rows, draws=200)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0) and not found.adds


def test_swapping_the_arms_mirrors_the_interval():
    make = np.random.default_rng(1)
    a = [make.random(40) < 0.7 for _ in range(3)]
    b = [make.random(40) < 0.6 for _ in range(3)]
    there, back = paired_difference(a, b, draws=500), paired_difference(b, a, draws=500)
    assert back.mean == -there.mean and back.per_seed == tuple(-gap for gap in there.per_seed)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert there.low < there.mean < there.high
    assert there == paired_difference(a, b, draws=500)
    assert there != paired_difference(a, b, draws=500, seed=1)


def test_seeds_are_drawn_with_replacement():
    # Gaps of 0 in one seed and 1 in the other: a draw of two seeds gives 0, 1/2, 1 with
    # probability 1/4, 1/2, 1/4, so the middle 95 % reach from 0 to 1 and the middle 40 % are 1/2.
    a, b = [np.zeros(30), np.ones(30)], [np.zeros(30)] * 2
    wide, narrow = paired_difference(a, b), paired_difference(a, b, level=0.4)
    assert (wide.low, wide.high, wide.mean) == (0.0, 1.0, 0.5)
    assert (narrow.low, narrow.high) == (0.5, 0.5)
    assert wide.per_seed == (0.0, 1.0) and not wide.adds


def test_all_seeds_meet_the_same_drawn_examples():
    # Two examples with gaps 0 and 1 in every one of 100 seeds: again 0, 1/2, 1. Examples drawn for
    # each seed anew would average out to an interval close around 1/2.
    a, b = [np.array([0.0, 1.0])] * 100, [np.zeros(2)] * 100
    found = paired_difference(a, b)
    assert (found.low, found.high) == (0.0, 1.0)


def test_one_seed_is_the_bootstrap_over_examples():
    # 100 gaps, half of them 1: the mean of a draw has standard deviation sqrt(.25 / 100) = .05
    a = [np.repeat([0.0, 1.0], 50)]
    found = paired_difference(a, [np.zeros(100)])
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)
    assert found.adds


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # An effect of .1, a spread of .1 between ten seeds and of .5 between 100 examples, and noise.
    make = np.random.default_rng(0)
    covered = found_something = 0
    for _ in range(300):
        seeds, examples = make.normal(0, 0.1, (10, 1)), make.normal(0, 0.5, (1, 100))
        gaps = 0.1 + seeds + examples + make.normal(0, 0.2, (10, 100))
        found = paired_difference(list(gaps), [np.zeros(100)] * 10, draws=300)
        covered += found.low <= 0.1 <= found.high
        found_something += found.adds
    assert 0.89 <= covered / 300 <= 0.98
    assert 0.1 < found_something / 300 < 0.9


def test_many_examples_are_drawn_in_slices(monkeypatch):
    a = [np.random.default_rng(0).random(20)]
    whole = paired_difference(a, [np.zeros(20)], draws=100)
    monkeypatch.setattr(paired, "AT_ONCE", 60)
    assert paired_difference(a, [np.zeros(20)], draws=100) == whole


@pytest.mark.parametrize(
    "a, b",
    [
        ([], []),
        ([np.zeros(3)], [np.zeros(3)] * 2),
        ([np.zeros(3)], [np.zeros(4)]),
        ([np.zeros(3), np.zeros(4)], [np.zeros(3), np.zeros(4)]),
        ([np.zeros((3, 2))], [np.zeros((3, 2))]),
        ([np.zeros(0)], [np.zeros(0)]),
        ([np.array([np.nan])], [np.zeros(1)]),
    ],
)
def test_what_does_not_pair_is_refused(a, b):
    with pytest.raises(DataError):
        paired_difference(a, b, draws=10)


@pytest.mark.parametrize("settings", [{"draws": 0}, {"level": 1.0}, {"level": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(RecipeError, match=next(iter(settings))):
        paired_difference([np.zeros(2)], [np.ones(2)], **settings)
