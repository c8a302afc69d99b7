"""When the teacher counts how much, and who divides."""

import pytest
import torch

from llmkd.errors import RecipeError
from llmkd.objectives import kd_steps, kd_weight_at, kd_weight_of_fraction, normalise
from llmkd.types import LossTerm


@pytest.mark.parametrize(
    "ratio, steps, expected",
    [(0.173, 208_000, 35_984), (0.2, 180, 36), (0, 9, 0), (1, 9, 9), (0.5, 5, 3)],
)
def test_stage_length_rounds_to_the_nearest_step(ratio, steps, expected):
    assert kd_steps(ratio, steps) == expected


def test_step_transition_is_a_step():
    weights = [kd_weight_at(s, stage_steps=3, weight=0.6) for s in range(5)]
    assert weights == [0.6, 0.6, 0.6, 0.0, 0.0]


def test_linear_falls_on_a_line_after_the_hold():
    weights = [kd_weight_at(s, stage_steps=4, weight=0.8, transition="linear") for s in range(5)]
    assert weights == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    held = [
        kd_weight_at(s, stage_steps=4, weight=0.8, transition="linear", hold=0.5) for s in range(5)
    ]
    assert held == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.0])


def test_linear_ratio_by_hand():
    # w = .8: ratio 4; halfway 2 -> 2/3; at three quarters 1 -> 1/2
    weights = [
        kd_weight_at(s, stage_steps=4, weight=0.8, transition="linear_ratio") for s in (0, 2, 3, 4)
    ]
    assert weights == pytest.approx([0.8, 2 / 3, 0.5, 0.0])


def test_cosine_falls_on_half_a_cosine_after_the_hold():
    # (1 + cos(pi / 4)) / 2 = .8535534 of the weight after a quarter, half of it halfway
    weights = [kd_weight_at(s, stage_steps=4, weight=0.8, transition="cosine") for s in range(6)]
    expected = [0.8, 0.8 * 0.8535534, 0.4, 0.8 * 0.1464466, 0.0, 0.0]
    assert weights == pytest.approx(expected, abs=1e-7)
    held = [
        kd_weight_at(s, stage_steps=4, weight=0.8, transition="cosine", hold=0.5) for s in range(5)
    ]
    assert held == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.0])


def test_constant_is_a_step_and_an_unknown_transition_is_refused():
    weights = [kd_weight_at(s, stage_steps=2, weight=0.6, transition="constant") for s in range(3)]
    assert weights == [0.6, 0.6, 0.0]
    with pytest.raises(RecipeError, match="known: step, constant"):
        kd_weight_at(0, stage_steps=2, weight=0.6, transition="cosin")


def test_less_data_means_more_teacher_evenly_a_halving():
    def weight(fraction):
        return kd_weight_of_fraction(fraction, alpha_full=0.2, alpha_small=0.8)

    # ln .5 / ln .05 = .2313782: .2 + .2313782 * .6
    assert weight(1.0) == 0.2 and weight(0.5) == pytest.approx(0.3388269, abs=1e-7)
    assert weight(0.05) == pytest.approx(0.8) and weight(0.001) == pytest.approx(0.8)
    assert weight(0.25) - weight(0.5) == pytest.approx(weight(0.5) - weight(1.0))
    for fraction, small in ((0.0, 0.8), (1.1, 0.8), (0.5, 1.2)):
        with pytest.raises(RecipeError):
            kd_weight_of_fraction(fraction, alpha_full=0.2, alpha_small=small)


def test_hold_of_the_whole_stage_is_a_step():
    assert kd_weight_at(3, stage_steps=4, weight=0.8, transition="linear", hold=1.0) == 0.8


def test_normalise_divides_by_the_tokens_of_the_step_and_undoes_the_rank_mean():
    term = LossTerm(torch.tensor(6.0), torch.tensor(3))
    assert normalise(term, 12, world_size=2).item() == 1.0
    assert normalise(term, torch.tensor(12), world_size=2).item() == 1.0
    assert normalise(term, None, world_size=2).item() == 2.0


@pytest.mark.parametrize("tokens", [0, torch.tensor(0), None])
def test_nothing_counted_gives_zero_not_nan(tokens):
    term = LossTerm(torch.tensor(0.0), torch.tensor(0))
    assert normalise(term, tokens, world_size=1).item() == 0.0
