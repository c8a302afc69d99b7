"""Reading models from the Hub or a folder: safetensors only, no remote code, one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmkd.errors import RecipeError


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = "float32",
    attn: str | None = None,
    key: str = "model_name_or_path",
    quantization: Any = None,
) -> PreTrainedModel:
    """`AutoModelForCausalLM` with safetensors only and remote code off.

    Raises RecipeError that names `key` where the model cannot be loaded.
    """
    options: dict[str, Any] = {"attn_implementation": attn} if attn else {}
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError) as error:
        raise RecipeError.of(
            key,
            name,
            f"cannot be loaded: {str(error).splitlines()[0][:240]}",
            "check the id or folder (only safetensors weights are read)",
            "without network only local folders work",
        ) from error


def load_config(name: str, revision: str | None, key: str) -> PretrainedConfig:
    """The config of a model without its weights; RecipeError that names `key`."""
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError.of(
            key,
            name,
            f"cannot be loaded: {str(error).splitlines()[0][:240]}",
            "check the id or folder; a folder needs config.json and model.safetensors",
            "without network only local folders work",
        ) from error


@contextmanager
def whole_weights() -> Iterator[None]:
    """Load a model whole on every rank even under ZeRO-3, for one that no DeepSpeed engine runs."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
