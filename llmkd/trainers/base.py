"""What every llmkd trainer shares: honest normalisation, exact held-out metrics, safe
checkpoints.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmkd.data.collator import CountableTargets, PackedCollator, for_the_model
from llmkd.data.tokenizer import pad_id
from llmkd.errors import NonFiniteError
from llmkd.objectives import FusedLinearKD, head_scores
from llmkd.objectives.targets import wide
from llmkd.objectives.token import IGNORE, shift_labels
from llmkd.teachers.causal_head import TASK, head_agrees, open_head
from llmkd.trainers.checkpoints import mark_complete
from llmkd.types import Head, LossTerm, Target

logger = logging.getLogger(__name__)


class SoftLabelTrainer(Trainer):
    """`Trainer` whose loss is a `LossTerm`; loop, saving and logging stay upstream's.

    Held-out metrics are token-weighted and at temperature 1: `eval_loss` (nats/token),
    `eval_accuracy` and, where `bytes_per_token` is given, `eval_bits_per_byte`.
    Raises NonFiniteError at the first NaN or infinite loss or gradient norm.
    """

    loss_is_scaled_for_ga = True  # normalise() already divides by the tokens of the whole step

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
        # Upstream counts the tokens of a step only for models that take loss kwargs; ours always
        # needs the count, and our objectives always shift.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._sums: dict[str, Tensor] = defaultdict(self._zero)
        self._rows_in_step: list[int] = []
        self.tokens_in_step = 0
        self.add_callback(_CountTokens(self))

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

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = {"seq_lengths", "row", "rows"} - set(self._signature_columns or ())
        self._signature_columns = [*(self._signature_columns or ()), *sorted(ours)]

    def record(self, term: LossTerm) -> None:
        """Add a term's sums to what the next log line will show as means per token."""
        self._sums["count"] += term.count
        if "teacher_entropy" in term.metrics:
            self._sums["kd_count"] += term.count
        for name, value in term.metrics.items():
            self._sums[name] += value

    def take_sums(self) -> dict[str, float]:
        """Sums since the last call over all ranks. A collective: all call it at the same step."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = self.accelerator.reduce(torch.stack([self._sums[n] for n in names]), "sum")
        self._sums.clear()
        return dict(zip(names, cast(Tensor, sums).tolist(), strict=True))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Upstream's step, stopped at a loss that is not finite."""
        rows = inputs.get("rows")
        self._rows_in_step = rows.tolist() if rows is not None else []
        loss = super().training_step(model, inputs, *args)
        # args[0] counts the target tokens of the whole step, over ranks and micro-batches
        self.tokens_in_step = int(args[0]) if args and args[0] is not None else 0
        self._require_finite("loss", loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not self.args.fp16:  # fp16's loss scaler expects overflows
            self._require_finite("gradient norm", norm)
        return norm

    def _require_finite(self, what: str, value: Any) -> None:
        number = float(value)
        if not math.isfinite(number):
            rate, rows = self._get_learning_rate(), self._rows_in_step or "not numbered"
            raise NonFiniteError(
                f"{what} is {number} at step {self.state.global_step + 1} "
                f"(learning rate {rate:.3g}, rows {rows})\n"
                "  - the last good checkpoint is kept; the same command goes on from it\n"
                "  - lower learning_rate, raise warmup_steps, or set bf16 instead of fp16\n"
                "  - look at the rows above: one may hold broken text"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for name, weight in model.named_parameters():
            values = getattr(weight, "ds_tensor", weight)  # under ZeRO-3 this rank's shard
            if not bool(torch.isfinite(values).all()):
                self._require_finite(f"weight {name}", float("nan"))
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            mark_complete(Path(self._get_output_dir(trial)) / name, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        # A pickle of the arguments, hub token included; the recipe is kept as YAML instead.
        (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

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
            nats_N, hits_N = logit_scores(logits_BTV, gold_BT, mask_BT)
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


class _CountTokens(TrainerCallback):
    """Counts every step's target tokens into the state, where checkpoints and logs find them."""

    def __init__(self, trainer: SoftLabelTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.num_input_tokens_seen += self.trainer.tokens_in_step


def logit_scores(logits_BTV: Tensor, gold_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """`head_scores` of logits that are there: nats and hits of the masked-in positions, [N] each.

    Row by row, because a whole batch of log-probabilities is the largest tensor of an evaluation.
    """
    nats, hits = [], []
    for logits_TV, gold_T, mask_T in zip(logits_BTV, gold_BT, mask_BT, strict=True):
        logits_NV, gold_N = wide(logits_TV[mask_T]), gold_T[mask_T]
        own_N = logits_NV.gather(-1, gold_N[:, None]).squeeze(-1)
        nats.append(torch.logsumexp(logits_NV, -1) - own_N)
        hits.append(logits_NV.argmax(-1) == gold_N)
    return torch.cat(nats), torch.cat(hits)
