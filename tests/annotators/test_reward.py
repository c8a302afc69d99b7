"""Reward models: what goes in, what comes out, ensembles, batches, long texts, other models."""

import json

import numpy as np
import pytest
import torch
from annotator_kit import CHAT, ITEMS, save_bert, save_judge, save_reward
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from task_kit import bert_tokenizer
from transformers import BertConfig, BertForTokenClassification

from llmkd.annotators.base import Annotator, Item
from llmkd.annotators.batching import batches, cut_left, cut_middle
from llmkd.annotators.checks import checked
from llmkd.annotators.reward import RewardAnnotator
from llmkd.errors import AnnotatorError, RecipeError
from llmkd.labels.preference import Logits, Scores, Votes


def loaded(models, **keys):
    found = RewardAnnotator(models, **keys)
    found.load("cpu")
    return found


@torch.no_grad()
def alone(model, texts):
    """Logits of each text by itself: no padding, no batch."""
    rows = [torch.tensor([ids]) for ids in texts]
    return np.array([model(row).logits[0].double().numpy() for row in rows])


def chat_ids(tokenizer, item):
    texts = [f"<user>{item.prompt}\n<assistant>{r}\n" for r in item.responses]
    return [tokenizer(text)["input_ids"] for text in texts]


def test_a_decoder_scores_the_chat_template(tmp_path, tokenizer):
    model = save_reward(tmp_path / "rm", tokenizer, chat=True)
    reward = loaded(str(tmp_path / "rm"))
    assert isinstance(reward, Annotator)
    for item, found in zip(ITEMS, checked(reward, ITEMS), strict=True):
        assert isinstance(found, Scores)
        want_K = alone(model, chat_ids(tokenizer, item))[:, 0]
        np.testing.assert_allclose(found.scores_K, want_K, atol=1e-5)
        assert np.ptp(want_K) > 1e-2  # or the test would pass with constants
    assert reward.counts == {"questions": 5, "cut": 0}
    reward.release()


def test_messages_are_one_text_with_the_response(tmp_path, tokenizer):
    model = save_reward(tmp_path / "rm", tokenizer, chat=True)
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    (found,) = loaded(str(tmp_path / "rm")).annotate([Item(0, turns, ("a", "b"))])
    ids = [tokenizer(f"<system>be\n<user>hi\n<assistant>{r}\n")["input_ids"] for r in "ab"]
    np.testing.assert_allclose(found.scores_K, alone(model, ids)[:, 0], atol=1e-5)
    assert turns[0]["content"] == "be" and len(turns) == 2


@torch.no_grad()
def test_an_encoder_scores_the_text_pair(tmp_path):
    model, tokenizer = save_bert(tmp_path / "rm"), bert_tokenizer()
    found = loaded(str(tmp_path / "rm")).annotate(ITEMS)
    for item, scores in zip(ITEMS, found, strict=True):
        rows = [tokenizer(item.prompt, r, return_tensors="pt") for r in item.responses]
        assert rows[0]["token_type_ids"].any()
        want_K = [model(**row).logits.item() for row in rows]
        np.testing.assert_allclose(scores.scores_K, want_K, atol=1e-5)


def test_of_two_outputs_the_difference(tmp_path, tokenizer):
    model = save_reward(tmp_path / "rm", tokenizer, outputs=2, chat=True)
    (found,) = loaded(str(tmp_path / "rm")).annotate(ITEMS[:1])
    want_K2 = alone(model, chat_ids(tokenizer, ITEMS[0]))
    np.testing.assert_allclose(found.scores_K, want_K2[:, 1] - want_K2[:, 0], atol=1e-5)


@pytest.mark.parametrize("pad", [0, None, 40])
def test_batches_change_nothing(tmp_path, tokenizer, pad):
    save_reward(tmp_path / "rm", tokenizer, pad=pad)
    one, many = (
        loaded(str(tmp_path / "rm"), batch_size=size).annotate([*ITEMS, *ITEMS]) for size in (1, 9)
    )
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.scores_K, b.scores_K, atol=1e-5)
    assert np.ptp(one[0].scores_K) > 1e-3


def test_without_a_padding_token_the_last_token_counts_whatever_it_is(tmp_path, tokenizer):
    model = save_reward(tmp_path / "rm", tokenizer, pad=None)
    reward = loaded(str(tmp_path / "rm"))
    rows = [{"input_ids": [5, 6, 0, 0]}, {"input_ids": [7, 8]}]
    want_N = alone(model, [row["input_ids"] for row in rows])[:, 0]
    np.testing.assert_allclose(reward.models[0].scores(rows, 2), want_N, atol=1e-5)


def test_an_ensemble_averages_scaled_scores_or_votes(tmp_path, tokenizer):
    names = [str(tmp_path / f"rm{seed}") for seed in range(3)]
    models = [save_reward(name, tokenizer, seed=s, chat=True) for s, name in enumerate(names)]
    said_MK = np.array([alone(m, chat_ids(tokenizer, ITEMS[0]))[:, 0] for m in models])
    mean = loaded(names, scales=[1, 2, 0.5]).annotate(ITEMS[:1])[0]
    np.testing.assert_allclose(mean.scores_K, (said_MK * [[1], [2], [0.5]]).mean(0), atol=1e-5)
    spread = loaded(names, spread=True).annotate(ITEMS[:1])[0]
    np.testing.assert_allclose(spread.variance_K, said_MK.var(0, ddof=1), atol=1e-5)
    (votes,) = checked(loaded(names, combine="votes"), ITEMS[:1])
    assert isinstance(votes, Votes) and votes.votes_KK[0].tolist() == [0, 3, 3]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert votes.wins_KK[i, j] == (said_MK[:, i] > said_MK[:, j]).sum()


def test_equal_scores_are_half_a_vote_and_agreement_is_not_certainty(tmp_path):
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    for name in names:
        save_bert(name, bias=1.3)
    (votes,) = checked(loaded(names, combine="votes"), ITEMS[1:])
    assert votes.wins_KK.tolist() == [[0, 1], [1, 0]] and votes.votes_KK[0, 1] == 2
    (spread,) = checked(loaded(names, spread=True), ITEMS[1:])
    assert spread.variance_K.tolist() == [1e-4, 1e-4]


def test_a_pair_model_that_always_prefers_the_first_says_nothing_and_leans(tmp_path):
    save_bert(tmp_path / "pair", bias=1.3)
    keys = {"mode": "pair", "pair_template": "{prompt} {response_a} {response_b}"}
    for found in checked(loaded(str(tmp_path / "pair"), scales=2, **keys), ITEMS):
        assert isinstance(found, Logits) and not found.logits_KK.any()
        count = len(found.logits_KK)
        want_KK = np.where(np.eye(count, dtype=bool), np.nan, 2.6)
        np.testing.assert_allclose(found.first_KK, want_KK, rtol=1e-6)


@torch.no_grad()
def test_a_pair_model_is_asked_in_both_orders(tmp_path):
    model, tokenizer = save_bert(tmp_path / "pair"), bert_tokenizer()
    template = "{prompt} and {response_a} and {response_b}"
    reward = loaded(str(tmp_path / "pair"), mode="pair", pair_template=template, batch_size=3)
    (found,) = checked(reward, ITEMS[:1])
    item = ITEMS[0]

    def ask(i, j):
        text = f"{item.prompt} and {item.responses[i]} and {item.responses[j]}"
        return model(**tokenizer(text, return_tensors="pt")).logits.item()

    for i, j in ((0, 1), (0, 2), (1, 2)):
        logit, lean = (ask(i, j) - ask(j, i)) / 2, (ask(i, j) + ask(j, i)) / 2
        assert found.logits_KK[i, j] == pytest.approx(logit, abs=1e-5) and abs(logit) > 1e-4
        assert found.logits_KK[j, i] == pytest.approx(-logit, abs=1e-5)
        assert found.first_KK[i, j] == found.first_KK[j, i] == pytest.approx(lean, abs=1e-5)
    assert reward.counts["questions"] == 6
    votes = loaded(str(tmp_path / "pair"), mode="pair", pair_template=template, combine="votes")
    (found_votes,) = checked(votes, ITEMS[:1])
    assert (found_votes.wins_KK == (found.logits_KK > 0)).all()


def test_a_long_prompt_loses_its_left_and_the_response_stays(tmp_path, tokenizer):
    save_reward(tmp_path / "rm", tokenizer, window=40, chat=True)
    reward = loaded(str(tmp_path / "rm"))
    seen = []
    reward.models[0].scores = lambda rows, size: seen.extend(rows) or np.zeros(len(rows))
    item = Item(0, "begin " + "dogs run " * 40 + "finish", ("rain fell", "all day"))
    reward.annotate([item])
    text = tokenizer.decode(seen[0]["input_ids"])
    assert len(seen[0]["input_ids"]) <= 40
    assert text.startswith("<user>") and text.endswith("finish\n<assistant>rain fell\n")
    assert "begin" not in text and len(text) > 60  # only as much as must be
    assert reward.counts == {"questions": 2, "cut": 2}


def test_a_response_beyond_the_window_loses_its_middle(tmp_path, tokenizer):
    save_reward(tmp_path / "rm", tokenizer, window=40, chat=True)
    reward = loaded(str(tmp_path / "rm"))
    seen = []
    reward.models[0].scores = lambda rows, size: seen.extend(rows) or np.zeros(len(rows))
    reward.annotate([Item(0, "the cat", ("begin " + "dogs run " * 40 + "finish", "b"))])
    text = tokenizer.decode(seen[0]["input_ids"])
    assert text.startswith("<user>\n<assistant>begin") and text.endswith("finish\n")
    assert len(seen[0]["input_ids"]) <= 40 and reward.counts["cut"] == 1


def test_a_window_too_short_for_the_template_is_an_error(tmp_path, tokenizer):
    save_reward(tmp_path / "rm", tokenizer, chat=True)
    reward = loaded(str(tmp_path / "rm"), max_length=4)
    with pytest.raises(AnnotatorError, match="row 0: its window of 4 tokens is too short"):
        reward.annotate(ITEMS)


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 8))
def test_batches_hold_every_row_once_and_little_padding(lengths, size):
    made = list(batches(lengths, size))
    assert sorted(place for batch in made for place in batch) == list(range(len(lengths)))
    longest = [max(lengths[p] for p in batch) for batch in made]
    assert longest == sorted(longest, reverse=True)
    for batch, most in zip(made, longest, strict=True):
        assert len(batch) <= size and all(2 * lengths[p] >= most for p in batch)
    full = sum(len(batch) == size for batch in made)
    halvings = 6  # 60 is halved six times at most
    assert len(made) - full <= halvings


def test_cutting_keeps_whole_characters(tokenizer):
    text = "zażółć gęślą jaźń " * 5
    for cut in (cut_left, cut_middle):
        for drop in range(1, 40):
            found = cut(tokenizer, text, drop)
            assert "\ufffd" not in found
            assert len(tokenizer(found)["input_ids"]) <= len(tokenizer(text)["input_ids"]) - drop
    assert cut_left(tokenizer, text, 10_000) == cut_middle(tokenizer, text, 10_000) == ""


def test_the_fingerprint_moves_with_weights_and_settings(tmp_path, tokenizer):
    save_reward(tmp_path / "a", tokenizer, chat=True)
    save_reward(tmp_path / "b", tokenizer, seed=1, chat=True)
    name = str(tmp_path / "a")
    same = {RewardAnnotator(name).fingerprint, RewardAnnotator(name, batch_size=2).fingerprint}
    assert len(same) == 1  # the batch decides nothing
    others = [{"combine": "votes"}, {"scales": 2}, {"max_length": 50}, {"dtype": "float32"}]
    found = {RewardAnnotator(name, **other).fingerprint for other in others} | same
    assert len(found | {RewardAnnotator(str(tmp_path / "b")).fingerprint}) == 6
    (tmp_path / "a" / "chat_template.jinja").write_text(CHAT + "!")
    assert RewardAnnotator(name).fingerprint not in same


def test_nan_weights_are_found_when_loaded(tmp_path, tokenizer):
    save_reward(tmp_path / "rm", tokenizer)
    path = tmp_path / "rm" / "model.safetensors"
    weights = load_file(path)
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(AnnotatorError, match=r"annotators: .*score\.weight holds NaN"):
        loaded(str(tmp_path / "rm"))


def test_nan_scores_name_the_row(tmp_path, tokenizer):
    save_reward(tmp_path / "rm", tokenizer)
    reward = loaded(str(tmp_path / "rm"))
    reward.models[0].scores = lambda rows, size: np.array([0, 1, 2, np.nan, 0])
    with pytest.raises(AnnotatorError, match=r"rm': row 1: the model gave NaN"):
        reward.annotate(ITEMS)


def test_a_causal_lm_is_no_reward_model(tmp_path, tokenizer):
    save_judge(tmp_path / "lm", tokenizer)
    with pytest.raises(AnnotatorError, match="LlamaForCausalLM, not a classifier"):
        RewardAnnotator(str(tmp_path / "lm"))
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    config.pop("architectures")
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AnnotatorError, match="has no head for the task: score"):
        loaded(str(tmp_path / "lm"))


def test_other_heads_are_refused(tmp_path, tokenizer):
    save_reward(tmp_path / "three", tokenizer, outputs=3)
    with pytest.raises(AnnotatorError, match="has 3 outputs, not 1 or 2"):
        RewardAnnotator(str(tmp_path / "three"))
    save_reward(tmp_path / "two", tokenizer, outputs=2)
    with pytest.raises(AnnotatorError, match="has 2 outputs, not 1"):
        RewardAnnotator(str(tmp_path / "two"), mode="pair")
    config = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=40)
    BertForTokenClassification(config).save_pretrained(tmp_path / "tokens")
    with pytest.raises(AnnotatorError, match="is a BertForTokenClassification"):
        RewardAnnotator(str(tmp_path / "tokens"))


@pytest.mark.parametrize(
    "keys, problem",
    [
        ({"models": []}, "models"),
        ({"models": [3]}, "models"),
        ({"models": "./gone"}, "annotators: './gone': cannot be loaded: no such folder"),
        ({"mode": "both"}, "mode: 'both': known: single, pair"),
        ({"combine": "median"}, "combine"),
        ({"spread": True}, "at least two models"),
        ({"batch_size": 0}, "batch_size"),
        ({"scales": [1, 2]}, "for each of 1 models"),
        ({"scales": 0}, "scales"),
        ({"scales": ["2"]}, "scales"),
        ({"max_length": 129}, "takes 1 to 128 tokens"),
        ({"max_length": 0}, "takes 1 to 128 tokens"),
        ({"mode": "pair", "pair_template": "{prompt} {response_a}"}, "response_b"),
    ],
)
def test_settings_that_cannot_be(tmp_path, tokenizer, keys, problem):
    save_reward(tmp_path / "rm", tokenizer)
    with pytest.raises(RecipeError, match=problem):
        RewardAnnotator(**{"models": str(tmp_path / "rm"), **keys})
