"""A scorer as an annotator: Thurstone's logits, rewards, what it reads, and what is refused."""

import numpy as np
import pytest
import torch
from annotator_kit import ITEMS
from scipy.stats import norm
from score_kit import PROMPT, score_levels, score_llama, score_tokenizer

from llmkd.annotators.base import Annotator, Item
from llmkd.annotators.checks import checked
from llmkd.annotators.config import AnnotatorConfig, make_annotators
from llmkd.annotators.score import LEAST_VARIANCE, ScoreAnnotator
from llmkd.errors import AnnotatorError, RecipeError
from llmkd.models.scorer import SavedLevels, Scorer, save_levels


def save(folder, *, seed=0, chat=False, model=None, **keys):
    model = model or score_llama(seed=seed)
    model.save_pretrained(folder)
    score_tokenizer(chat=chat).save_pretrained(folder)
    save_levels(folder, SavedLevels(score_levels(), PROMPT, **keys))
    return str(folder)


def loaded(name, **keys):
    found = ScoreAnnotator(name, **keys)
    found.load("cpu")
    return found


def table_of(name, inputs):
    return Scorer(name, device="cpu").score(inputs)


def test_means_and_variances_give_thurstones_logits(tmp_path):
    name = save(tmp_path / "s")
    annotator = loaded(name, batch_size=2)
    assert isinstance(annotator, Annotator)
    found = checked(annotator, ITEMS)
    for item, scores in zip(ITEMS, found, strict=True):
        table = table_of(name, list(item.responses))
        np.testing.assert_allclose(scores.scores_K, table.mean_N, atol=1e-4)
        np.testing.assert_allclose(scores.variance_K, table.std_N**2, atol=1e-4)
        gap = (table.mean_N[0] - table.mean_N[1]) / np.hypot(*table.std_N[:2])
        want = norm.logcdf(gap) - norm.logcdf(-gap)
        assert scores.logits()[0, 1] == pytest.approx(want, abs=1e-3) and abs(want) > 1e-3
    assert annotator.counts == {"questions": 5, "cut": 0}
    annotator.release()


def test_rewards_are_mean_minus_k_std(tmp_path):
    name = save(tmp_path / "s")
    (found, _) = checked(loaded(name, spread=False, k=0.5, scale=3.0), ITEMS)
    table = table_of(name, list(ITEMS[0].responses))
    want_K = 3 * (table.mean_N - 0.5 * table.std_N)
    np.testing.assert_allclose(found.scores_K, want_K, atol=1e-4)
    assert found.variance_K is None
    np.testing.assert_allclose(found.logits(), want_K[:, None] - want_K[None, :], atol=1e-4)


def test_templates_show_the_prompt(tmp_path):
    name = save(tmp_path / "s", template="Text: {text}")
    item = Item(0, "a {response} cat", ("a mat", "rain"))
    (own,) = loaded(name).annotate([item])
    np.testing.assert_allclose(own.scores_K, table_of(name, ["a mat", "rain"]).mean_N, atol=1e-4)
    (both,) = loaded(name, template="{prompt}: {response}").annotate([item])
    rows = [{"text": f"a {{response}} cat: {r}"} for r in item.responses]
    np.testing.assert_allclose(both.scores_K, table_of(name, rows).mean_N, atol=1e-4)
    assert np.abs(both.scores_K - own.scores_K).max() > 1e-4


def test_a_scorer_of_chats_reads_the_answer_in_its_turn(tmp_path):
    name = save(tmp_path / "s", chat=True, inputs="messages")
    turns = [{"role": "user", "content": "hi"}]
    (found, other) = loaded(name).annotate([Item(0, turns, ("a", "b")), Item(1, "hi", ("a", "b"))])
    chats = [[*turns, {"role": "assistant", "content": r}] for r in "ab"]
    np.testing.assert_allclose(found.scores_K, table_of(name, chats).mean_N, atol=1e-4)
    np.testing.assert_allclose(found.scores_K, other.scores_K, atol=1e-5)
    assert len(turns) == 1


def test_a_scorer_that_is_certain_still_gives_finite_logits(tmp_path):
    model = score_llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(3000.0)
    name = save(tmp_path / "s", model=model)
    found = checked(loaded(name), ITEMS)
    assert all(np.isfinite(scores.logits()).all() for scores in found)
    assert min(scores.variance_K.min() for scores in found) == LEAST_VARIANCE


def test_a_recipe_names_it(tmp_path):
    name = save(tmp_path / "s")
    entry = {"type": "score", "model": name, "spread": False, "k": 1.0, "name": "mine"}
    config = AnnotatorConfig(annotators=[entry], annotation_batch_size=3)
    (made,) = make_annotators(config, seed=0, folder=tmp_path)
    assert isinstance(made, ScoreAnnotator) and made.name == "mine" and made.batch_size == 3


def test_the_fingerprint_moves_with_what_decides_the_answers(tmp_path):
    name = save(tmp_path / "a")
    first = ScoreAnnotator(name).fingerprint
    assert ScoreAnnotator(name, batch_size=2).fingerprint == first
    others = [{"spread": False}, {"spread": False, "k": 1.0}, {"template": "{response}!"}]
    others += [{"max_length": 90}, {"dtype": "float32"}]
    found = {ScoreAnnotator(name, **keys).fingerprint for keys in others}
    found.add(ScoreAnnotator(save(tmp_path / "b", seed=1)).fingerprint)
    found.add(ScoreAnnotator(save(tmp_path / "c", template="T: {text}")).fingerprint)
    assert len(found | {first}) == 8


def test_nan_is_named(tmp_path):
    name = save(tmp_path / "s")
    annotator = loaded(name)
    with torch.no_grad():
        annotator._scorer.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(AnnotatorError, match="row 0: the model gave NaN"):
        annotator.annotate(ITEMS)
    annotator, tokenizer = loaded(name), score_tokenizer()
    first, second = (tokenizer(" ".join(item.responses))["input_ids"] for item in ITEMS)
    question = tokenizer("\n".join([*PROMPT.questions, score_levels().prefix]))["input_ids"]
    only = sorted({*second} - {*first} - {*question})
    with torch.no_grad():
        annotator._scorer.model.model.embed_tokens.weight[only] = float("nan")
    with pytest.raises(AnnotatorError, match=f"row {ITEMS[1].row}: the model gave NaN"):
        annotator.annotate(ITEMS)
    model = score_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(AnnotatorError, match=r"annotators: .*norm\.weight holds NaN"):
        loaded(save(tmp_path / "n", model=model))


@pytest.mark.parametrize(
    "keys, problem",
    [
        ({"k": 1.0}, "k: 1.0: belongs to rewards"),
        ({"scale": 2.0}, "scale: 2.0: belongs to rewards"),
        ({"k": float("nan"), "spread": False}, "k: nan"),
        ({"scale": 0, "spread": False}, "scale: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"template": "{prompt}"}, "has no {response}"),
        ({"template": "{response} {year}"}, "a place for year"),
        ({"model": 3}, "model: 3"),
        ({"model": "./gone"}, "annotators: './gone': cannot be loaded"),
    ],
)
def test_settings_that_cannot_be(tmp_path, keys, problem):
    with pytest.raises(RecipeError, match=problem):
        ScoreAnnotator(**{"model": save(tmp_path / "s"), **keys})


def test_other_models_are_refused(tmp_path):
    name = save(tmp_path / "s", inputs="images")
    with pytest.raises(AnnotatorError, match="rates images"):
        ScoreAnnotator(name)
    (tmp_path / "s" / "levels.json").unlink()
    with pytest.raises(AnnotatorError, match=r"has no levels\.json: it is no scorer"):
        ScoreAnnotator(name)
