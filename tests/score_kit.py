"""Tiny scorers: a tokenizer with the level words, a Llama of one layer, an image-text model."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from conftest import sentences
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llmkd.data import train_bpe
from llmkd.data.levels import QUALITY, find_levels
from llmkd.data.score_tokens import ScorePrompt

VALUES = (5.0, 4.0, 3.0, 2.0, 1.0)
PREFIX = "The quality of the text is"
PROMPT = ScorePrompt(("How good is this text, all in all and on the whole?", "Rate the text."))
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
IMAGE_CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def _bpe() -> Any:
    said = [f"{PREFIX} {word}. The {word} text" for word in QUALITY] * 20
    with tempfile.TemporaryDirectory() as folder:
        return train_bpe([*said, *sentences()], 420, Path(folder))


def score_tokenizer(*, chat: bool = False) -> Any:
    """A byte-level BPE in which each level word after a blank is one token."""
    tokenizer = copy.deepcopy(_bpe())
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def score_levels(tokenizer: Any = None) -> Any:
    """excellent to bad, 5 to 1."""
    return find_levels(tokenizer or score_tokenizer(), QUALITY, VALUES, PREFIX)


def score_llama(*, seed: int = 0, pad_vocab: int = 12, window: int = 256, **keys: Any) -> Any:
    """One layer of width 8 whose head has `pad_vocab` rows more than the tokenizer has tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(score_tokenizer()) + pad_vocab,
        hidden_size=8,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=2,
        max_position_embeddings=window,
        initializer_range=0.5,
        tie_word_embeddings=False,
        pad_token_id=0,
        **keys,
    )
    return LlamaForCausalLM(config).eval()


def image_scorer(*, seed: int = 0, chat: bool = True) -> tuple[Any, Any]:
    """A LLaVA of width 8 that sees four patches of 16 x 16 pixels, and its processor."""
    tokenizer = score_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>")]})
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=IMAGE_CHAT if chat else None,
    )
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer) + 4,
        hidden_size=8,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # or all images look alike at width 8
        for weight in model.model.multi_modal_projector.parameters():
            weight.mul_(20.0)
    return model.eval(), processor


def score_row(number: int, **keys: Any) -> dict[str, Any]:
    """A rated row as `load_score_rows` makes them."""
    base = {"row": number, "text": None, "messages": None, "images": None, "group": None}
    label = {"mean": 3.2, "std": 0.5, "n": None, "ratings": None, "probs": None}
    return {**base, **label, **keys}
