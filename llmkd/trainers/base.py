"""What every llmkd trainer shares: honest normalisation, sums for the log, safe checkpoints."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmkd.data import LengthGroupedSampler, token_counts
from llmkd.errors import NonFiniteError
from llmkd.trainers.checkpoints import mark_complete
from llmkd.types import LossTerm


class SoftLabelTrainer(Trainer):
    """`Trainer` whose loss is a `LossTerm`; loop, saving and logging stay upstream's.

    Raises NonFiniteError at the first NaN or infinite loss or gradient norm.
    """

    loss_is_scaled_for_ga = True  # normalise() already divides by the tokens of the whole step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Upstream counts the tokens of a step only for models that take loss kwargs; ours always
        # needs the count.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, Tensor] = defaultdict(self._zero)
        self._rows_in_step: list[int] = []
        self.tokens_in_step = 0
        self.add_callback(_CountTokens(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows, args = train_dataset if train_dataset is not None else self.train_dataset, self.args
        if args.train_sampling_strategy != "group_by_length" or not isinstance(rows, Dataset):
            return super()._get_train_sampler(train_dataset)
        # Upstream's goes through a pool from long rows to short ones, which a student follows.
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.data_seed if args.data_seed is not None else args.seed
        return LengthGroupedSampler(token_counts(rows), batch, seed)

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
        self.tokens_in_step = self.tokens_of(args[0] if args else None)
        self._require_finite("loss", loss)
        return loss

    def tokens_of(self, items_in_step: Any) -> int:
        """Tokens of what upstream counted for a whole step, over ranks and micro-batches."""
        return int(items_in_step) if items_in_step is not None else 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not self.args.fp16:  # fp16's loss scaler expects overflows
            self._require_finite("gradient norm", norm)
        return norm

    def _require_finite(self, what: str, value: Any) -> None:
        number = float(value)
        if not math.isfinite(number):
            rate, rows = self._get_learning_rate(), self._rows_in_step or "not numbered"
            kept = "  - the last good checkpoint is kept; the same command goes on from it\n"
            raise NonFiniteError(
                f"{what} is {number} at step {self.state.global_step + 1} "
                f"(learning rate {rate:.3g}, rows {rows})\n"
                f"{kept if self.state.global_step else ''}"
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


class _CountTokens(TrainerCallback):
    """Counts every step's target tokens into the state, where checkpoints and logs find them."""

    def __init__(self, trainer: SoftLabelTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.num_input_tokens_seen += self.trainer.tokens_in_step
