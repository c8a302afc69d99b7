"""Latent distillation: one stage of ERNIE-Tiny, TinyBERT and their like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from llmkd.data import TaskCollator
from llmkd.data.collator import for_the_model
from llmkd.models.latent_student import LatentStudent
from llmkd.objectives import normalise
from llmkd.objectives.token import IGNORE
from llmkd.teachers.inside import Inside, Wanted
from llmkd.teachers.latent import ClassTeachers, LatentTeacher
from llmkd.trainers import latent_checks as checks
from llmkd.trainers.base import SoftLabelTrainer
from llmkd.trainers.latent_config import LatentDistillConfig, check_losses
from llmkd.trainers.latent_losses import Batch
from llmkd.trainers.latent_scores import PARTS, held_out_metrics, row_sums
from llmkd.types import DenseLogits


class LatentDistillTrainer(SoftLabelTrainer):
    """One stage: a student towards a teacher's insides, its classes, and gold labels.

    `model` is a `LatentStudent`, or a model, Hub id or folder (projections are made then; the
    trained model is `trainer.model.body`); `teacher` likewise a `LatentTeacher` or what names one.
    `losses` names what is summed: latent (per token), soft and hard (per example; per labelled
    token of a token task), each a mean over the whole optimizer step, times its weight in `args`.
    `teacher` gives the insides and, unless `soft_teachers` do, the soft labels. `kind` is the task
    (see `objectives.prediction`); without soft and hard losses no label is read. Held-out metrics:
    each part's mean, and `task_metrics(outputs, labels)` where there is a task. Raises RecipeError
    before the first step for maps, heads or losses that do not fit. Soft labels from a store are
    those of the training rows, so held-out metrics have no `soft` then.
    """

    args: LatentDistillConfig

    def __init__(
        self,
        model: LatentStudent | PreTrainedModel | str,
        args: LatentDistillConfig,
        *,
        losses: Any,
        teacher: LatentTeacher | PreTrainedModel | str | None = None,
        soft_teachers: ClassTeachers | None = None,
        kind: str | None = None,
        task_metrics: Callable[..., dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.losses = check_losses(losses, "losses")
        checks.refuse_unread(kwargs)
        self.teacher = checks.ready_teacher(teacher, self.losses, soft_teachers)
        self.soft_teachers, self.kind, self.task_metrics = soft_teachers, kind, task_metrics
        checks.check_stage(self.losses, self.teacher, soft_teachers, kind, args)
        student = checks.ready_student(model, args, self.losses, self.teacher)
        self.plan = checks.latent_plan(student, args, self.losses, self.teacher)
        self.predicts = "soft" in self.losses or "hard" in self.losses
        if self.teacher is not None:
            own_classes = "soft" in self.losses and soft_teachers is None
            wanted = Wanted(self.plan.of_teacher, self.plan.maps_of_teacher, own_classes)
            self.teacher.wanted = wanted
        student.want(Wanted(self.plan.of_student, self.plan.maps_of_student, self.predicts))
        tokenizer = kwargs.get("processing_class")
        padding = checks.padding_of(student, self.teacher, soft_teachers, tokenizer)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = TaskCollator(padding)
        kwargs.setdefault("compute_metrics", lambda found: held_out_metrics(self, found))
        super().__init__(model=student, args=args, **kwargs)
        self.add_callback(_Teachers(self))

    def _set_signature_columns_if_needed(self) -> None:
        # Without a loss that reads them, labels do not even reach the collator.
        kept = ["input_ids", "attention_mask", "token_type_ids", "row"]
        self._signature_columns = [*kept, "labels"] if self.predicts else kept

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Tokens and labelled places of the whole step, over ranks and micro-batches, [2]."""
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batch_samples:
            labels = batch.get("labels") if self.kind == "token" else None
            examples = len(batch["input_ids"]) if labels is None else (labels != IGNORE).sum()
            counts += torch.tensor([batch["attention_mask"].sum(), examples], device=device)
        return self.accelerator.reduce(counts, "sum") if batch_samples else None

    def tokens_of(self, items_in_step: Any) -> int:
        """Tokens of a step, padding left out."""
        return int(items_in_step[0]) if items_in_step is not None else 0

    def load_teachers(self) -> None:
        """Bring in those that answer in this stage; nothing where they are there already."""
        if self.teacher is not None and self.teacher.wanted != Wanted():
            self.teacher.load(self.accelerator)
        if self.soft_teachers is not None and "soft" in self.losses:
            self.soft_teachers.load(self.accelerator)

    def answers(self, model: nn.Module, inputs: dict[str, Any]) -> Batch:
        """Student and teachers asked about a batch."""
        self.load_teachers()  # also where somebody evaluates without training
        student = Inside.of_flat(model(**for_the_model(inputs)))
        teacher, target = Inside(), None
        if self.teacher is not None and self.teacher.wanted != Wanted():
            teacher = self.teacher(inputs)
        if self.soft_teachers is not None and "soft" in self.losses:
            if model.training or self.soft_teachers.live:  # a store knows the training rows alone
                target = self.soft_teachers(inputs)
        elif teacher.logits is not None:
            target = DenseLogits(teacher.logits, teacher.logits.shape[-1])
        mask_BT = inputs["attention_mask"].bool()
        return Batch(student, teacher, target, mask_BT, inputs.get("labels"))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Weighted sum of the parts, each a mean over the whole optimizer step."""
        batch = self.answers(model, inputs)
        ranks = self.accelerator.num_processes if num_items_in_batch is not None else 1
        loss = torch.zeros((), device=batch.mask_BT.device)
        for name, term in batch.terms(self.plan, self.args, self.losses, self.kind).items():
            kind = 0 if name in ("attn", "hidden") else 1
            items = None if num_items_in_batch is None else num_items_in_batch[kind]
            weight = getattr(self.args, f"{name}_weight")
            loss = loss + weight * normalise(term, items, world_size=ranks)
            if model.training:
                self._sums[name] += term.total.detach()
                self._sums[f"{name}_count"] += term.count
        return (loss, {"logits": batch.student.logits}) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Loss, each row's sums [B, 2 * parts] with the task's logits, and their labels."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            batch = self.answers(model, inputs)
            sums = row_sums(self, batch)
        loss = sums[:, 0::2].sum() / len(sums)
        logits, labels = batch.student.logits, inputs.get("labels")
        if logits is None or labels is None:
            return loss, sums, sums[:, 1]
        return loss, (sums, logits.float()), labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each part's mean since the last training line."""
        if "loss" in logs:
            sums = self.take_sums()
            logs |= {n: sums[n] / max(sums[f"{n}_count"], 1.0) for n in PARTS if n in sums}
        super().log(logs, start_time)


class _Teachers(TrainerCallback):
    """Brings the teachers in when a stage begins; whoever made them lets them go."""

    def __init__(self, trainer: LatentDistillTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.load_teachers()
