"""The student: loaded, or new from a config written in the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import ModelConfig

from llmkd.data.config import from_json
from llmkd.errors import RecipeError

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(kw_only=True)
class StudentConfig(ModelConfig):
    """TRL's `ModelConfig` (id, revision, dtype, LoRA keys) plus a model described in the recipe."""

    model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "A new model instead of model_name_or_path: model_type and any key of its "
            'config, e.g. \'{"model_type": "llama", "hidden_size": 256}\'. The vocabulary and '
            "the special tokens come from the tokenizer."
        },
    )

    def __post_init__(self) -> None:
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        self.model_config = from_json("model_config", self.model_config)
        if self.dtype not in DTYPES:
            raise RecipeError.of("dtype", self.dtype, f"use one of {', '.join(DTYPES)}")


def model_config(settings: dict[str, Any], tokenizer: Tokenizer, key: str) -> PretrainedConfig:
    """A transformers config from recipe `settings`; vocabulary and special tokens from `tokenizer`.

    Raises RecipeError for a missing or unknown model_type and for keys that type does not have.
    """
    if not isinstance(settings, dict):
        raise RecipeError.of(key, settings, "must be a mapping", "{model_type: llama, ...}")
    settings = dict(settings)
    kind = settings.pop("model_type", None)
    if kind is None:
        raise RecipeError.of(key, settings, "says no model_type", "model_type: llama")
    try:
        blank = AutoConfig.for_model(kind)
    except ValueError as error:
        raise RecipeError.of(
            f"{key}.model_type", kind, "transformers knows no such type", "llama, qwen2, gpt2, ..."
        ) from error
    known = set(blank.to_dict()) | set(blank.attribute_map)
    unknown = sorted(name for name in settings if name not in known)
    if unknown:
        raise RecipeError.of(
            f"{key}.{unknown[0]}",
            settings[unknown[0]],
            f"{kind} has no such config key",
            *_nearest(unknown[0], known),
        )
    settings.setdefault("vocab_size", len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings.setdefault(name, getattr(tokenizer, name))
    try:
        config = AutoConfig.for_model(kind, **settings)
        empty_model(config)
    except Exception as error:  # upstream raises a type of its own for every kind of slip
        raise RecipeError.of(
            key,
            settings,
            f"makes no causal language model: {type(error).__name__}: {str(error)[:300]}",
            "hidden_size must be a multiple of num_attention_heads, sizes whole and above 0",
        ) from error
    return config


def _nearest(name: str, known: set[str]) -> list[str]:
    import difflib

    return [f"did you mean {match!r}?" for match in difflib.get_close_matches(name, known, n=1)]


def new_model(config: PretrainedConfig, *, seed: int, attn: str | None = None) -> PreTrainedModel:
    """A model with fresh float32 weights; the same seed gives the same weights."""
    from transformers import set_seed

    set_seed(seed)
    options = {"attn_implementation": attn} if attn else {}
    return AutoModelForCausalLM.from_config(config, **options)


def check_window(
    config: PretrainedConfig, max_length: int, key: str, setting: str = "max_length"
) -> None:
    """RecipeError where rows of `max_length` tokens (the recipe's key `setting`) do not fit the
    positions of the model that `key` names.
    """
    window = getattr(config, "max_position_embeddings", None)
    if window is not None and max_length > window:
        raise RecipeError.of(
            setting,
            max_length,
            f"is longer than the window of {window} tokens of {key}",
            f"--{setting} {window}",
            f"a new model: set max_position_embeddings to {max_length}",
        )


def check_vocabulary(config: PretrainedConfig, tokenizer: Tokenizer, key: str) -> None:
    """RecipeError where the tokenizer has ids the model's head has no entry for."""
    if config.vocab_size < len(tokenizer):
        raise RecipeError.of(
            key,
            f"vocab_size {config.vocab_size}",
            f"is smaller than the tokenizer's {len(tokenizer)} entries",
            "name the model's own tokenizer: --tokenizer_name_or_path",
            f"a new model: leave vocab_size out or set it to {len(tokenizer)} or more",
        )


def empty_model(config: PretrainedConfig) -> Any:
    """The model `config` describes, on the meta device: every shape, no weights."""
    # Not `from_config`: under ZeRO-3 that initialises weights, which a meta tensor does not have.
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    with torch.device("meta"):
        return kind(config)


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the model `config` describes, without making its weights."""
    return sum(p.numel() for p in empty_model(config).parameters())
