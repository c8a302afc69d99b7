"""vLLM behind the same call: what it is asked, and what is made of its answers."""

import json
import sys

import pytest
from conftest import tiny_llama
from transformers import GenerationConfig

from llmkd.errors import RecipeError
from llmkd.models.sample import Sampler, SamplingConfig

FAKE = """
from types import SimpleNamespace

MADE, ASKED, ANSWERS = [], [], []


class SamplingParams:
    def __init__(self, **settings):
        self.settings = settings


class LLM:
    def __init__(self, **options):
        MADE.append(options)

    def generate(self, prompts, params, *, lora_request, use_tqdm):
        ASKED.append((prompts, [one.settings for one in params], lora_request))
        outputs = [SimpleNamespace(**one) for one in ANSWERS]
        return [SimpleNamespace(outputs=outputs) for _ in prompts]
"""
LORA = """
from dataclasses import dataclass


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A package vllm that writes down what it is asked and answers what it is told."""
    root = tmp_path / "fake"
    (root / "vllm" / "lora").mkdir(parents=True)
    (root / "vllm" / "__init__.py").write_text(FAKE)
    (root / "vllm" / "lora" / "__init__.py").write_text("")
    (root / "vllm" / "lora" / "request.py").write_text(LORA)
    monkeypatch.syspath_prepend(str(root))
    import vllm

    yield vllm
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]


@pytest.fixture
def policy(tmp_path, tokenizer):
    folder = tmp_path / "policy"
    tiny_llama(vocab=300).save_pretrained(folder)
    GenerationConfig(eos_token_id=[0, 9], do_sample=True, top_k=3).save_pretrained(folder)
    return folder


def adapter(folder, **settings):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 12, "rank_pattern": {}, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def answer(index, ids, finish, stop=None):
    return {"index": index, "token_ids": ids, "finish_reason": finish, "stop_reason": stop}


def loaded(policy, tokenizer, adapter=None, **settings):
    config = SamplingConfig(sampling_backend="vllm", max_new_tokens=8, num_responses=2, **settings)
    made = Sampler(config, tokenizer)
    made.load(str(policy), adapter=adapter, device="cpu")
    return made


def test_everything_recorded_is_asked_for(vllm, policy, tokenizer):
    options = {"gpu_memory_utilization": 0.5}
    made = loaded(policy, tokenizer, top_p=0.9, min_p=0.1, stop_strings=["#"], vllm_options=options)
    vllm.ANSWERS[:] = [answer(0, [5], "length"), answer(1, [6], "length")]
    made.sample([[1, 2], [3]], seed=40)
    asked = vllm.MADE[0]
    assert asked["model"] == str(policy) and asked["gpu_memory_utilization"] == 0.5
    assert asked["trust_remote_code"] is False and asked["generation_config"] == "vllm"
    assert "enable_lora" not in asked
    prompts, params, lora = vllm.ASKED[0]
    assert prompts == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}] and lora is None
    assert params[0] == {
        "n": 2,
        "seed": 40,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.0,
        "max_tokens": 8,
        "stop": ["#"],
        "stop_token_ids": [0, 9],
        "include_stop_str_in_output": True,
        "skip_special_tokens": True,
    }
    assert params[1]["seed"] == 42  # behind those of the first prompt's two samples
    assert made.facts()["generation_config_set_aside"] == {"do_sample": True, "top_k": 3}


def test_answers_hold_their_end_whether_vllm_gives_it_or_not(vllm, policy, tokenizer):
    ids = tokenizer("the cat # sat")["input_ids"]
    dogs = tokenizer("two dogs")["input_ids"]
    vllm.ANSWERS[:] = [
        answer(1, dogs, "stop"),  # END kept back
        answer(0, [*dogs, 0], "stop"),
        answer(3, dogs, "stop", 9),  # another stop token kept back
        answer(2, dogs, "length"),
        answer(4, ids, "stop", "#"),
    ]
    found = loaded(policy, tokenizer, stop_strings=["#"]).sample([[1]], seed=0)[0]
    assert [one.ids for one in found[:4]] == [[*dogs, 0], [*dogs, 0], dogs, [*dogs, 9]]
    assert [one.finished for one in found] == [True, True, False, True, True]
    assert {one.text for one in found[:4]} == {"two dogs"}
    assert found[4].text == "the cat "
    assert found[4].ids == ids[: len(found[4].ids)] and "#" in tokenizer.decode(found[4].ids)


def test_an_adapter_is_a_lora_request(vllm, policy, tokenizer, tmp_path):
    path = adapter(tmp_path / "lora", rank_pattern={"q_proj": 20})
    made = loaded(policy, tokenizer, path)
    assert vllm.MADE[-1]["enable_lora"] is True and vllm.MADE[-1]["max_lora_rank"] == 32
    vllm.ANSWERS[:] = [answer(0, [5], "length"), answer(1, [6], "length")]
    made.sample([[1]], seed=0)
    assert vllm.ASKED[-1][2].lora_path == path
    with pytest.raises(RecipeError, match="LoRA adapters only, not IA3"):
        loaded(policy, tokenizer, adapter(tmp_path / "other", peft_type="IA3"))


def test_the_window_holds_for_vllm_too(vllm, policy, tokenizer):
    with pytest.raises(RecipeError, match="window of 64"):
        loaded(policy, tokenizer).sample([list(range(1, 60))], seed=0)
    assert not vllm.ASKED
