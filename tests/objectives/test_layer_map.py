"""Which teacher layer each student layer learns from."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkd.errors import RecipeError
from llmkd.objectives.layer_map import layer_map

SIZES = st.tuples(st.integers(1, 48), st.integers(1, 48)).map(sorted)


@pytest.mark.parametrize(
    "students, teachers, how, expected",
    [
        (4, 12, "uniform", (3, 6, 9, 12)),  # the paper's student
        (3, 6, "uniform", (2, 4, 6)),
        (1, 5, "uniform", (5,)),
        (4, 12, "last", (9, 10, 11, 12)),
        (2, 3, "last", (2, 3)),
        (3, 12, [1, 6, 12], (1, 6, 12)),
        (2, 2, "uniform", (1, 2)),
    ],
)
def test_maps_by_hand(students, teachers, how, expected):
    assert layer_map(students, teachers, how) == expected


@given(students=st.integers(1, 12), share=st.integers(1, 6))
def test_uniform_steps_evenly_up_to_the_last_layer(students, share):
    layers = (0, *layer_map(students, students * share, "uniform"))
    assert {b - a for a, b in pairwise(layers)} == {share}
    assert layers[-1] == students * share


@given(SIZES, st.data())
def test_last_and_lists_hold_what_they_say(sizes, data):
    students, teachers = sizes
    last = layer_map(students, teachers, "last")
    assert last == tuple(range(1, teachers + 1))[-students:]
    chosen = sorted(
        data.draw(st.sets(st.integers(1, teachers), min_size=students, max_size=students), "layers")
    )
    assert layer_map(students, teachers, chosen) == tuple(chosen)


@given(SIZES)
def test_a_refused_uniform_map_offers_a_list_that_works(sizes):
    students, teachers = sizes
    if teachers % students == 0:
        assert len(layer_map(students, teachers)) == students
        return
    with pytest.raises(RecipeError) as caught:
        layer_map(students, teachers, "uniform")
    offered = str(caught.value).split("'[")[1].split("]'")[0]
    layers = [int(n) for n in offered.split(",")]
    assert layer_map(students, teachers, layers) == tuple(layers) and layers[-1] == teachers


def test_five_of_twelve_is_refused_with_three_ways_out():
    with pytest.raises(RecipeError) as caught:
        layer_map(5, 12, "uniform")
    assert str(caught.value).splitlines() == [
        "layer_map: 'uniform': 12 teacher layers cannot be shared out evenly among 5",
        "  - an explicit list: --layer_map '[2, 5, 7, 10, 12]'",
        "  - the last 5: --layer_map last",
        "  - a number of layers that divides 12: --student_layers 1, 2, 3, 4, 6, 12",
    ]


@pytest.mark.parametrize(
    "students, how, key, part",
    [
        (2, "first", "layer_map", "known: uniform, last"),
        (2, [1], "layer_map", "names 1 layers, but the student has 2"),
        (2, [2, 1], "layer_map", "must ascend"),
        (2, [3, 3], "layer_map", "must ascend"),
        (2, [0, 1], "layer_map", "1..4"),
        (2, [1, 5], "layer_map", "1..4"),
        (2, [1, 2.0], "layer_map", "whole numbers"),
        (2, [True, 2], "layer_map", "whole numbers"),
        (5, "last", "student_layers", "1..4"),
        (0, "uniform", "student_layers", "1..4"),
    ],
)
def test_wrong_maps_are_refused(students, how, key, part):
    with pytest.raises(RecipeError, match=rf"^{key}: ") as caught:
        layer_map(students, 4, how)
    assert part in str(caught.value)


def test_the_error_names_the_key_of_the_caller():
    with pytest.raises(RecipeError, match=r"^student_copy_layers: "):
        layer_map(2, 4, [2, 1], key="student_copy_layers")
