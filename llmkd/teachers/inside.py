"""What a model looks like inside for one batch: hidden states, attention scores, task logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmkd.teachers.attention_maps import recording


@dataclass(frozen=True)
class Wanted:
    """Which parts of the inside a loss needs: layers 1 to N; hidden layer 0 is the embedding."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    logits: bool = False


@dataclass(frozen=True, eq=False)
class Inside:
    """The parts: `hidden` [B, T, H], `scores` [B, A, T, T] raw, `visible` bool beside each, by
    layer; `logits` [B, C] or [B, T, C].
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    visible: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    def flat(self) -> dict[str, Tensor]:
        """One mapping of tensors, as data-parallel wrappers can hand it on."""
        found = {f"hidden.{layer}": value for layer, value in self.hidden.items()}
        found |= {f"scores.{layer}": value for layer, value in self.scores.items()}
        found |= {f"visible.{layer}": value for layer, value in self.visible.items()}
        return found if self.logits is None else {**found, "logits": self.logits}

    @classmethod
    def of_flat(cls, values: Mapping[str, Tensor]) -> Inside:
        """The inverse of `flat`."""
        parts: dict[str, dict[int, Tensor]] = {"hidden": {}, "scores": {}, "visible": {}}
        for name, value in values.items():
            kind, _, layer = name.partition(".")
            if layer:
                parts[kind][int(layer)] = value
        return cls(**parts, logits=values.get("logits"))


def look_inside(model: Any, features: Mapping[str, Any], wanted: Wanted) -> Inside:
    """Run `model` on a batch and keep what is wanted; logits only of one that has a task head."""
    with recording(frozenset(wanted.attention)) as recorder:
        outputs = model(**features, output_hidden_states=bool(wanted.hidden))
    states: Sequence[Tensor] = outputs.hidden_states if wanted.hidden else ()
    return Inside(
        {layer: states[layer] for layer in wanted.hidden},
        recorder.scores,
        recorder.visible,
        outputs.logits if wanted.logits else None,
    )
