"""Selection: the median of the spec, ties, padding, caching, and the control."""

import numpy as np
import pytest
import torch
from conftest import tiny_llama, token_rows

from llmkd.errors import DataError, MissingFileError, RecipeError
from llmkd.selection import (
    SCORERS,
    SelectionConfig,
    find,
    histogram,
    read_scores,
    save_scores,
    top_rows,
)
from llmkd.selection.salt_ds import median_of_top_k


def logits_for(losses, vocab=12):
    """Logits [1, T, V] in float64 whose loss on token 0 is the one asked for, in nats."""
    p = torch.tensor(losses, dtype=torch.float64).neg().exp()
    rest = ((1 - p) / (vocab - 1))[:, None].expand(-1, vocab - 1)
    return torch.cat([p[:, None], rest], dim=1).log()[None]


def score(losses, kept=None, **settings):
    logits = logits_for(losses)
    mask = (
        torch.ones(1, len(losses), dtype=torch.bool)
        if kept is None
        else torch.tensor([kept]).bool()
    )
    gold = torch.zeros(1, len(losses), dtype=torch.long)
    return median_of_top_k(logits, gold, mask, top_k=12, **settings).item()


def test_median_of_an_even_number_is_the_mean_of_the_middle_two():
    assert score([1, 2, 3, 10]) == pytest.approx(2.5)  # torch.median says 2


def test_tokens_outside_are_removed_not_zeroed():
    assert score([5, 4, 3, 2, 1], kept=[1, 1, 0, 0, 0]) == pytest.approx(4.5)


def test_nothing_kept_is_minus_infinity_not_nan():
    assert score([1, 2], kept=[0, 0]) == float("-inf")


def test_too_small_a_kept_share_is_minus_infinity():
    # loss 5: p = .0067 is the least likely of 12, so top 3 keeps only the first two tokens of five
    logits, gold = logits_for([0.1, 0.2, 5, 5, 5]), torch.zeros(1, 5, dtype=torch.long)
    mask = torch.ones(1, 5, dtype=torch.bool)
    kept = median_of_top_k(logits, gold, mask, top_k=3, min_kept=0.4)
    assert kept.item() == pytest.approx(0.15)
    assert median_of_top_k(logits, gold, mask, top_k=3, min_kept=0.5).item() == float("-inf")


def test_ties_count_for_the_token():
    # all logits equal: no logit is strictly larger, so the token is within even the top 1
    logits, gold = torch.zeros(1, 1, 5), torch.tensor([[4]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert median_of_top_k(logits, gold, mask, top_k=1).item() == pytest.approx(np.log(5), rel=1e-6)


def test_nan_under_the_mask_changes_nothing():
    logits = logits_for([1, 2, 3])
    logits[0, 2] = float("nan")
    mask, gold = torch.tensor([[True, True, False]]), torch.zeros(1, 3, dtype=torch.long)
    assert median_of_top_k(logits, gold, mask, top_k=12).item() == pytest.approx(1.5)


def test_scores_do_not_depend_on_the_batch_or_its_padding():
    rows, model = token_rows(11), tiny_llama(4)
    scores = [
        find("salt_ds")(
            rows, model=model, config=SelectionConfig(selection_batch_size=size), pad_token_id=0
        )
        for size in (1, 4, 11)
    ]
    for other in scores[1:]:
        finite = np.isfinite(scores[0])
        assert np.array_equal(finite, np.isfinite(other)) and finite.any()
        np.testing.assert_allclose(other[finite], scores[0][finite], atol=2e-2)  # bf16 autocast


def test_top_rows_takes_the_highest_and_breaks_ties_by_row():
    scores = np.array([1.0, 3.0, -np.inf, 3.0, 2.0])
    assert top_rows(scores, 3).tolist() == [1, 3, 4]
    with pytest.raises(DataError, match="only 4 of 5 rows"):
        top_rows(scores, 5)


def test_random_is_a_selection_like_any_other():
    rows = token_rows(50)
    one, again = find("random")(rows, seed=1), find("random")(rows, seed=1)
    assert "random" in SCORERS and np.array_equal(one, again)
    assert not np.array_equal(one, find("random")(rows, seed=2))


def test_scores_are_a_column_that_knows_its_rows(tmp_path):
    path, scores = tmp_path / "a" / "scores.parquet", np.array([0.5, -np.inf, 2.25])
    save_scores(path, scores, "rows-1")
    assert np.array_equal(read_scores(path, 3, "rows-1"), scores)
    with pytest.raises(DataError, match="text, tokenizer or packing differ"):
        read_scores(path, 3, "rows-2")
    with pytest.raises(MissingFileError, match="llmkd select"):
        read_scores(tmp_path / "none.parquet", 3, "rows-1")


def test_histogram_counts_what_was_kept():
    scores = np.array([0.0, 1.0, 1.0, -np.inf])
    text = histogram(scores, np.array([1]), bins=2)
    assert "1 (0 kept)" in text and "2 (1 kept)" in text and "1 of 4 rows have no score" in text


def test_mistakes():
    with pytest.raises(RecipeError, match="did you mean 'salt_ds'"):
        find("saltds")
    with pytest.raises(RecipeError, match="selection_min_kept: 2"):
        SelectionConfig(selection_min_kept=2)
    with pytest.raises(RecipeError, match="selection_top_k: 0"):
        SelectionConfig(selection_top_k=0)
