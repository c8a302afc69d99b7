"""Sums of log-probabilities over completions: against a naive float64 form, one row at a time."""

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_llama
from pair_kit import pair_rows
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from llmkd.errors import DataError, NonFiniteError, RecipeError
from llmkd.models.log_probs import CompletionScorer, completion_log_probs


def questions(count=9, vocab=VOCAB):
    rows = pair_rows(count, vocab=vocab)
    return [[*x] for x in rows["prompt_ids"]], [[*x] for x in rows["ids_1"]]


@torch.no_grad()
def naive(model, prompts, completions):
    """Every row alone, whole logits, in float64."""
    model, found = model.double().eval(), []
    for prompt, ids in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        found.append(sum(logits[at, token].item() for at, token in zip(places, ids, strict=True)))
    return np.array(found)


def special(kind):
    """Models whose logits are more than a product."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }
    if kind == "softcap":
        return Gemma2ForCausalLM(
            Gemma2Config(**shape, head_dim=4, final_logit_softcapping=2.0, pad_token_id=0)
        )
    if kind == "scale":
        return CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25, pad_token_id=0))
    return tiny_llama(1, vocab=VOCAB + 24, tied=kind == "tied")  # a padded head


@pytest.mark.parametrize("kind", ["tied", "untied", "softcap", "scale"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_sums_are_the_naive_ones_in_the_order_given(kind, fused, batch):
    model = special(kind)
    scorer = CompletionScorer(fused=fused)
    scorer.open(model)
    found = completion_log_probs(model, *questions(), batch_size=batch, scorer=scorer)
    assert found.dtype == np.float64 and found.shape == (9,)
    wanted = naive(model, *questions())
    assert scorer._opens is fused
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)
    assert np.ptp(wanted) > 5  # a constant would not do


def test_other_rows_of_the_batch_change_nothing_but_rounding():
    model = tiny_llama(1)
    prompts, completions = questions(12)
    whole = completion_log_probs(model, prompts, completions, batch_size=12)
    parts = [
        completion_log_probs(model, [p], [c], batch_size=1)[0]
        for p, c in zip(prompts, completions, strict=True)
    ]
    np.testing.assert_allclose(whole, parts, rtol=0, atol=1e-5)


def test_what_stands_under_padding_is_never_read():
    # the pad token's own embedding is made huge; a row must not see behind its end
    prompts, completions = questions()
    one, other = tiny_llama(1, tied=False), tiny_llama(1, tied=False)
    with torch.no_grad():
        other.model.embed_tokens.weight[0] = 1e4
    found = [completion_log_probs(model, prompts, completions) for model in (one, other)]
    np.testing.assert_array_equal(*found)


def test_a_little_memory_gives_the_same(monkeypatch):
    from llmkd.objectives import sequence

    model = tiny_llama(1)
    whole = completion_log_probs(model, *questions())
    monkeypatch.setattr(sequence, "chunk_rows", lambda *_: 3)
    few = completion_log_probs(model, *questions())
    np.testing.assert_allclose(few, whole, rtol=0, atol=1e-5)


def test_the_model_is_asked_in_eval_mode_and_left_as_it_was():
    model = tiny_llama(1)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = [completion_log_probs(model, *questions()) for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_progress_is_told_row_by_row():
    told = []
    completion_log_probs(tiny_llama(1), *questions(), batch_size=4, bar=told.append)
    assert told == [4, 4, 1]


def test_autocast_is_the_arithmetic_of_a_bf16_training():
    model = tiny_llama(1)
    narrow = completion_log_probs(model, *questions(), autocast=torch.bfloat16)
    wide = completion_log_probs(model, *questions())
    assert not np.array_equal(narrow, wide)
    np.testing.assert_allclose(narrow, wide, rtol=0.02, atol=0.3)


@pytest.mark.parametrize(
    "prompts, completions, words",
    [([[1], []], [[1], [2]], "prompt: .*row 1"), ([[1]], [[]], "completion: .*row 0")],
)
def test_rows_without_tokens_are_refused(prompts, completions, words):
    with pytest.raises(DataError, match=words):
        completion_log_probs(tiny_llama(1), prompts, completions)


def test_weights_that_are_no_numbers_are_said():
    model = tiny_llama(1)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="log-probability of completion 0 is nan"):
        completion_log_probs(model, *questions())


def test_lora_on_the_head_needs_the_plain_way():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    model = get_peft_model(tiny_llama(1, tied=False), config)
    with pytest.raises(RecipeError, match="lora_target_modules"):
        CompletionScorer().open(model)
    scorer = CompletionScorer(fused=False)
    scorer.open(model)
    found = completion_log_probs(model, *questions(), scorer=scorer)
    plain = completion_log_probs(tiny_llama(1, tied=False), *questions())
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)
