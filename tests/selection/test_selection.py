"""The table of selections, the median of SALT_DS, ties, padding, caching, and the control."""

import numpy as np
import pytest
import torch
from conftest import tiny_llama, token_rows
from datasets import Dataset

from llmkd.errors import DataError, MissingFileError, RecipeError, TeacherError
from llmkd.selection import (
    SELECTIONS,
    SelectionConfig,
    find,
    histogram,
    read_scores,
    save_scores,
    selection,
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


@pytest.mark.parametrize("name", ["salt_ds", "el2n", "margin", "rad", "kcenter"])
def test_scores_do_not_depend_on_the_batch_or_its_padding(name):
    rows, model = token_rows(11), tiny_llama(4)
    scores = [
        find(name)(rows, 5, seed=3, model=model, config=SelectionConfig(selection_batch_size=size))
        for size in (1, 4, 11)
    ]
    for other, kept in scores[1:]:
        finite = np.isfinite(scores[0][0])
        assert np.array_equal(finite, np.isfinite(other)) and finite.any()
        np.testing.assert_allclose(other[finite], scores[0][0][finite], atol=2e-5)
        assert set(kept) == set(scores[0][1])


@pytest.mark.parametrize("name", sorted(SELECTIONS))
@pytest.mark.parametrize("keep", [1, 7, 24])
def test_every_selection_gives_scores_and_so_many_rows_for_its_seed(name, keep):
    rows, model, settings = token_rows(24), tiny_llama(2), SelectionConfig(selection_min_kept=0)
    settings.selection_top_k = 40  # the whole vocabulary: every row has a score
    scores, kept = find(name)(rows, keep, seed=1, model=model, config=settings)
    assert scores.shape == (24,) and scores.dtype == np.float64 and kept.dtype == np.int64
    assert len(set(kept.tolist())) == keep and kept.min() >= 0 and kept.max() < 24
    assert np.isfinite(scores[kept]).all()
    again, same = find(name)(rows, keep, seed=1, model=model, config=settings)
    assert np.array_equal(scores, again) and np.array_equal(kept, same)
    with pytest.raises(DataError, match="25 rows"):
        find(name)(rows, 25, seed=1, model=model, config=settings)


def test_a_row_of_one_token_has_nothing_to_score():
    rows = Dataset.from_list([{"input_ids": [5]}, {"input_ids": [5, 6, 7]}, {"input_ids": [1, 2]}])
    for name in ("salt_ds", "el2n", "margin", "rad"):
        settings = SelectionConfig(selection_top_k=40)
        scores, kept = find(name)(rows, 2, seed=0, model=tiny_llama(), config=settings)
        assert np.isneginf(scores).tolist() == [True, False, False]
        assert sorted(kept.tolist()) == [1, 2]
        with pytest.raises(DataError, match="only 2 of 3 rows have a score"):
            find(name)(rows, 3, seed=0, model=tiny_llama(), config=settings)


def test_a_model_of_nan_is_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    for name in ("el2n", "margin", "kcenter"):
        with pytest.raises(TeacherError, match="gives NaN on 6 of 6 rows"):
            find(name)(token_rows(6), 2, seed=0, model=model)


def test_top_rows_takes_the_highest_and_breaks_ties_by_row():
    scores = np.array([1.0, 3.0, -np.inf, 3.0, 2.0])
    assert top_rows(scores, 3).tolist() == [1, 3, 4]
    with pytest.raises(DataError, match="only 4 of 5 rows"):
        top_rows(scores, 5)
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="is the score of row 1; 1 of 3"):
            top_rows(np.array([1.0, bad, 2.0]), 1)


def test_random_is_a_selection_like_any_other():
    rows = token_rows(50)
    (one, kept), (again, _) = (find("random")(rows, 9, seed=1) for _ in range(2))
    assert np.array_equal(one, again) and np.array_equal(kept, top_rows(one, 9))
    assert not np.array_equal(one, find("random")(rows, 9, seed=2)[0])


def test_scores_are_a_column_that_knows_its_rows(tmp_path):
    path, scores = tmp_path / "a" / "scores.parquet", np.array([0.5, -np.inf, 2.25])
    save_scores(path, scores, "rows-1")
    assert np.array_equal(read_scores(path, 3, "rows-1"), scores)
    with pytest.raises(DataError, match="text, tokenizer or packing differ"):
        read_scores(path, 3, "rows-2")
    with pytest.raises(MissingFileError, match="llmkd select"):
        read_scores(tmp_path / "none.parquet", 3, "rows-1")


def test_scores_know_their_selection(tmp_path):
    path = tmp_path / "scores.parquet"
    save_scores(path, np.array([1.0]), "rows-1", "margin")
    assert read_scores(path, 1, "rows-1", "margin") == read_scores(path, 1, "rows-1") == [1.0]
    with pytest.raises(DataError, match="holds scores of margin, but this run selects by el2n"):
        read_scores(path, 1, "rows-1", "el2n")


def test_histogram_counts_what_was_kept():
    scores = np.array([0.0, 1.0, 1.0, -np.inf])
    text = histogram(scores, np.array([1]), bins=2)
    assert "1 (0 kept)" in text and "2 (1 kept)" in text and "1 of 4 rows have no score" in text


def test_mistakes():
    with pytest.raises(RecipeError, match="did you mean 'salt_ds'"):
        find("saltds")
    with pytest.raises(RecipeError, match="needs a model to score with"):
        find("el2n")(token_rows(3), 1, seed=0)
    with pytest.raises(RecipeError, match="the scoring model has only 40 tokens"):
        settings = SelectionConfig(selection_top_k=41)
        find("salt_ds")(token_rows(3), 1, seed=0, model=tiny_llama(), config=settings)
    with pytest.raises(ValueError, match="exists already"):
        selection("random")(find("random").score)
    for key, value in (
        ("selection_min_kept", 2),
        ("selection_top_k", 0),
        ("selection_batch_size", 0),
        ("selection_rad_mistakes", -0.1),
        ("selection_rad_mistakes", 1.5),
        ("selection_rad_mistakes", float("nan")),
    ):
        with pytest.raises(RecipeError, match=f"{key}: {value}"):
            SelectionConfig(**{key: value})
