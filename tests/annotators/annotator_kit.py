"""Tiny judges and reward models in folders, as a recipe names them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_llama
from task_kit import VOCABULARY, bert_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from llmkd.annotators.base import Item

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ITEMS = [
    Item(0, "the cat sat", ("a mat", "on a mat and saw two dogs", "rain")),
    Item(1, "two dogs run far from home", ("fell", "while rain fell all day")),
]
PAIR = "{prompt} {response_a} {response_b}"


def save_judge(folder: Path, tokenizer: Any, *, window: int = 128, chat: bool = False, seed=0):
    """A random causal LM of width 8 with an untied head; returns the model."""
    model = tiny_llama(seed, vocab=len(tokenizer), tied=False, window=window)
    return _saved(folder, model, tokenizer, chat)


def save_constant_judge(folder: Path, tokenizer: Any, logits: dict[str, float]) -> None:
    """A causal LM that answers every text with the same logits: those named, 0 for all others."""
    model = tiny_llama(0, vocab=len(tokenizer), tied=False, window=256)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:  # nothing is added to the stream of ones
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for text, logit in logits.items():
            place = tokenizer.convert_tokens_to_ids(text)
            model.lm_head.weight[place] = logit / 8  # eight ones of hidden state
    _saved(folder, model, tokenizer, False)


def save_reward(
    folder: Path, tokenizer: Any, *, outputs=1, seed=0, window=128, pad: int | None = 0, chat=False
) -> LlamaForSequenceClassification:
    """A random decoder with a head of `outputs`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=2,
        intermediate_size=16,
        num_attention_heads=2,
        max_position_embeddings=window,
        initializer_range=0.3,
        num_labels=outputs,
        pad_token_id=pad,
    )
    return _saved(folder, LlamaForSequenceClassification(config), tokenizer, chat)


def save_bert(folder: Path, *, outputs: int = 1, seed: int = 0, bias: float | None = None):
    """A random encoder with a head of `outputs`; with `bias` it says that and nothing else."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=outputs,
    )
    model = BertForSequenceClassification(config)
    if bias is not None:
        torch.nn.init.zeros_(model.classifier.weight)
        torch.nn.init.constant_(model.classifier.bias, bias)
    return _saved(folder, model, bert_tokenizer(), False)


def _saved(folder: Path, model: Any, tokenizer: Any, chat: bool) -> Any:
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    if chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return model.eval()
