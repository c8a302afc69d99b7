"""A causal LM asked for its final hidden states instead of its logits.

The question goes through the model's own forward, wrappers included: DDP, FSDP and DeepSpeed gather
weights and arm their hooks only there. `open_head` teaches a model's forward and its head's forward
one more keyword, `llmkd_task`; without it they do what they did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.errors import RecipeError
from llmkd.types import Head

Task = Callable[[Tensor, Head], dict[str, Tensor]]
TASK = "llmkd_task"


def open_head(model: Any) -> bool:
    """Make `model(**inputs, llmkd_task=task)` return `task(hidden_BTH, head)`; whether it can.

    The head is applied as the model's own config says (scale, soft cap); `head_agrees` asks the
    model itself. RecipeError for LoRA on the head: its low-rank part is no plain weight.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = getattr(inner, "base_model", None)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or base is None or base is inner:
        return False
    _refuse_adapted_head(head)
    if (kept := getattr(head, "modules_to_save", None)) is not None:
        head = kept[head.active_adapters[0]]
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return False
    if not hasattr(inner, "_llmkd_head"):
        scale, softcap = head_shape(inner)
        _teach_head(head, scale, softcap)
        _teach_model(inner, base, head)
    return True


def _refuse_adapted_head(head: nn.Module) -> None:
    if hasattr(head, "lora_A"):
        raise RecipeError.of(
            "lora_target_modules",
            "lm_head",
            "the fused head cannot train LoRA on the output head",
            "take it out of lora_target_modules (all-linear leaves it out)",
            "lora_modules_to_save: [lm_head] trains the whole head",
            "--fused_head false makes logits the plain way",
        )


def head_shape(model: Any) -> tuple[float, float | None]:
    """Factor and soft cap that a model's config lays on its logits; 1 and None for most."""
    config = model.config.get_text_config()
    scale = 1.0
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        scale = float(factor)
    elif (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale = 1.0 / float(divisor)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return scale, float(cap) if cap else None


def _teach_head(head: nn.Linear, scale: float, softcap: float | None) -> None:
    plain = head.forward

    @functools.wraps(getattr(plain, "__func__", plain))  # with self, as a method is read
    def forward(self: nn.Linear, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        task = kwargs.pop(TASK, None)
        if task is None:
            return plain(hidden, *args, **kwargs)
        return task(hidden, Head(self.weight, self.bias, scale, softcap))

    head.forward = MethodType(forward, head)


def _teach_model(model: Any, base: nn.Module, head: nn.Module) -> None:
    plain = model.forward

    @functools.wraps(getattr(plain, "__func__", plain))  # with self, as a method is read
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        task = kwargs.pop(TASK, None)
        if task is None:
            return plain(*args, **kwargs)
        hidden_BTH = base(*args, **kwargs).last_hidden_state
        return head(hidden_BTH, **{TASK: task})

    model.forward = MethodType(forward, model)
    model._llmkd_head = True


@torch.no_grad()
def head_agrees(model: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether hidden states and head make the logits the model itself makes, on a few tokens.

    Some models do more on the way (a projection, a mask over entries); for those the plain way is
    right. A collective under ZeRO-3 and FSDP: all ranks ask.
    """
    found: dict[str, Tensor] = {}

    def task(hidden_BTH: Tensor, head: Head) -> dict[str, Tensor]:
        found["logits"] = head(hidden_BTH.to(head.weight.dtype)).float()
        found["narrow"] = torch.tensor(hidden_BTH.dtype != torch.float32)
        return {"sum": found["logits"].sum()}

    training = model.training
    model.eval()
    few = {name: value[:1, :8] for name, value in inputs.items() if value.dim() == 2}
    own_BTV = model(**few, use_cache=False).logits.float()
    model(**few, use_cache=False, **{TASK: task})
    model.train(training)
    gap = (own_BTV - found["logits"]).abs().max()
    # In bf16 two ways to the same logits differ in their last digits.
    narrow = found["narrow"].item() or torch.is_autocast_enabled(own_BTV.device.type)
    return bool(gap <= (2e-2 if narrow else 1e-4) * own_BTV.abs().max().clamp_min(1e-6))


def keep_head(model: Any, inputs: dict[str, Tensor]) -> Head:
    """A copy of a sharded model's head, taken inside its forward, where it is gathered anyway.

    One copy a rank; a collective. Cheaper than gathering it anew for every step.
    """
    found: list[Head] = []

    def task(hidden_BTH: Tensor, head: Head) -> dict[str, Tensor]:
        bias = None if head.bias is None else head.bias.detach().clone()
        found.append(replace(head, weight=head.weight.detach().clone(), bias=bias))
        return {"sum": hidden_BTH.sum()}

    few = {name: value[:1, :8] for name, value in inputs.items() if value.dim() == 2}
    model(**few, use_cache=False, **{TASK: task})
    return found[0]
