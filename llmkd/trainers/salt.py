"""SALT: a small model teaches a larger one for the first part of pretraining."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llmkd.data.collator import for_the_model
from llmkd.errors import RecipeError
from llmkd.objectives import FusedLinearKD, kd_steps, kd_weight_at, normalise
from llmkd.teachers import Teacher, as_teacher
from llmkd.teachers.loading import load_model
from llmkd.trainers.causal import CausalTrainer
from llmkd.trainers.config import SaltConfig
from llmkd.trainers.peft import with_adapter

logger = logging.getLogger(__name__)


class SaltTrainer(CausalTrainer):
    """Trains on (1 - w) CE + w KD for `kd_ratio` of all steps, then on CE (arXiv 2410.18779).

    `model` and `teacher` are models, Hub ids or folders; `teacher` may also be a `StoredTeacher` or
    several teachers. `peft_config` makes the student an adapter.
    One optimizer, one schedule and one data order run through the switch; the teacher leaves memory
    there. The stage follows `state.global_step`, so a resumed run knows it. Everything else is
    `transformers.Trainer`. Raises RecipeError without a teacher in a run that has a KD stage and
    TeacherError for one that speaks other tokens.
    """

    _tag_names = ("llmkd", "salt")
    args: SaltConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SaltConfig,
        *,
        teacher: Teacher | PreTrainedModel | str | Path | Sequence[Any] | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, SaltConfig):
            raise RecipeError.of("args", type(args).__name__, "SaltTrainer takes a SaltConfig")
        if isinstance(model, str):
            model = load_model(model)
        vocab = model.config.get_text_config().vocab_size
        if peft_config is not None:
            model = with_adapter(model, peft_config, args)
        words = getattr(kwargs.get("processing_class"), "__len__", lambda: 0)()
        if vocab < words:
            raise RecipeError.of(
                "model", f"vocab_size {vocab}", f"is smaller than the tokenizer's {words} entries"
            )
        self.fused_head, self.head_memory_mib = args.fused_head, args.head_memory_mib
        self._kd = FusedLinearKD(
            divergence=args.divergence,
            teacher_temperature=args.teacher_temperature,
            student_temperature=args.student_temperature,
            t2_scale=args.t2_scale,
            options=args.divergence_options(),
            memory_mib=args.head_memory_mib,
        )
        super().__init__(model=model, args=args, **kwargs)
        wants_teacher = args.kd_ratio > 0 and args.kd_weight > 0
        if wants_teacher and teacher is None:
            raise RecipeError.of(
                "teacher_model_name_or_path",
                None,
                f"kd_ratio {args.kd_ratio} and kd_weight {args.kd_weight} need a teacher",
                "name a Hub id or folder with the student's tokenizer",
                "--kd_ratio 0 trains without one",
            )
        self.teacher: Teacher | None = None
        self._last_weight = 0.0
        if wants_teacher and teacher is not None:
            self.teacher = as_teacher(teacher)
            self.teacher.check(vocab, cast(Any, self.processing_class))
            self.teacher.check_dataset(self.train_dataset)
        self.add_callback(_Stages(self))

    def stage_steps(self) -> int:
        """Optimizer steps of the KD stage; 0 where nobody teaches."""
        return kd_steps(self.args.kd_ratio, self.state.max_steps) if self.teacher else 0

    def kd_weight(self) -> float:
        """Weight of the KD term in the step that comes next."""
        return kd_weight_at(
            self.state.global_step,
            stage_steps=self.stage_steps(),
            weight=self.args.kd_weight,
            transition=self.args.transition,
            hold=self.args.transition_hold,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean nats per token of the whole optimizer step; plain CE outside of training."""
        features = for_the_model(inputs)
        weight = self.kd_weight() if model.training else 0.0
        target = self.teacher(inputs) if self.teacher and weight > 0 else None
        kd = replace(self._kd, kd_weight=weight)
        term, outputs = self.soft_loss(
            model, features, inputs["labels"], target, kd, whole=return_outputs
        )
        if model.training:
            self.record(term)
            self._last_weight = weight
        ranks = self.accelerator.num_processes if num_items_in_batch is not None else 1
        loss = normalise(term, num_items_in_batch, world_size=ranks)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means per token since the last training line: ce, kl, teacher_entropy."""
        if "loss" in logs:
            sums = self.take_sums()
            count, kd_count = sums.pop("count", 0.0), sums.pop("kd_count", 0.0)
            for name, value in sums.items():  # ce over all tokens, the rest over the taught ones
                logs[name] = value / max(count if name == "ce" else kd_count, 1.0)
            logs["kd_weight"] = self._last_weight
        super().log(logs, start_time)


class _Stages(TrainerCallback):
    """Brings the teacher in for its stage and sends it away after."""

    def __init__(self, trainer: SaltTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        teacher, last = self.trainer.teacher, self.trainer.stage_steps()
        if teacher is not None and state.global_step < last:
            teacher.load(self.trainer.accelerator)
            logger.info("KD stage: steps %d to %d of %d", state.global_step, last, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        teacher = self.trainer.teacher
        if teacher is None or state.global_step < self.trainer.stage_steps():
            return
        if teacher.loaded:
            teacher.release()
            logger.info(
                "step %d: the teacher has left; from here on hard labels", state.global_step
            )
