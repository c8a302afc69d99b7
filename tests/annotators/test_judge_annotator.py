"""A causal LM as a judge: values worked by hand, both orders, batches, long texts, tokenizers."""

import logging
import math

import numpy as np
import pytest
import torch
from annotator_kit import ITEMS, PAIR, save_constant_judge, save_judge
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from llmkd.annotators.base import Annotator, Item
from llmkd.annotators.checks import checked
from llmkd.annotators.judge import JudgeAnnotator, answer_tokens
from llmkd.errors import AnnotatorError, RecipeError
from llmkd.labels.preference import Logits, Scores
from llmkd.labels.votes import score_logit

CHAT_ITEM = Item(0, [{"role": "user", "content": "the cat"}], ("a mat", "rain"))


def loaded(folder, **keys):
    found = JudgeAnnotator(str(folder), **{"template": PAIR, **keys})
    found.load("cpu")
    return found


@torch.no_grad()
def next_log_probs(model, tokenizer, text):
    """Log-probabilities of the token after `text`, alone and with nothing left out."""
    logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits
    return logits[0, -1].double().log_softmax(-1)


def test_a_judge_that_always_says_a_has_no_preference_and_a_large_lean(tmp_path, tokenizer):
    # logit of A two nats above that of B, whatever it reads: 0 for either response, a lean of 2
    save_constant_judge(tmp_path / "judge", tokenizer, {"A": 3.0, "B": 1.0})
    judge = loaded(tmp_path / "judge")
    assert isinstance(judge, Annotator)
    for found in checked(judge, ITEMS):
        assert isinstance(found, Logits) and np.abs(found.logits_KK).max() < 1e-6
        count = len(found.logits_KK)
        want_KK = np.where(np.eye(count, dtype=bool), np.nan, 2.0)
        np.testing.assert_allclose(found.first_KK, want_KK, rtol=1e-5)
    assert judge.counts == {"questions": 6 + 2, "cut": 0}
    said = (math.e**3 + math.e) / (math.e**3 + math.e + len(tokenizer) - 2)
    assert judge.answer_mass == pytest.approx(said, rel=1e-5)


def test_levels_give_mean_and_variance(tmp_path, tokenizer):
    # p = (3/4, 1/4) on the values 1, 3: mean 1.5, variance .75; a step of 2 adds 2^2 / 12
    save_constant_judge(tmp_path / "judge", tokenizer, {"x": math.log(3), "y": 0.0})
    keys = {"mode": "level", "template": "{prompt} {response}", "levels": {"x": 1, "y": 3}}
    for found in checked(loaded(tmp_path / "judge", **keys), ITEMS):
        assert isinstance(found, Scores)
        np.testing.assert_allclose(found.scores_K, 1.5, rtol=1e-5)
        np.testing.assert_allclose(found.variance_K, 0.75 + 1 / 3, rtol=1e-5)


def test_both_orders_of_every_pair_are_asked(tmp_path, tokenizer):
    model = save_judge(tmp_path / "judge", tokenizer)
    judge = loaded(tmp_path / "judge", cue="!", batch_size=4)
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
    for item, found in zip(ITEMS, checked(judge, ITEMS), strict=True):

        def ask(i, j, item=item):
            text = f"{item.prompt} {item.responses[i]} {item.responses[j]}!"
            log_probs = next_log_probs(model, tokenizer, text)
            return (log_probs[a] - log_probs[b]).item()

        for i in range(found.count):
            for j in range(i):
                logit, lean = (ask(i, j) - ask(j, i)) / 2, (ask(i, j) + ask(j, i)) / 2
                assert found.logits_KK[i, j] == pytest.approx(logit, abs=1e-5)
                assert found.first_KK[i, j] == pytest.approx(lean, abs=1e-5)
                assert abs(logit) > 1e-4  # or constants would pass


def test_levels_are_closed_over_their_words(tmp_path, tokenizer):
    model = save_judge(tmp_path / "judge", tokenizer)
    levels = {"good": 2, "x": 1, "7": 0}
    keys = {"mode": "level", "template": "{prompt} {response}", "levels": levels, "cue": ":"}
    (found,) = checked(loaded(tmp_path / "judge", **keys), ITEMS[:1])
    for place, response in enumerate(ITEMS[0].responses):
        log_probs = next_log_probs(model, tokenizer, f"{ITEMS[0].prompt} {response}:")
        firsts = [tokenizer(word)["input_ids"][0] for word in levels]
        p = log_probs[firsts].softmax(-1)
        mean = (p * torch.tensor([2.0, 1, 0])).sum().item()
        var = (p * (torch.tensor([2.0, 1, 0]) - mean) ** 2).sum().item() + 1 / 12
        assert found.scores_K[place] == pytest.approx(mean, abs=1e-5)
        assert found.variance_K[place] == pytest.approx(var, abs=1e-5)
    want = score_logit(*[x[k] for k in (0, 1) for x in (found.scores_K, found.variance_K)])
    assert found.logits()[0, 1] == pytest.approx(want)


def test_batches_change_nothing(tmp_path, tokenizer):
    save_judge(tmp_path / "judge", tokenizer)
    items = [*ITEMS, ITEMS[0]]  # of one row number twice
    one, many = (loaded(tmp_path / "judge", batch_size=n).annotate(items) for n in (1, 64))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.logits_KK, b.logits_KK, atol=1e-5)
        np.testing.assert_allclose(a.first_KK, b.first_KK, atol=1e-5)
    assert np.array_equal(one[0].logits_KK, one[2].logits_KK)


def test_padding_moves_no_absolute_position(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=128,
        initializer_range=0.5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    one, many = (loaded(tmp_path / "judge", batch_size=n).annotate(ITEMS) for n in (1, 64))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.first_KK, b.first_KK, atol=1e-5)


def test_the_judges_chat_template_is_used(tmp_path, tokenizer):
    model = save_judge(tmp_path / "judge", tokenizer, chat=True)
    (found,) = loaded(tmp_path / "judge").annotate([CHAT_ITEM])
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
    asked = []
    for order in ("a mat rain", "rain a mat"):
        text = f"<user>the cat {order}\n<assistant>"
        log_probs = next_log_probs(model, tokenizer, text)
        asked.append((log_probs[a] - log_probs[b]).item())
    assert found.logits_KK[0, 1] == pytest.approx((asked[0] - asked[1]) / 2, abs=1e-5)


def test_without_a_chat_template_the_text_ends_in_a_cue(tmp_path, tokenizer):
    save_judge(tmp_path / "judge", tokenizer)
    judge = loaded(tmp_path / "judge")
    encoded = judge._encoded(CHAT_ITEM, (0, 1))
    assert tokenizer.decode(encoded["input_ids"]) == "the cat a mat rain\n\nAnswer:"


def test_a_long_prompt_loses_its_middle(tmp_path, tokenizer):
    save_judge(tmp_path / "judge", tokenizer, window=48)
    judge = loaded(tmp_path / "judge")
    item = Item(0, "begin " + "dogs run " * 40 + "finish", ("rain fell", "all day"))
    encoded = judge._encoded(item, (1, 0))
    text = tokenizer.decode(encoded["input_ids"])
    assert len(encoded["input_ids"]) <= 48 and judge.counts["cut"] == 1
    assert text.startswith("begin") and " ... " in text
    assert text.endswith("finish all day rain fell\n\nAnswer:")
    checked(judge, [item])  # and it can be asked


def test_long_responses_are_cut_alike(tmp_path, tokenizer):
    save_judge(tmp_path / "judge", tokenizer, window=60)
    judge = loaded(tmp_path / "judge", template="{prompt}[{response_a}][{response_b}]")
    item = Item(0, "the cat", ("begin " + "dogs run " * 40 + "finish", "start" + " rain" * 60))
    text = tokenizer.decode(judge._encoded(item, (0, 1))["input_ids"])
    assert text.startswith("[begin") and "finish][start" in text and text.count(" ... ") == 2
    with pytest.raises(AnnotatorError, match="row 0: its window of 3 tokens is too short"):
        loaded(tmp_path / "judge", max_length=3).annotate([item])


def test_answers_nobody_would_give_are_warned_of_once(tmp_path, tokenizer, caplog):
    save_constant_judge(tmp_path / "judge", tokenizer, {"C": 12.0})
    judge = loaded(tmp_path / "judge")
    with caplog.at_level(logging.WARNING, "llmkd.annotators.judge"):
        judge.annotate(ITEMS)
        judge.annotate(ITEMS)
    assert len(caplog.records) == 1 and "of the probability" in caplog.text
    assert judge.answer_mass < 0.001


def test_letters_with_and_without_a_blank(tokenizer):
    letter = {word: tokenizer.convert_tokens_to_ids(word) for word in "AB"}
    # the blank is a token of its own here, so " A" and " B" begin alike and do not count
    assert answer_tokens(tokenizer, "AB", "judge") == [[letter["A"]], [letter["B"]]]


class Words:
    """A tokenizer of whole words, with whatever ids the test says."""

    def __init__(self, table):
        self.table = table

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": self.table[text]}

    def decode(self, ids):
        return " " if ids == [9] else "x"


def test_spellings_are_told_apart():
    plain = {"A": [1], "B": [2], " A": [3], " B": [4]}
    assert answer_tokens(Words(plain), "AB", "m") == [[1, 3], [2, 4]]
    sentencepiece = {"A": [9, 1], "B": [9, 2], " A": [9, 1], " B": [9, 2]}  # 9 is the blank
    assert answer_tokens(Words(sentencepiece), "AB", "m") == [[1], [2]]
    one_spelling = {"A": [1], "B": [2], " A": [3], " B": [9, 2]}  # " B" is no token: unfair to B
    assert answer_tokens(Words(one_spelling), "AB", "m") == [[1], [2]]
    same_both_ways = {"A": [1], "B": [2], " A": [1], " B": [2]}
    assert answer_tokens(Words(same_both_ways), "AB", "m") == [[1], [2]]


@pytest.mark.parametrize(
    "table",
    [
        {"A": [1], "B": [1], " A": [1], " B": [1]},  # one first token for both
        {"A": [9], "B": [2], " A": [9, 1], " B": [9, 2]},  # nothing but a blank
        {"A": [1], "B": [2], " A": [2], " B": [3]},  # what means A here means B there
        {"A": [], "B": [2], " A": [], " B": [2]},
    ],
)
def test_answers_that_begin_alike_are_refused(table):
    with pytest.raises(RecipeError, match="begins several of the answers A, B with one token"):
        answer_tokens(Words(table), "AB", "m")


def test_levels_that_begin_alike_are_refused_before_loading(tmp_path, tokenizer):
    save_judge(tmp_path / "judge", tokenizer)
    keys = {"mode": "level", "template": "{prompt} {response}"}
    with pytest.raises(RecipeError, match="begins several of the answers"):
        JudgeAnnotator(str(tmp_path / "judge"), levels={"1": 1, "10": 10}, **keys)
    digits = JudgeAnnotator(str(tmp_path / "judge"), levels={n: n for n in range(1, 6)}, **keys)
    assert list(digits.levels.values()) == [1, 2, 3, 4, 5]


def test_the_fingerprint_moves_with_what_decides(tmp_path, tokenizer):
    save_judge(tmp_path / "a", tokenizer)
    save_judge(tmp_path / "b", tokenizer, seed=1)
    save_judge(tmp_path / "c", tokenizer, chat=True)

    def of(folder="a", **keys):
        return JudgeAnnotator(str(tmp_path / folder), **{"template": PAIR, **keys}).fingerprint

    assert of() == of(batch_size=2) == of(name="other")
    others = [of(cue=""), of(template=PAIR + "?"), of(max_length=9), of(dtype="float32")]
    level = {"mode": "level", "template": "{prompt}{response}", "levels": {"a": 1, "b": 2}}
    others += [of("b"), of("c"), of(**level)]
    assert len({of(), *others}) == 8


def test_damaged_weights_and_nan_answers(tmp_path, tokenizer):
    save_judge(tmp_path / "judge", tokenizer)
    judge = loaded(tmp_path / "judge")
    judge._log_probs = lambda rows: np.full((len(rows), 2), np.nan)
    with pytest.raises(AnnotatorError, match=r"row 0: the model gave NaN"):
        judge.annotate(ITEMS)
    path = tmp_path / "judge" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][0, 0] = float("inf")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(AnnotatorError, match=r"annotators: .*lm_head\.weight holds NaN or inf"):
        loaded(tmp_path / "judge")


@pytest.mark.parametrize(
    "keys, problem",
    [
        ({"model": 3}, "model: 3"),
        ({"model": "./gone"}, "annotators: './gone': cannot be loaded"),
        ({"mode": "both"}, "mode: 'both': known: pair, level"),
        ({"batch_size": 0}, "batch_size"),
        ({"template": "{prompt} {response_a}"}, "response_b"),
        ({"mode": "level", "template": "{prompt}"}, "response"),
        ({"levels": {"good": 1}}, "levels"),
        ({"max_length": 1000}, "takes 1 to 128 tokens"),
    ],
)
def test_settings_that_cannot_be(tmp_path, tokenizer, keys, problem):
    save_judge(tmp_path / "judge", tokenizer)
    with pytest.raises(RecipeError, match=problem):
        JudgeAnnotator(**{"model": str(tmp_path / "judge"), **keys})
