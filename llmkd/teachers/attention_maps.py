"""Raw attention scores out of any model that uses transformers' attention interface.

SDPA and flash kernels never make the [T, T] map, so a model asked for it has its attention switched
to `llmkd_maps`: layers that are recorded are computed eagerly, all others by SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from llmkd.errors import RecipeError

NAME = "llmkd_maps"


@dataclass
class Recorder:
    """Scores [B, A, T, T], scaled (capped, biased) but before mask and softmax, of the layers asked
    for (1 to N), and which pairs the model's own mask lets through (bool, broadcastable).
    """

    layers: frozenset[int]
    scores: dict[int, Tensor] = field(default_factory=dict)
    visible: dict[int, Tensor] = field(default_factory=dict)
    calls: int = 0


_CURRENT: ContextVar[Recorder | None] = ContextVar("llmkd_recorder", default=None)


@contextmanager
def recording(layers: frozenset[int]) -> Iterator[Recorder]:
    """Record the layers of the one forward pass inside; only of models `open_maps` switched."""
    recorder = Recorder(layers)
    token = _CURRENT.set(recorder)
    try:
        yield recorder
    finally:
        _CURRENT.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers: SDPA, and eagerly with its scores kept where a
    recorder asks for this layer.
    """
    recorder = _CURRENT.get()
    if recorder is not None:
        recorder.calls += 1
    recorded = recorder is not None and recorder.calls in recorder.layers
    if not recorded and kwargs.get("softcap") is None:  # which SDPA refuses
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # grouped queries share keys
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    factor: float = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * factor
    if (cap := kwargs.get("softcap")) is not None:  # Gemma 2
        scores = torch.tanh(scores / cap) * cap
    if (bias := kwargs.get("position_bias")) is not None:  # T5
        scores = scores + bias
    visible = _visible(module, scores, attention_mask, kwargs.get("is_causal"))
    if recorder is not None and recorded:
        recorder.scores[recorder.calls], recorder.visible[recorder.calls] = scores, visible
    hidden_from = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~visible, hidden_from).softmax(-1, dtype=torch.float32)
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _visible(
    module: nn.Module, scores: Tensor, mask: Tensor | None, is_causal: bool | None
) -> Tensor:
    """The pairs the model may see, bool: of a boolean or additive mask, or the causal triangle
    (told apart as `sdpa_attention_forward` does it).
    """
    queries, keys = scores.shape[-2:]
    if mask is not None:
        mask = mask[..., :keys]
        if mask.dtype == torch.bool:
            return mask
        return mask > torch.finfo(mask.dtype).min / 2
    everything = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=scores.device)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return everything.tril() if causal and queries > 1 else everything


def check_maps(config: Any, key: str) -> None:
    """RecipeError naming `key` for a type of model (its config) without the attention interface."""
    kind: Any = AutoModel._model_mapping
    if type(config) in kind and not kind[type(config)]._supports_attention_backend:
        raise _cannot(key, config, "its attention does not go through transformers' interface")


def open_maps(model: Any, key: str) -> None:
    """Switch `model` to recorded attention; RecipeError naming `key` where its maps cannot be had.

    Asked of the model itself, on a few ids: how many layers are recorded, and whether its final
    hidden states are what they were before. A refused model is left as it was.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    sharded = any(hasattr(weight, "ds_id") for weight in model.parameters())
    plain = None if sharded else _final(model)  # sharded: a question would be a collective
    layers = model.config.get_text_config().num_hidden_layers
    try:
        model.set_attn_implementation(NAME)
        if plain is None:
            return
        with recording(frozenset(range(1, layers + 1))) as recorder:
            shown = _final(model)
    except ValueError as error:
        model.set_attn_implementation(before)
        raise _cannot(key, model.config, str(error).splitlines()[0][:160]) from error
    why = None
    if len(recorder.scores) != layers:
        why = f"{len(recorder.scores)} of {layers} layers can be recorded"
    elif not (plain - shown).abs().max() <= 2e-2 * plain.abs().max():
        why = "its attention is more than scores, a mask and a softmax"
    if why:
        model.set_attn_implementation(before)
        raise _cannot(key, model.config, why)


@torch.no_grad()
def _final(model: Any) -> Tensor:
    """Float32 final hidden states of six ids, without dropout."""
    ids = torch.arange(6, device=next(model.parameters()).device)[None] + 1
    ids = ids % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    model.train(training)
    return states[-1].float()


def _cannot(key: str, config: Any, why: str) -> RecipeError:
    error = RecipeError.of(
        key,
        config.model_type,
        f"gives no attention maps to compare: {why}",
        "--attn none: hidden states alone",
    )
    assert isinstance(error, RecipeError)
    return error
