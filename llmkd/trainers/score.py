"""DeQA-Score: a language or image-text model that rates by naming a level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.data.levels import Levels
from llmkd.data.score_collator import NEEDED, NOBODY, OPTIONAL, ScoreCollator, for_the_scorer
from llmkd.data.tokenizer import pad_id
from llmkd.models.answer_logits import Answer, AnswerReader
from llmkd.objectives import normalise
from llmkd.trainers import score_ready as ready
from llmkd.trainers.base import SoftLabelTrainer
from llmkd.trainers.score_config import ScoreConfig
from llmkd.trainers.score_losses import COUNTED_BY, ScoreLosses


class ScoreTrainer(SoftLabelTrainer):
    """Trains a scorer on level distributions and on the order of pairs (arXiv 2501.11561).

    Rows: `input_ids`, `labels` (answer tokens, else -100), `level_at` (place of the level token,
    whose own label counts for nothing), `target` (a probability for each of `levels`; need not sum
    to one), `score_mean`, optionally `score_std` (null if unknown), `group_id` (pairs stay inside
    one), `row`, and a processor's outputs. The loss is

        fidelity_weight * fidelity + sides * [level_weight * (CE of the rest + KL at the level)
                                              + in_level_weight * in-level]

    with each part a mean over all its pairs, tokens or rows of the optimizer step; `sides` is 2
    where pairs are drawn. Partners are drawn within a micro-batch, anew each step, from the seed.
    Logs: each part's mean, level_mass, order (share of pairs in the raters' order), unpaired (share
    of rows). Held out: the same, plcc, srcc, mae; `metrics(table)` adds others, see
    `score_losses.TABLE`. `model` may be a Hub id or folder of a causal LM; `peft_config` makes it
    an adapter. Raises RecipeError and DataError before the first step.
    """

    _tag_names = ("llmkd", "deqa-score")
    args: ScoreConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: ScoreConfig,
        *,
        levels: Levels,
        peft_config: Any = None,
        metrics: Callable[[np.ndarray], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        scorer: Any = ready.ready_scorer(model, args, levels, peft_config)
        self.reader = AnswerReader(args.head_memory_mib, args.fused_head)
        self.reader.open(scorer)
        self.losses = ScoreLosses(levels, args)
        for key in ("train_dataset", "eval_dataset"):
            kwargs[key] = ready.ready_rows(kwargs.get(key), key, scorer, args, levels)
        ready.check_groups(kwargs["train_dataset"], args)
        if kwargs.get("data_collator") is None:
            processing = kwargs.get("processing_class")
            padding = pad_id(getattr(processing, "tokenizer", processing))
            kwargs["data_collator"] = ScoreCollator(padding)
        if kwargs.get("compute_metrics") is None:
            more = metrics or (lambda table: {})
            kwargs["compute_metrics"] = lambda found: (
                self.losses.held_out(found) | more(found.predictions)
            )
        super().__init__(model=scorer, args=args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *NEEDED, *OPTIONAL]

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, Tensor) and data.dtype == torch.float64:
            return data.to(self.args.device)  # DeepSpeed would round targets and scores to bf16
        return super()._prepare_input(data)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Upstream's, with a partner for each row of each micro-batch of the step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        seeds = [seed, self.state.global_step, self.accelerator.process_index]
        for place, batch in enumerate(batches):
            batch["partner"] = self.losses.partners(batch, [*seeds, place])
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Rows, other answer tokens and pairs of the whole step, over ranks and batches, [3]."""
        counts = torch.tensor([self.losses.counts(batch) for batch in batch_samples], device=device)
        return self.accelerator.reduce(counts.sum(0), "sum") if batch_samples else None

    def tokens_of(self, items_in_step: Any) -> int:
        """Answer tokens of a step, the level's included."""
        return int(items_in_step[:2].sum()) if items_in_step is not None else 0

    def answer(self, model: nn.Module, inputs: dict[str, Any]) -> Answer:
        """What the model says at the level token and on the rest of the answer."""
        features = for_the_scorer(inputs)
        return self.reader(model, features, inputs["labels"], inputs["level_at"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Weighted sum of the parts, each a mean over the whole optimizer step."""
        if "partner" not in inputs:
            inputs = {**inputs, "partner": self.losses.partners(inputs, 0)}
        answer = self.answer(model, inputs)
        ranks = self.accelerator.num_processes if num_items_in_batch is not None else 1
        loss = torch.zeros((), dtype=torch.float64, device=answer.level_BV.device)
        for name, term in self.losses.terms(answer, inputs).items():
            items = None if num_items_in_batch is None else num_items_in_batch[COUNTED_BY[name]]
            loss = loss + self.losses.weights[name] * normalise(term, items, world_size=ranks)
            if model.training:
                shown = {name: term.total.detach(), **term.metrics}
                shown.pop("target_mass", None)
                for key, value in shown.items():
                    self._sums[key] += value
                    self._sums[f"{key}_count"] += term.count
        if model.training and self.args.fidelity_weight:
            self._sums["unpaired"] += (inputs["partner"] == NOBODY).sum()
            self._sums["unpaired_count"] += len(inputs["partner"])
        return (loss.float(), {"logits": answer.level_BV}) if return_outputs else loss.float()

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The rows' table, see `score_losses.TABLE`; the loss is made of all of it at the end."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            table_BC = self.losses.table(self.answer(model, inputs), inputs)
        return table_BC[:, 0].mean(), table_BC, table_BC[:, 0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each part's mean since the last training line."""
        if "loss" in logs:
            sums = self.take_sums()
            for name in [name for name in sums if not name.endswith("_count")]:
                logs[name] = sums[name] / max(sums[f"{name}_count"], 1.0)
        super().log(logs, start_time)
