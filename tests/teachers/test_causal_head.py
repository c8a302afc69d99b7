"""Hidden states through a model's own forward: many families, adapters, and those that refuse."""

import inspect

import pytest
import torch
from conftest import VOCAB, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from llmkd.errors import RecipeError
from llmkd.teachers.causal_head import TASK, head_agrees, head_shape, open_head

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
FAMILIES = {
    "llama": SMALL,
    "qwen2": {**SMALL, "num_key_value_heads": 2},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 4, "final_logit_softcapping": 0.05},
    "cohere": {**SMALL, "num_key_value_heads": 2, "logit_scale": 0.5},
    "granite": {**SMALL, "num_key_value_heads": 2, "logits_scaling": 7.0},
    "phi": {**SMALL, "num_key_value_heads": 2},  # a head with a bias
    "gpt_neox": SMALL,
    "gpt2": {"vocab_size": VOCAB, "n_embd": 8, "n_layer": 2, "n_head": 2},
    "opt": {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 4},  # projected before its head
}
INPUTS = {"input_ids": torch.tensor([[1, 5, 9, 4, 7, 3, 2, 8, 6, 5]])}


def small(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind]))
    for weight in model.parameters():  # fresh logits are all but 0, whatever is done to them
        weight.data.normal_(0, 0.4)
    return model.eval()


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_hidden_states_and_head_make_the_models_own_logits(kind):
    model = small(kind)
    before = model(**INPUTS).logits
    assert open_head(model) and head_agrees(model, INPUTS)
    assert torch.equal(model(**INPUTS).logits, before)  # without a task nothing changed


def test_scale_and_cap_come_from_the_config():
    assert head_shape(small("gemma2")) == (1.0, 0.05)
    assert head_shape(small("cohere")) == (0.5, None)
    assert head_shape(small("granite")) == (pytest.approx(1 / 7), None)


def test_a_head_that_does_more_is_found_out():
    model = small("gemma2")
    assert open_head(model)
    model.config.final_logit_softcapping = 5.0  # now the model caps elsewhere than we were told
    assert not head_agrees(model, INPUTS)


def test_the_signature_stays_so_that_columns_are_kept():
    model = tiny_llama(1)
    names = list(inspect.signature(model.forward).parameters)
    open_head(model)
    assert list(inspect.signature(model.forward).parameters) == names
    open_head(model)  # a second time does nothing
    assert list(inspect.signature(model.forward).parameters) == names


def test_lora_on_the_body_and_a_head_trained_whole():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(1), config)
    assert open_head(model) and head_agrees(model, INPUTS)
    found = {}

    def task(hidden, head):
        found["weight"] = head.weight
        return {"sum": head(hidden).sum()}

    model(**INPUTS, **{TASK: task})["sum"].backward()
    assert found["weight"].grad is not None and found["weight"].requires_grad


def test_lora_on_the_head_is_refused_with_ways_out():
    model = get_peft_model(tiny_llama(1), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(RecipeError, match="lora_modules_to_save"):
        open_head(model)


def test_a_model_without_a_plain_head_keeps_its_logits():
    model = small("gpt2")
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(8, VOCAB)))
    assert not open_head(model)
