"""A student on its way: its model, and the projections that carry its states to the teacher's
width. They stay with it through all stages and are dropped when it is exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.errors import RecipeError
from llmkd.teachers.attention_maps import open_maps
from llmkd.teachers.inside import Inside, Wanted, look_inside

PROJECTIONS = ("shared", "per_layer", "none")
PREFIX = "body."


class LatentStudent(nn.Module):
    """`body` (any transformers model, with or without a task head) and W [D_student, D_teacher].

    `forward` gives a flat mapping of what `wanted` asks for (see `Inside`), hidden states already
    projected, so that data-parallel wrappers see every tensor the loss is made of.
    """

    def __init__(self, body: Any, projections: nn.ModuleDict | None = None) -> None:
        super().__init__()
        self.body = body
        self.projections = projections if projections is not None else nn.ModuleDict()
        self.wanted = Wanted()
        # What LoRA (or the caller) froze stays so, whatever a stage wants.
        self._fixed = {name for name, weight in body.named_parameters() if not weight.requires_grad}
        self.config = body.config
        self._no_split_modules = getattr(body, "_no_split_modules", None)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def want(self, wanted: Wanted) -> None:
        """Say what `forward` shall give; switches attention to recorded maps where needed.

        What takes no part (pooler and head, where no logits are wanted; projections of layers that
        are not) is frozen: with flat shards it would change all the same, and ranks would wait for
        its gradients. What was frozen when this student was made stays so.
        """
        self.wanted = wanted
        trunk = {id(weight) for weight in self.body.base_model.parameters()}
        for name, weight in self.body.named_parameters():
            idle = "pooler" in name.split(".") or id(weight) not in trunk
            weight.requires_grad_(name not in self._fixed and (wanted.logits or not idle))
        for name, projection in self.projections.items():
            used = wanted.hidden if name == "shared" else int(name) in wanted.hidden
            projection.requires_grad_(bool(used))
        if wanted.attention:
            open_maps(self.body, "attn")

    def forward(self, **features: Any) -> dict[str, Tensor]:
        """The inside of a batch, flat; hidden states [B, T, D_teacher]."""
        inside = look_inside(self.body, features, self.wanted)
        projected = {layer: self.project(layer, state) for layer, state in inside.hidden.items()}
        return Inside(projected, inside.scores, inside.visible, inside.logits).flat()

    def project(self, layer: int, hidden_BTD: Tensor) -> Tensor:
        """A layer's states in the teacher's width; unchanged where there is no projection."""
        if not self.projections:
            return hidden_BTD
        name = str(layer) if str(layer) in self.projections else "shared"
        return self.projections[name](hidden_BTD)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """As the body does it; what newer versions of transformers call."""
        self.body.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As the body does it."""
        self.body.gradient_checkpointing_enable(**options)

    def gradient_checkpointing_disable(self) -> None:
        """As the body does it."""
        self.body.gradient_checkpointing_disable()


def new_projections(
    how: str, *, layers: Iterable[int], student_width: int, teacher_width: int, seed: int
) -> nn.ModuleDict:
    """Projections W without bias: one for all layers (`shared`), one for each, or `none`.

    Fresh from the seed, scaled so that a state keeps its size. RecipeError for `none` between
    unequal widths.
    """
    if how not in PROJECTIONS:
        raise RecipeError.of("projection", how, "unknown", f"known: {', '.join(PROJECTIONS)}")
    if how == "none":
        if student_width != teacher_width:
            raise RecipeError.of(
                "projection",
                how,
                f"the student is {student_width} wide, the teacher {teacher_width}",
                "--projection shared",
            )
        return nn.ModuleDict()
    names = ["shared"] if how == "shared" else [str(layer) for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    made = nn.ModuleDict()
    for name in names:
        linear = nn.Linear(student_width, teacher_width, bias=False)
        with torch.no_grad():
            values = torch.randn(teacher_width, student_width, generator=generator)
            linear.weight.copy_(values / student_width**0.5)
        made[name] = linear
    return made


def with_projection(body: Any, weight: Tensor) -> LatentStudent:
    """A student whose shared projection begins as `weight` [D_student, D_teacher]."""
    linear = nn.Linear(*weight.shape, bias=False)
    linear.load_state_dict({"weight": weight.T.contiguous()})
    return LatentStudent(body, nn.ModuleDict({"shared": linear}))


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A `LatentStudent`'s state dict as the body's own and the projections'."""
    body = {name[len(PREFIX) :]: value for name, value in state.items() if name.startswith(PREFIX)}
    return body, {name: value for name, value in state.items() if not name.startswith(PREFIX)}
