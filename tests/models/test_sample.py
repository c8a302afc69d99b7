"""Sampling: what is recorded is what is done, batches change nothing, ends are where they are."""

import json

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, LlamaForCausalLM

from llmkd.errors import DataError, MissingExtraError, RecipeError
from llmkd.models.sample import Sample, Sampler, SamplingConfig, check_room
from llmkd.models.sample_ends import Ends, StopAt, stop_tokens

PROMPTS = [[5, 9, 17, 30, 2, 8, 44], [61], [7, 7, 12], [100, 40, 3, 21, 90], [61, 70]]
NEW = 10


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    """A tiny Llama of the tokenizer's 300 entries, in a folder."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama(3, vocab=300).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(policy, tmp_path_factory):
    """A LoRA adapter on it that changes what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(policy),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.mul_(3)
    model.save_pretrained(folder)
    return folder


def sampler(policy, tokenizer, adapter=None, **settings):
    settings = {"max_new_tokens": NEW, "sampling_dtype": "float32", **settings}
    made = Sampler(SamplingConfig(**settings), tokenizer)
    made.load(str(policy), adapter=adapter and str(adapter), device="cpu")
    return made


def greedy(policy, tokenizer, adapter=None, **settings):
    return sampler(policy, tokenizer, adapter, num_responses=1, temperature=0.0, **settings)


@torch.no_grad()
def by_hand(model, prompt, steps=NEW, end=0):
    """Greedy tokens, one forward of the whole text each."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def test_batches_padded_on_the_left_say_what_each_prompt_alone_says(policy, tokenizer):
    model = LlamaForCausalLM.from_pretrained(policy).eval()
    wanted = [by_hand(model, prompt) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in wanted}) >= 4
    for size in (1, 2, 5):
        found = greedy(policy, tokenizer, sampling_batch_size=size).sample(PROMPTS, seed=0)
        assert [samples[0].ids for samples in found] == wanted


def test_a_lora_adapter_answers_on_its_base_unmerged(policy, adapter, tokenizer):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(policy), adapter).eval()
    wanted = [by_hand(model, prompt) for prompt in PROMPTS]
    made = greedy(policy, tokenizer, adapter)
    assert [one[0].ids for one in made.sample(PROMPTS, seed=0)] == wanted
    assert wanted != [one[0].ids for one in greedy(policy, tokenizer).sample(PROMPTS, seed=0)]
    assert not any(weight.requires_grad for weight in made._engine.model.parameters())
    assert not made._engine.model.training


def test_a_seed_gives_the_same_samples_whatever_was_sampled_before(policy, tokenizer):
    made = sampler(policy, tokenizer)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = made.sample(PROMPTS, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own luck is untouched
    other = made.sample(PROMPTS[:2], seed=2)
    torch.rand(5)
    assert made.sample(PROMPTS, seed=1) == first
    assert sampler(policy, tokenizer).sample(PROMPTS[:2], seed=2) == other
    assert made.sample(PROMPTS, seed=3) != first
    assert len(first) == len(PROMPTS) and all(len(samples) == 4 for samples in first)
    assert len({tuple(one.ids) for one in first[0]}) > 1
    assert [len(samples) for samples in made.sample(PROMPTS[:1], seed=1, count=3)] == [3]
    assert made.sample([], seed=0) == []


def test_order_of_answers_is_that_of_the_prompts(policy, tokenizer):
    made = greedy(policy, tokenizer, sampling_batch_size=2)
    found = made.sample(PROMPTS, seed=0)
    assert made.sample(PROMPTS[::-1], seed=0) == found[::-1]


def test_samples_follow_the_models_distribution(policy, tokenizer):
    """TV distance of 6,000 first tokens to the softmax: some .03 by chance, .2 with top_k 50."""
    made = sampler(policy, tokenizer, max_new_tokens=1, num_responses=6000)
    firsts = torch.tensor([one.ids[0] for one in made.sample([PROMPTS[0]], seed=5)[0]])
    model = LlamaForCausalLM.from_pretrained(policy).eval()
    with torch.no_grad():
        probs_V = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    shares_V = torch.bincount(firsts, minlength=300) / 6000
    beyond_50 = 1 - probs_V.topk(50).values.sum()
    assert beyond_50 > 0.2  # so a top k nobody asked for would be seen
    assert (shares_V - probs_V).abs().sum() / 2 < 0.12
    assert abs(shares_V[probs_V.topk(50).indices].sum() - (1 - beyond_50)) < 0.03


def test_the_models_own_generation_config_decides_nothing_but_its_end(policy, tokenizer, tmp_path):
    plain = sampler(policy, tokenizer)
    wanted = plain.sample(PROMPTS, seed=1)
    said = {token for samples in wanted for one in samples for token in one.ids}
    unsaid = max(set(range(300)) - said)
    tiny_llama(3, vocab=300).save_pretrained(tmp_path)
    GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(1, 150)),
        min_new_tokens=9,
        max_length=4,
        eos_token_id=[0, unsaid],
    ).save_pretrained(tmp_path)
    bent = sampler(tmp_path, tokenizer)
    assert bent.facts()["stop_tokens"] == [0, unsaid] and plain.facts()["stop_tokens"] == [0]
    aside = bent.facts()["generation_config_set_aside"]
    assert aside["top_k"] == 1 and aside["repetition_penalty"] == 5.0
    assert plain.facts()["generation_config_set_aside"] == {}
    assert said & set(range(1, 150))
    assert bent.sample(PROMPTS, seed=1) == wanted


@pytest.mark.parametrize(
    "setting, value",
    [("top_k", 1), ("top_p", 1e-6), ("min_p", 0.999), ("temperature", 1e-4)],
)
def test_each_warp_that_is_asked_for_is_done(policy, tokenizer, setting, value):
    narrow = sampler(policy, tokenizer, **{setting: value}).sample(PROMPTS, seed=1)
    wanted = greedy(policy, tokenizer).sample(PROMPTS, seed=0)
    assert all(
        one == likeliest for many, (likeliest,) in zip(narrow, wanted, strict=True) for one in many
    )


def test_a_repetition_penalty_forbids_what_was_said(policy, tokenizer):
    made = greedy(policy, tokenizer, repetition_penalty=1e9)
    for prompt, (one,) in zip(PROMPTS, made.sample(PROMPTS, seed=0), strict=True):
        # scores above 0 are divided: what was said can only come again where all are below 0
        assert len(set(one.ids)) == len(one.ids) and not set(one.ids) & set(prompt)


def test_an_end_token_of_the_model_is_kept_and_nothing_after(policy, tokenizer, tmp_path):
    said = greedy(policy, tokenizer).sample(PROMPTS, seed=0)
    ends = [samples[0].ids[3] for samples in said[:2]]
    tiny_llama(3, vocab=300).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    for (whole,), (cut,) in zip(said, greedy(tmp_path, tokenizer).sample(PROMPTS, 0), strict=True):
        places = [place for place, token in enumerate(whole.ids) if token in {0, *ends}]
        wanted = whole.ids[: places[0] + 1] if places else whole.ids
        assert cut.ids == wanted and cut.finished is bool(places)
        assert cut.text == tokenizer.decode(wanted[:-1] if places else wanted)
    assert len(said[0][0].ids) == NEW and said[0][0].finished is False


def test_a_stop_string_cuts_the_text_and_stays_in_the_ids(policy, tokenizer):
    said = greedy(policy, tokenizer).sample(PROMPTS, seed=0)
    pieces = [tokenizer.decode(one.ids[at : at + 2]) for (one,) in said for at in range(2, NEW - 2)]
    stop = next(text for text in pieces if "\ufffd" not in text and len(text) > 1)
    found = greedy(policy, tokenizer, stop_strings=[stop]).sample(PROMPTS, seed=0)
    assert any(one.finished and one.ids[-1] != 0 for (one,) in found)
    for (whole,), (cut,) in zip(said, found, strict=True):
        assert cut.ids == whole.ids[: len(cut.ids)]
        if stop in whole.text:
            assert cut.finished and cut.text == whole.text[: whole.text.index(stop)]
            assert stop in tokenizer.decode(cut.ids)
            assert stop not in tokenizer.decode(cut.ids[:-1])
        else:
            assert cut == whole


def ends_of(tokenizer, strings=(), tokens=(0,)):
    return Ends(tokenizer, tokens, strings)


def test_ends_are_worked_out_by_hand(tokenizer):
    ids = tokenizer("the cat sat on a mat")["input_ids"]
    assert ends_of(tokenizer).cut([*ids, 0, 0, 0]) == Sample(
        [*ids, 0], "the cat sat on a mat", True
    )
    assert ends_of(tokenizer).cut(ids) == Sample(ids, "the cat sat on a mat", False)
    assert ends_of(tokenizer).cut([0]) == Sample([0], "", True)
    assert ends_of(tokenizer).cut([]) == Sample([], "", False)
    assert ends_of(tokenizer).cut(ids, ended=True).finished
    two = ends_of(tokenizer, tokens=(0, ids[2])).cut([*ids, 0])
    assert two == Sample(ids[:3], tokenizer.decode(ids[:2]), True)


def test_a_stop_string_in_the_middle_of_a_token_keeps_the_token(tokenizer):
    ids = tokenizer("the cat sat on a mat")["input_ids"]
    cut = ends_of(tokenizer, ["ca"]).cut([*ids, 0])
    assert cut.text == "the " and cut.finished
    assert "ca" in tokenizer.decode(cut.ids) and cut.ids == ids[: len(cut.ids)]
    assert "ca" not in tokenizer.decode(cut.ids[:-1])
    both = ends_of(tokenizer, ["mat", "sat"]).cut(ids)
    assert both.text == "the cat " and both.finished  # the first one said, not the first listed
    assert ends_of(tokenizer, ["dog"]).cut(ids) == Sample(ids, "the cat sat on a mat", False)
    # pads behind a stop string may look like END: they are not the response's
    assert ends_of(tokenizer, ["ca"]).cut([*cut.ids, 0, 0]).ids == cut.ids


def test_the_criterion_stops_where_the_cut_is(tokenizer):
    ends = ends_of(tokenizer, ["sat on"])
    ids = tokenizer("the cat sat on a mat sat on")["input_ids"]
    cut = ends.cut(ids)
    for length in range(1, len(ids) + 1):
        rows_BT = torch.tensor([[9, 9, *ids[:length]], [9, 9, *[ids[0]] * length]])
        stopped = StopAt(ends, 2)(rows_BT, None)
        assert stopped.dtype == torch.bool and not stopped[1]
        if length <= len(cut.ids):
            assert bool(stopped[0]) is (length == len(cut.ids))
    # what the prompt says is not the response's
    prompt = torch.tensor([[*ids, ids[0]]])
    assert not StopAt(ends, len(ids))(prompt, None)[0]


def test_stop_tokens_come_from_tokenizer_and_configs(tokenizer):
    assert stop_tokens(tokenizer, GenerationConfig(eos_token_id=[7, 3])) == [0, 3, 7]
    assert stop_tokens(tokenizer, GenerationConfig(eos_token_id=5), None) == [0, 5]
    assert stop_tokens(object(), GenerationConfig()) == []


def test_no_room_is_an_error_before_anything_is_sampled(policy, tokenizer):
    made = sampler(policy, tokenizer, max_new_tokens=60)
    with pytest.raises(RecipeError, match=r"prompt of 5 tokens .*window of 64") as caught:
        made.sample([[1, 2], [1, 2, 3, 4, 5]], seed=0)
    assert "--max_new_tokens 59" in str(caught.value)
    assert len(made.sample([[1, 2, 3, 4]], seed=0)) == 1
    check_room(4, None, 10**9)
    with pytest.raises(RecipeError, match="max_new_tokens"):
        check_room(70, 64, 1)


def test_prompts_without_tokens_or_with_foreign_ones_are_refused(policy, tokenizer):
    made = greedy(policy, tokenizer)
    with pytest.raises(DataError, match="prompt_ids: 1: the prompt has no tokens"):
        made.sample([[1], []], seed=0)
    for wrong in (300, -1):
        with pytest.raises(DataError, match=r"prompt 0 holds an id .*300 entries"):
            made.sample([[1, wrong]], seed=0)


def test_greedy_gives_one(policy, tokenizer):
    with pytest.raises(RecipeError, match=r"temperature.*same 4 times"):
        SamplingConfig(temperature=0)
    with pytest.raises(RecipeError, match="temperature"):
        greedy(policy, tokenizer).sample(PROMPTS, seed=0, count=2)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"num_responses": 0}, "num_responses"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"sampling_batch_size": 0}, "sampling_batch_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"sampling_backend": "tgi"}, "sampling_backend"),
        ({"sampling_dtype": "int8"}, "sampling_dtype"),
        ({"stop_strings": "###"}, "stop_strings"),
        ({"stop_strings": '"###"'}, "stop_strings"),
        ({"stop_strings": ["a", ""]}, "stop_strings"),
        ({"vllm_options": "[1]"}, "vllm_options"),
    ],
)
def test_settings_that_cannot_be(settings, key):
    with pytest.raises(RecipeError, match=key):
        SamplingConfig(**settings)


def test_settings_are_a_record_that_loading_does_not_change(policy, tokenizer):
    made = Sampler(SamplingConfig(stop_strings='["#"]', top_k=7), tokenizer)
    before = made.settings()
    made.load(str(policy))
    assert made.settings() == before == json.loads(json.dumps(before))
    assert before["stop_strings"] == ["#"] and before["top_k"] == 7
    assert before["temperature"] == 1.0 and before["chat_template"] is None
    tokenizer.chat_template = "{{ messages }}"
    try:
        assert made.settings()["chat_template"] != before["chat_template"]
    finally:
        tokenizer.chat_template = None
    with pytest.raises(ValueError, match="load a policy first"):
        Sampler(SamplingConfig(), tokenizer).facts()


def test_the_policys_own_tokenizer_is_the_default(policy, tokenizer):
    made = Sampler(SamplingConfig(num_responses=1, temperature=0, max_new_tokens=NEW))
    made.load(str(policy))
    assert made.sample(PROMPTS, 0) == greedy(policy, tokenizer).sample(PROMPTS, 0)


def test_released_and_unloaded_samplers_hold_nothing(policy, tokenizer):
    made = greedy(policy, tokenizer)
    made.release()
    made.release()
    with pytest.raises(ValueError, match="load a policy first"):
        made.sample(PROMPTS, seed=0)


def test_what_cannot_be_loaded(policy, tokenizer, tmp_path):
    made = Sampler(SamplingConfig(), tokenizer)
    with pytest.raises(RecipeError, match="model_name_or_path"):
        made.load(str(tmp_path / "none"))
    with pytest.raises(RecipeError, match="adapter_config"):
        made.load(str(policy), adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"adapter_model\.safetensors"):
        made.load(str(policy), adapter=str(tmp_path))


def test_vllm_that_is_not_there_is_said_at_once(monkeypatch, tokenizer):
    monkeypatch.setattr("llmkd.models.sample._installed", lambda name: False)
    with pytest.raises(MissingExtraError, match=r"llmkd\[vllm\]"):
        Sampler(SamplingConfig(sampling_backend="vllm"), tokenizer)


def test_under_zero_3_the_policy_is_whole_and_ranks_do_not_wait(policy, adapter, tokenizer):
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    wanted = greedy(policy, tokenizer, adapter).sample(PROMPTS, seed=0)
    held = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    try:
        assert is_deepspeed_zero3_enabled()
        made = greedy(policy, tokenizer, adapter)
        assert not any(hasattr(w, "ds_id") for w in made._engine.model.parameters())
        called = []
        generate = made._engine.model.generate
        made._engine.model.generate = lambda **kw: called.append(kw) or generate(**kw)
        assert made.sample(PROMPTS, seed=0) == wanted
        assert called[0]["synced_gpus"] is False
    finally:
        del held
