"""A policy between two iterations: what it is, and how it is loaded to train or to answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trl import ModelConfig, get_quantization_config

from llmkd.teachers.frozen import collect
from llmkd.teachers.loading import load_model, whole_weights


@dataclass(frozen=True)
class Policy:
    """A model folder or Hub id, or a base with the adapter of an iterate in `adapter`."""

    source: str
    revision: str | None = None
    adapter: str | None = None


def load_policy(policy: Policy, config: ModelConfig, *, trainable: bool) -> Any:
    """The policy's model; a trainable adapter goes on from where it stood.

    A quantised base stays quantised: what is scored is what is trained.
    """
    model = load_model(
        policy.source,
        revision=policy.revision,
        dtype=config.dtype,
        attn=config.attn_implementation,
        quantization=get_quantization_config(config),
    )
    if policy.adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, policy.adapter, is_trainable=trainable)


@contextmanager
def answering(policy: Policy, config: ModelConfig, device: Any) -> Iterator[Any]:
    """The policy whole on this rank's device, frozen, for as long as the block lasts."""
    with whole_weights():
        model = load_policy(policy, config, trainable=False)
    if not getattr(model, "is_quantized", False):
        model.to(device)
    model.requires_grad_(False)
    model.eval()
    try:
        yield model
    finally:
        del model
        collect()
