"""The arms a selection is judged by, and their table."""

import pytest

from llmkd.errors import RecipeError
from llmkd.selection import controls, four_cells, has_controls

RESULTS = {"el2n_soft": 3.0, "el2n_hard": 3.5, "random_soft": 3.25, "random_hard": 3.375}


def test_the_four_arms():
    assert controls("el2n") == {
        "el2n_soft": {"selection": "el2n"},
        "el2n_hard": {"selection": "el2n", "kd_weight": 0.0},
        "random_soft": {"selection": "random"},
        "random_hard": {"selection": "random", "kd_weight": 0.0},
    }
    arms = controls("rad", kd_weight=0.7, seed=3)
    assert {arm["seed"] for arm in arms.values()} == {3}
    assert [arm["kd_weight"] for arm in arms.values()] == [0.7, 0.0, 0.7, 0.0]


def test_the_table_by_hand():
    lines = four_cells("el2n", RESULTS).splitlines()
    assert [line.split() for line in lines] == [
        ["nats/token"],
        ["rows", "soft", "labels", "hard", "labels"],
        ["el2n", "3.0000", "3.5000"],
        ["random", "3.2500", "3.3750"],
        ["el2n", "-", "random", "-0.2500", "+0.1250"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1


def test_seeds_are_paired():
    # differences -.1 and -.3: mean -.2, standard deviation .1414, standard error .1
    seeds = {**{arm: [1.0, 2.0] for arm in RESULTS}, "el2n_soft": [0.9, 1.7]}
    text = four_cells("el2n", seeds)
    assert "-0.2000 +- 0.1000" in text and "+0.0000 +- 0.0000" in text and "2 seeds" in text


def test_mistakes():
    assert has_controls("el2n", {**RESULTS, "baseline": 4}) and not has_controls("rad", RESULTS)
    assert not has_controls("random", RESULTS)
    with pytest.raises(RecipeError, match="is the control itself"):
        controls("random")
    with pytest.raises(RecipeError, match="did you mean 'el2n'"):
        controls("el2")
    for weight in (0, 1.5):
        with pytest.raises(RecipeError, match="kd_weight"):
            controls("el2n", kd_weight=weight)
    with pytest.raises(RecipeError, match="margin_soft is missing"):
        four_cells("margin", RESULTS)
    with pytest.raises(RecipeError, match="same seeds"):
        four_cells("el2n", {**RESULTS, "el2n_soft": [1, 2]})
    with pytest.raises(RecipeError, match="one finite number"):
        four_cells("el2n", {**RESULTS, "el2n_soft": float("nan")})
