"""EL2N, margin and k-center: values worked by hand, and what must not matter."""

import numpy as np
import pytest
import torch
from conftest import tiny_llama, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.errors import DataError
from llmkd.selection import SelectionConfig, find
from llmkd.selection.el2n import error_norm
from llmkd.selection.forward import row_means
from llmkd.selection.kcenter import greedy_centers
from llmkd.selection.margin import unsure

# Two positions over three tokens; the gold ones are 0 and 1.
PROBS = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]], dtype=torch.float64)
GOLD = torch.tensor([[0, 1]])
BOTH = torch.ones(1, 2, dtype=torch.bool)


def test_error_norm_by_hand():
    # (-.5, .3, .2): sqrt(.25 + .09 + .04) = sqrt(.38); (.1, -.2, .1): sqrt(.06)
    expected = (0.38**0.5 + 0.06**0.5) / 2
    assert error_norm(PROBS.log(), GOLD, BOTH).item() == pytest.approx(expected, abs=1e-12)


def test_error_norm_of_a_sure_model():
    sure = torch.tensor([[[50.0, 0.0, 0.0]]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert error_norm(sure, torch.tensor([[0]]), mask).item() == pytest.approx(0, abs=1e-6)
    wrong = error_norm(sure, torch.tensor([[2]]), mask).item()
    assert wrong == pytest.approx(2**0.5, abs=1e-6)


def test_margin_by_hand():
    # margins .5 - .3 and .8 - .1
    assert unsure(PROBS.log(), GOLD, BOTH).item() == pytest.approx(1 - (0.2 + 0.7) / 2, abs=1e-12)
    assert unsure(torch.zeros(1, 2, 3), GOLD, BOTH).item() == pytest.approx(1.0)


@pytest.mark.parametrize("score", [error_norm, unsure])
def test_what_lies_under_the_mask_does_not_matter(score):
    logits, mask = PROBS.log(), torch.tensor([[True, False]])
    alone = score(logits[:, :1], GOLD[:, :1], mask[:, :1])
    logits[:, 1], gold = float("nan"), torch.tensor([[0, -100]])
    assert torch.equal(score(logits, gold, mask), alone)
    assert score(logits, gold, ~BOTH).item() == float("-inf")


def test_row_means_are_of_each_row():
    values, mask = torch.tensor([[1.0, 2.0, 6.0], [4.0, 9.0, 9.0]]), torch.ones(2, 3).bool()
    mask[1, 1:] = False
    assert row_means(values, mask).tolist() == [3.0, 4.0]


def test_margin_and_rad_share_their_scores_and_rad_draws():
    rows, model = token_rows(20), tiny_llama(1)
    margin, top = find("margin")(rows, 6, seed=0, model=model)
    gains, drawn = find("rad")(rows, 6, seed=0, model=model)
    assert np.array_equal(margin, gains)
    assert list(drawn) == sorted(drawn) and set(drawn) != set(top)
    settings = SelectionConfig(selection_rad_mistakes=0)  # nobody is wrong: the best rows
    assert set(find("rad")(rows, 6, seed=0, model=model, config=settings)[1]) == set(top)


def test_greedy_centers_by_hand():
    # on a line: from 0 the farthest is 10; then 4 (4 away; 5 is 5 away: taken first); then 4, 1
    points = torch.tensor([[0.0], [1.0], [4.0], [5.0], [10.0]])
    order, distances = greedy_centers(points, 5, first=0)
    assert order.tolist() == [0, 4, 3, 1, 2]
    assert distances.tolist() == [10.0, 10.0, 5.0, 1.0, 1.0]
    assert greedy_centers(points, 2, first=3)[0].tolist() == [3, 0]  # 0 and 10 tie: the lower row


def test_equal_points_are_all_taken_in_the_end():
    order, distances = greedy_centers(torch.ones(4, 3), 4, first=2)
    assert order.tolist() == [2, 0, 1, 3] and not distances.any()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(0, 1000))
def test_each_distance_is_the_radius_of_those_before_and_fewer_are_a_prefix(count, seed):
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    order, distances = greedy_centers(points, count, first=seed % count)
    assert sorted(order.tolist()) == list(range(count))
    assert (np.diff(distances) <= 0).all()
    keep = 1 + seed % count
    assert order[:keep].tolist() == greedy_centers(points, keep, first=seed % count)[0].tolist()
    gaps = torch.cdist(points, points).double().numpy()
    for k in range(1, count):  # distance k is how far the farthest point was from the k before it
        radius = gaps[:, order[:k]].min(1).max()
        assert distances[k] == pytest.approx(radius, abs=1e-4)


def test_the_scores_of_more_centers_hold_for_fewer():
    rows, model = token_rows(15), tiny_llama(3)
    scores, _ = find("kcenter")(rows, 12, seed=4, model=model)
    assert np.isfinite(scores).sum() == 12
    for keep in range(1, 13):
        kept = find("kcenter")(rows, keep, seed=4, model=model)[1]
        again = find("kcenter").pick(scores, keep, seed=4, config=SelectionConfig())
        assert set(kept.tolist()) == set(again.tolist())
    with pytest.raises(DataError, match="kcenter scores what it chose"):
        find("kcenter").pick(scores, 13, seed=4, config=SelectionConfig())


def test_centers_come_from_the_seed_and_spread():
    rows, model = token_rows(15), tiny_llama(3)
    firsts = {find("kcenter")(rows, 1, seed=s, model=model)[1][0] for s in range(12)}
    assert len(firsts) > 3
    with pytest.raises(DataError, match="0 rows"):
        greedy_centers(torch.ones(3, 2), 0, first=0)


def test_hidden_states_are_pooled_over_real_tokens():
    # one row alone equals the mean over its own tokens, taken from the model directly
    rows, model = token_rows(5), tiny_llama(1)
    from llmkd.selection.forward import measure_rows
    from llmkd.selection.kcenter import mean_hidden

    found = measure_rows(rows, mean_hidden, model=model, config=SelectionConfig(), pad_token_id=0)
    for row, mean in zip(rows, found, strict=True):
        hidden = model.model(torch.tensor([row["input_ids"]])).last_hidden_state
        np.testing.assert_allclose(mean, hidden[0].mean(0).detach(), atol=1e-5)
