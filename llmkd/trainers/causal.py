"""Trainers of next-token distributions: the loss head, and exact held-out metrics."""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from llmkd.data.collator import CountableTargets, PackedCollator, for_the_model
from llmkd.data.tokenizer import pad_id
from llmkd.objectives import FusedLinearKD, head_scores
from llmkd.objectives.token import IGNORE, nats_and_hits, shift_labels
from llmkd.teachers.causal_head import TASK, head_agrees, open_head
from llmkd.trainers.base import SoftLabelTrainer
from llmkd.types import Head, LossTerm, Target

logger = logging.getLogger(__name__)


class CausalTrainer(SoftLabelTrainer):
    """A `SoftLabelTrainer` of causal LMs.

    Held-out metrics are token-weighted and at temperature 1: `eval_loss` (nats/token),
    `eval_accuracy` and, where `bytes_per_token` is given, `eval_bits_per_byte`.
    """

    fused_head = True
    head_memory_mib = 192

    def __init__(self, *args: Any, bytes_per_token: float | None = None, **kwargs: Any) -> None:
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = PackedCollator(pad_id(kwargs.get("processing_class")))
        kwargs["data_collator"] = CountableTargets(kwargs["data_collator"])
        own_metrics = kwargs.get("compute_metrics") is None
        if own_metrics:
            kwargs["compute_metrics"] = self._held_out_metrics
        super().__init__(*args, **kwargs)
        self._head_opens: bool | None = None
        if self.fused_head and not open_head(self.model):
            self._head_opens = False
        self._own_metrics = own_metrics
        self.bytes_per_token = bytes_per_token
        self._loss_shifts_labels = True  # upstream counts labels; our objectives always shift

    def head_opens(self, model: nn.Module, features: dict[str, Tensor]) -> bool:
        """Whether the fused head serves this model; asked of the model itself, once.

        Where its logits are more than hidden states times a weight, logits are made the plain way.
        """
        if self._head_opens is None:
            # DataParallel would gather sums as if they were rows
            plain = isinstance(model, nn.DataParallel) or not self.fused_head
            self._head_opens = not plain and head_agrees(model, features)
            if not plain and not self._head_opens:
                logger.warning("the student's head is no plain one; its logits are made whole")
        return self._head_opens

    def soft_loss(
        self,
        model: nn.Module,
        features: dict[str, Tensor],
        labels_BT: Tensor,
        target: Target | None,
        kd: FusedLinearKD,
        *,
        whole: bool = False,
    ) -> tuple[LossTerm, Any]:
        """The mix `kd` of a batch, and the model's outputs where it made logits (else None).

        `whole` asks for those outputs whatever they cost. Position t predicts the label of t + 1;
        what has none is not projected.
        """
        gold_BT = shift_labels(labels_BT)
        mask_BT = gold_BT != IGNORE
        if whole or not self.head_opens(model, features):
            outputs = model(**features, use_cache=False)
            return kd.of_logits(outputs.logits, target, mask_BT, gold_BT=gold_BT), outputs

        def task(hidden_BTH: Tensor, head: Head) -> dict[str, Tensor]:
            term = kd(hidden_BTH, head, target, mask_BT, gold_BT=gold_BT)
            return {"total": term.total, "count": term.count, **term.metrics}

        sums = dict(model(**features, use_cache=False, **{TASK: task}))
        return LossTerm(sums.pop("total"), sums.pop("count"), sums), None

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Sums per row [B, 3] of nats, hits and counted tokens instead of logits."""
        if not self._own_metrics:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums_B3 = self._held_out_sums(model, for_the_model(inputs), inputs["labels"])
        loss = sums_B3[:, 0].sum() / sums_B3[:, 2].sum().clamp(min=1)
        return loss, sums_B3, sums_B3[:, 2]

    def _held_out_sums(
        self, model: nn.Module, features: dict[str, Tensor], labels_BT: Tensor
    ) -> Tensor:
        """Per row: nats, right argmax predictions, counted tokens; [B, 3] in float64."""
        gold_BT = shift_labels(labels_BT)
        mask_BT = gold_BT != IGNORE
        memory = self.head_memory_mib

        def task(hidden_BTH: Tensor, head: Head) -> dict[str, Tensor]:
            nats_N, hits_N = head_scores(
                hidden_BTH[mask_BT], head, gold_BT[mask_BT], memory_mib=memory
            )
            return {"nats": nats_N, "hits": hits_N}

        if self.head_opens(model, features):
            found = model(**features, use_cache=False, **{TASK: task})
            nats_N, hits_N = found["nats"], found["hits"]
        else:
            logits_BTV = model(**features, use_cache=False).logits
            nats_N, hits_N = nats_and_hits(logits_BTV, gold_BT, mask_BT)
        sums_BT3 = torch.zeros(*mask_BT.shape, 3, dtype=torch.float64, device=mask_BT.device)
        counted_N = torch.ones_like(nats_N)
        sums_BT3[mask_BT] = torch.stack((nats_N, hits_N.to(nats_N.dtype), counted_N), -1).double()
        return sums_BT3.sum(1)

    def _held_out_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        nats, hits, count = cast(Any, prediction.predictions).astype("float64").sum(axis=0)
        loss = nats / max(count, 1.0)
        metrics = {"loss": loss, "accuracy": hits / max(count, 1.0), "tokens": count}
        if self.bytes_per_token:
            metrics["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return metrics
