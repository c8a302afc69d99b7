"""Teachers of task models: their insides for one batch, and their class distributions."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmkd.data.collator import for_the_model
from llmkd.errors import RecipeError
from llmkd.teachers.attention_maps import open_maps
from llmkd.teachers.frozen import collect, freeze, let_go, place
from llmkd.teachers.inside import Inside, Wanted, look_inside
from llmkd.teachers.loading import load_config, load_model
from llmkd.teachers.stored_classes import StoredClasses
from llmkd.types import DenseLogits, MixtureTarget

logger = logging.getLogger(__name__)


class LatentTeacher:
    """An encoder (or a decoder) that answers a batch with hidden states, raw attention scores and,
    with a task head, logits.

    `source` is a Hub id or folder, read by `load`, or a model. `head` is none, sequence or token.
    `wanted` may be set at any time; attention is switched to recorded maps once it asks for them.
    Frozen, in eval mode, without gradients.
    """

    def __init__(
        self,
        source: str | Path | torch.nn.Module,
        *,
        head: str = "none",
        wanted: Wanted | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        key: str = "teacher_model_name_or_path",
    ) -> None:
        self.source, self.revision, self.dtype, self.key = source, revision, dtype, key
        self.head, self.wanted = head, wanted or Wanted()
        self.model: Any = source if isinstance(source, torch.nn.Module) else None
        self.padding: int | None = None  # id of the rows' padding, which a decoder's head asks for
        self.forwards = 0
        self._accelerator: Any = None
        self._maps = False  # whether attention is switched

    @property
    def name(self) -> str:
        """Id, folder, or the id an instance was loaded from."""
        config = getattr(self.source, "config", None)
        if config is not None:
            return getattr(config, "_name_or_path", "") or type(self.source).__name__
        return str(self.source)

    @property
    def loaded(self) -> bool:
        """Whether it holds memory that `release` would free."""
        return self.model is not None

    def config(self) -> PretrainedConfig:
        """The teacher's config, read without its weights."""
        known: Any = getattr(self.source, "config", None)
        return (
            known if known is not None else load_config(str(self.source), self.revision, self.key)
        )

    def load(self, accelerator: Any) -> None:
        """Load, freeze, switch attention where maps are wanted, and place: each of them once.

        Raises RecipeError (unreadable, no maps) and TeacherError (no head, NaN weights).
        """
        if self._accelerator is not None:
            self._open()
            return
        if self.model is None:
            self.model = load_model(
                str(self.source),
                revision=self.revision,
                dtype=self.dtype,
                key=self.key,
                head=self.head,
            )
        freeze(self.model, self.name)
        if self.head == "sequence" and self.padding is not None:
            self.model.config.get_text_config().pad_token_id = self.padding
        self._open()
        self.model = place(self.model, accelerator)
        self._accelerator = accelerator

    def _open(self) -> None:
        if self.wanted.attention and not self._maps:
            # a placed one may be wrapped in an engine
            open_maps(getattr(self.model, "module", self.model), self.key)
            self._maps = True

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Inside:
        """What is wanted of a batch; labels and row numbers are left alone."""
        if self._accelerator is None:
            raise RuntimeError("call load() before asking the teacher")
        self._open()
        self.forwards += 1
        with self._accelerator.autocast():
            return look_inside(self.model, for_the_model(inputs), self.wanted)

    def classes(self, inputs: Mapping[str, Tensor]) -> DenseLogits:
        """Its class distribution alone."""
        inside = self(inputs)
        assert inside.logits is not None
        return DenseLogits(inside.logits, inside.logits.shape[-1])

    def release(self) -> None:
        """Let go of the weights; an instance the caller also holds stays in the caller's memory."""
        if self.model is None:
            return
        self.source = self.name
        let_go(self.model)
        self.model, self._accelerator, self._maps = None, None, False
        collect()


AnyClassTeacher = LatentTeacher | StoredClasses


class ClassTeachers:
    """Who gives the soft class labels: one model or store, or several averaged in probability
    (MEAL V2, arXiv 2009.08453) with `weights` (default equal, scaled to sum to 1).
    """

    def __init__(
        self, teachers: Sequence[AnyClassTeacher], weights: Sequence[float] | None = None
    ) -> None:
        given = [1.0] * len(teachers) if weights is None else [float(w) for w in weights]
        fit = len(given) == len(teachers) > 0 and all(0 <= weight < math.inf for weight in given)
        if not fit or sum(given) <= 0:
            raise RecipeError.of(
                "teachers",
                given,
                f"need one finite weight >= 0 for each of {len(teachers)}, not all 0",
                "leave the weights out: all teachers count alike",
            )
        self.teachers = list(teachers)
        self.weights = tuple(weight / sum(given) for weight in given)
        for teacher in self.teachers:
            if isinstance(teacher, LatentTeacher):
                teacher.wanted = replace(teacher.wanted, logits=True)

    @property
    def name(self) -> str:
        """The names, joined."""
        return " + ".join(teacher.name for teacher in self.teachers)

    @property
    def live(self) -> bool:
        """Whether all can be asked about any row; a store knows those it was filled with."""
        return all(isinstance(teacher, LatentTeacher) for teacher in self.teachers)

    def load(self, accelerator: Any) -> None:
        """Bring all of them in."""
        for teacher in self.teachers:
            teacher.load(accelerator)

    def __call__(self, inputs: Mapping[str, Tensor]) -> DenseLogits | MixtureTarget:
        """The soft label of a batch, [B, C] or [B, T, C]."""
        parts = tuple(_classes(teacher, inputs) for teacher in self.teachers)
        return parts[0] if len(parts) == 1 else MixtureTarget(parts, self.weights)

    def release(self) -> None:
        """Let all of them go."""
        for teacher in self.teachers:
            teacher.release()


def _classes(teacher: AnyClassTeacher, inputs: Mapping[str, Tensor]) -> DenseLogits:
    if isinstance(teacher, LatentTeacher):
        return teacher.classes(inputs)
    logits = teacher(inputs)
    return DenseLogits(logits, logits.shape[-1])
