"""Scoring: against a plain forward, padding, batches, the prefix cache, heads, folders, images."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image as Pil
from score_kit import (
    PROMPT,
    VALUES,
    image_scorer,
    score_levels,
    score_llama,
    score_row,
    score_tokenizer,
)
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from llmkd.data.levels import QUALITY, Levels
from llmkd.data.score_tokens import Prompted
from llmkd.errors import DataError, NonFiniteError, RecipeError
from llmkd.models.level_logits import LEAST_PREFIX, LevelLogits, common
from llmkd.models.scorer import SavedLevels, Scorer, ScoreTable, load_levels, save_levels

TEXTS = ["a cat", "two dogs run far from home while rain fell all day", "the mat", "on a mat " * 9]


def scorer(model=None, *, chat=False, **keys):
    model = score_llama() if model is None else model
    keys = {"prompt": PROMPT, **keys}
    return Scorer(model, score_levels(), processor=score_tokenizer(chat=chat), **keys)


@torch.no_grad()
def plain(model, one, rows):
    """Level logits of each row by itself: no padding, no cache, all logits."""
    found = []
    for row in rows:
        made = one.encoder.prompted(row)
        ids = torch.tensor([made.ids])
        logits = model(input_ids=ids, **made.tensors).logits[0, -1]
        found.append(logits[list(one.levels.ids_L)].double().numpy())
    return np.array(found)


def rows_of(texts=TEXTS):
    return [score_row(n, text=text) for n, text in enumerate(texts)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_numbers_are_those_of_a_plain_forward(side, prefix_cache, batch_size):
    reference = score_llama()
    one = scorer(copy.deepcopy(reference), prefix_cache=prefix_cache, batch_size=batch_size)
    one.encoder.tokenizer.padding_side = side
    want_NL = plain(reference, one, rows_of())
    table = one.score(TEXTS)
    np.testing.assert_allclose(table.level_logits_NL, want_NL, atol=2e-5)
    assert np.ptp(want_NL, axis=0).min() > 1e-2  # or constants would pass
    probs_NL = np.exp(want_NL) / np.exp(want_NL).sum(1, keepdims=True)
    mean_N = probs_NL @ np.array(VALUES)
    np.testing.assert_allclose(table.probs_NL, probs_NL, atol=1e-5)
    np.testing.assert_allclose(table.mean_N, mean_N, atol=1e-4)
    want_std = np.sqrt((probs_NL * np.square(np.array(VALUES)[None] - mean_N[:, None])).sum(1))
    np.testing.assert_allclose(table.std_N, want_std, atol=1e-4)


def test_the_prefix_is_really_cached_and_only_where_it_is_worth_it():
    one = scorer()
    prompts = [one.encoder.prompted(row) for row in rows_of()]
    prefix = one.logits.prefix(prompts)
    assert prefix is not None and len(prefix.ids) >= LEAST_PREFIX
    seen = []
    plain_call = one.model.base_model.forward

    def spy(*args, **keys):
        seen.append(tuple(keys["input_ids"].shape))
        return plain_call(*args, **keys)

    one.model.base_model.forward = spy
    one.logits(prompts, prefix)
    longest = max(len(made.ids) for made in prompts)
    assert seen == [(4, longest - len(prefix.ids))]
    assert prefix.cache.get_seq_length() == len(prefix.ids)  # the batch left it as it was
    assert one.logits.prefix(prompts[:1]) is None
    assert one.logits.prefix([Prompted([1, 2, 3]), Prompted([1, 2, 4])]) is None


def test_texts_that_are_the_same_share_all_but_one_token():
    one = scorer()
    table = one.score(["a cat", "a cat", "a cat"])
    np.testing.assert_allclose(table.mean_N, scorer(prefix_cache=False).score(["a cat"]).mean_N[0])


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_common_beginning(lists):
    count = common([Prompted(ids) for ids in lists])
    assert 0 <= count < min(map(len, lists))
    assert all(ids[:count] == lists[0][:count] for ids in lists)
    if count + 1 < min(map(len, lists)):
        assert len({ids[count] for ids in lists}) > 1


def test_a_model_that_forgets_its_cache_goes_without(monkeypatch):
    one = scorer()
    plain_call = one.model.base_model.forward

    def forgets(*args, **keys):
        if keys.get(one.logits.cache_key) is not None and keys["input_ids"].shape[0] > 1:
            keys["attention_mask"] = torch.ones_like(keys["input_ids"])
            keys.pop(one.logits.cache_key)
        return plain_call(*args, **keys)

    monkeypatch.setattr(one.model.base_model, "forward", forgets)
    reference = score_llama()
    found = one.score(TEXTS)
    np.testing.assert_allclose(found.level_logits_NL, plain(reference, one, rows_of()), atol=2e-5)


def test_a_recurrent_model_and_capped_logits():
    vocab = len(score_tokenizer())
    small = {"vocab_size": vocab, "hidden_size": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(**small, state_size=4, initializer_range=0.5))
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            **{**small, "num_hidden_layers": 2},
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            sliding_window=8,
            final_logit_softcapping=2.0,
            initializer_range=0.5,
        )
    )
    for model in (mamba.eval(), gemma.eval()):
        reference = copy.deepcopy(model)
        one = scorer(model, batch_size=3)
        want_NL = plain(reference, one, rows_of())
        np.testing.assert_allclose(one.score(TEXTS).level_logits_NL, want_NL, atol=1e-4)
        assert np.ptp(want_NL) > 1e-2


class Scaled(torch.nn.Linear):
    """A head that is more than a linear map."""

    def forward(self, hidden):
        return torch.tanh(super().forward(hidden)) * 3


def test_another_head_makes_its_logits_the_plain_way():
    model = score_llama()
    head = Scaled(8, model.config.vocab_size, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    reference = copy.deepcopy(model)
    one = scorer(model, batch_size=3)
    want_NL = plain(reference, one, rows_of())
    np.testing.assert_allclose(one.score(TEXTS).level_logits_NL, want_NL, atol=2e-5)


@pytest.mark.parametrize("modules", [["q_proj"], ["lm_head", "q_proj"]])
def test_adapters_count(modules):
    config = LoraConfig(target_modules=modules, init_lora_weights=False, r=2)
    torch.manual_seed(1)
    model = get_peft_model(score_llama(), config).eval()
    reference = copy.deepcopy(model)
    one = scorer(model, batch_size=3)
    want_NL = plain(reference, one, rows_of())
    np.testing.assert_allclose(one.score(TEXTS).level_logits_NL, want_NL, atol=2e-5)
    bare_NL = plain(score_llama(), one, rows_of())
    assert np.abs(want_NL - bare_NL).max() > 1e-2


def test_the_mode_of_the_model_comes_back():
    one = scorer()
    one.model.train()
    one.score(["a"])
    assert one.model.training
    loss = one.model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()  # scoring left no inference tensors behind


def test_inputs_of_all_kinds():
    one = scorer(chat=True, template="Text: {text}")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a cat"}]
    given = ["a cat", score_row(9, text="Text: a cat"), chat, {"messages": chat}]
    found = one.score(given).mean_N
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[2] == pytest.approx(found[3])
    assert abs(found[0] - found[2]) > 1e-4
    pair = scorer(template="{text} | {text_pair}")
    want = scorer().score(["a | b"]).mean_N
    np.testing.assert_allclose(pair.score([("a", "b")]).mean_N, want, atol=1e-5)
    np.testing.assert_allclose(
        scorer().score([("a", "b")]).mean_N, scorer().score(["a\n\nb"]).mean_N, atol=1e-5
    )
    for wrong, problem in (
        (3, "input 1 is no text"),
        ({"row": 2}, "input 1 has no text"),
        (("a", "b", "c"), "input 1 is no"),
    ):
        with pytest.raises(DataError, match=problem):
            one.score(["a", wrong])
    with pytest.raises(DataError, match="input 0 has no text_pair"):
        pair.score(["a"])


def test_a_call_says_one_score_with_its_level():
    one = scorer()
    table = one.score(["a cat", "the mat"])
    said = one("a cat")
    assert said["score"] == pytest.approx(table.mean_N[0], abs=1e-5)
    assert said["level"] == QUALITY[table.probs_NL[0].argmax()]
    assert list(said["probs"]) == list(QUALITY) and sum(said["probs"].values()) == pytest.approx(1)
    assert len(one(["a cat", "the mat"])) == 2
    assert isinstance(one([{"role": "user", "content": "hi"}]), dict)
    assert len(one.score([])) == 0


def test_rewards_and_other_scales_by_hand():
    levels = Levels(("good", "bad"), (5.0, 1.0), (3, 4), "is")
    table = ScoreTable.of(np.log([[0.75, 0.25]]), levels)
    assert table.mean_N == pytest.approx(4) and table.std_N == pytest.approx(np.sqrt(3))
    assert table.reward_N(2) == pytest.approx(4 - 2 * np.sqrt(3))
    mean_N, std_N = table.on_scale(0, 100)
    assert mean_N == pytest.approx(75) and std_N == pytest.approx(25 * np.sqrt(3))


def test_long_texts_are_cut_to_the_window():
    one = scorer(score_llama(window=64))
    table = one.score(["dogs run " * 99, "a"])
    assert table.cut == 1 and np.isfinite(table.mean_N).all()


def test_nan_weights_are_an_error():
    model = score_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="level logits of row 0"):
        scorer(model).score(["a"])


def folder(tmp_path, **keys):
    saved = SavedLevels(score_levels(), PROMPT, template="Text: {text}", scale=(0.0, 10.0), **keys)
    model = score_llama()
    model.save_pretrained(tmp_path / "m")
    score_tokenizer().save_pretrained(tmp_path / "m")
    save_levels(tmp_path / "m", saved)
    return str(tmp_path / "m"), saved


def test_a_folder_scores_alone(tmp_path):
    name, saved = folder(tmp_path, max_length=100)
    assert load_levels(name) == saved
    one = Scorer(Path(name), device="cpu")
    want = scorer(template="Text: {text}", max_length=100).score(TEXTS)
    np.testing.assert_allclose(one.score(TEXTS).mean_N, want.mean_N, atol=1e-5)
    assert one.saved.scale == (0.0, 10.0)


def test_an_adapter_folder_scores_alone(tmp_path):
    name, saved = folder(tmp_path)
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, r=2)
    base = score_llama().from_pretrained(name)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "a")
    score_tokenizer().save_pretrained(tmp_path / "a")
    save_levels(tmp_path / "a", saved)
    want = scorer(model, template="Text: {text}").score(TEXTS)
    found = Scorer(str(tmp_path / "a"), device="cpu", dtype="float32").score(TEXTS)
    np.testing.assert_allclose(found.level_logits_NL, want.level_logits_NL, atol=1e-5)
    assert np.abs(found.mean_N - Scorer(name, device="cpu").score(TEXTS).mean_N).max() > 1e-3


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"format": 9}, "format 9"),
        ({"ids": [1, 2]}, "2 ids for 5 words"),
        ({"values": [1, 3, 2, 4, 5]}, "ascend"),
        ({"inputs": "sound"}, "known: text"),
        ({"words": None}, "cannot be read"),
    ],
)
def test_a_broken_levels_file_is_named(tmp_path, change, problem):
    name, _ = folder(tmp_path)
    path = Path(name) / "levels.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((DataError, RecipeError), match=rf"(?s)levels\.json.*{problem}"):
        load_levels(name)


def test_folders_and_settings_that_cannot_be(tmp_path):
    name, saved = folder(tmp_path)
    other = Levels(QUALITY, VALUES, saved.levels.ids_L[::-1], saved.levels.prefix)
    save_levels(name, SavedLevels(other, PROMPT))
    with pytest.raises(DataError, match=r"levels\.json: 'excellent': id \d+ is 'bad'"):
        Scorer(name)
    (Path(name) / "levels.json").unlink()
    assert load_levels(name) is None
    with pytest.raises(RecipeError, match=r"has no levels\.json"):
        Scorer(name)
    with pytest.raises(RecipeError, match="processor"):
        Scorer(score_llama(), score_levels())
    with pytest.raises(RecipeError, match="batch_size"):
        scorer(batch_size=0)


def picture(seed, size):
    shape = (*size, 3)
    return Pil.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


@pytest.mark.parametrize("chat", [False, True])
def test_images_and_texts_in_one_call(tmp_path, chat):
    model, processor = image_scorer(chat=chat)
    reference = copy.deepcopy(model)
    levels = score_levels(processor.tokenizer)
    one = Scorer(model, levels, processor=processor, prompt=PROMPT, batch_size=2)
    picture(4, (40, 20)).save(tmp_path / "p.png")
    given = [picture(0, (20, 30)), "a cat", tmp_path / "p.png", picture(1, (16, 16)), "the mat"]
    rows = [one.row(each, n) for n, each in enumerate(given)]
    rows.append(score_row(5, images=[picture(2, (20, 20)), picture(3, (20, 20))], text="a mat"))
    want_NL = plain(reference, one, rows)
    found = one.score([*given, rows[-1]])
    np.testing.assert_allclose(found.level_logits_NL, want_NL, atol=2e-5)
    assert np.ptp(want_NL[[0, 2, 3]], axis=0).max() > 1e-3  # the images are seen


def test_an_image_folder_scores_alone(tmp_path):
    model, processor = image_scorer()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    levels = score_levels(processor.tokenizer)
    save_levels(tmp_path, SavedLevels(levels, PROMPT, inputs="images"))
    given = [picture(0, (20, 30)), picture(1, (20, 30))]
    want = Scorer(model, levels, processor=processor, prompt=PROMPT).score(given)
    found = Scorer(str(tmp_path), device="cpu").score(given)
    np.testing.assert_allclose(found.level_logits_NL, want.level_logits_NL, atol=1e-5)


def test_bfloat16_reads_the_head_in_float32():
    model = score_llama().to(torch.bfloat16)
    logits = LevelLogits(model, score_levels().ids_L)
    found = logits([Prompted([1, 2, 3]), Prompted([4, 5])])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(
        found.numpy(),
        LevelLogits(score_llama(), score_levels().ids_L)(
            [Prompted([1, 2, 3]), Prompted([4, 5])]
        ).numpy(),
        atol=0.1,
    )
