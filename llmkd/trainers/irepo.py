"""iREPO's regression: a policy's log-ratios on pairs towards preference logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmkd.data.order import LengthGroupedSampler
from llmkd.data.pair_checks import pair_lengths
from llmkd.data.pair_collator import NEEDED, REFERENCE_COLUMNS, PairCollator
from llmkd.data.tokenizer import pad_id
from llmkd.models.log_probs import CompletionScorer
from llmkd.objectives import normalise
from llmkd.objectives.preference import find_preference_loss
from llmkd.objectives.token import IGNORE
from llmkd.trainers import irepo_checks as checks
from llmkd.trainers.base import SoftLabelTrainer
from llmkd.trainers.irepo_config import IrepoConfig
from llmkd.trainers.irepo_reference import ReadyReferences, References
from llmkd.types import LossTerm


class IrepoTrainer(SoftLabelTrainer):
    """Trains a causal LM on pairs with `pref_logit` (arXiv 2405.15230 and relatives).

    Rows: `prompt_ids`, `ids_1`, `ids_2` (completions, END token included), `pref_logit` (signed
    logit that response 1 is preferred, nats), and optionally `ref_logps_1`, `_2` and
    `initial_logps_1`, `_2` (token sums in nats under the previous and the first policy). Missing
    ones are computed before the first step by the model itself, adapter off for the initial policy;
    no second model is held. The loss is a mean over the pairs of the whole optimizer step. Logs and
    held-out metrics: loss, accuracy, margin, target, squared_error, and the mean log-ratios
    logratio_reference and logratio_initial over all responses. `model` may be a Hub id or folder;
    `peft_config` makes the policy an adapter. Raises RecipeError and DataError before the first
    step.
    """

    _tag_names = ("llmkd", "irepo")
    args: IrepoConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: IrepoConfig,
        *,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        policy: Any = checks.ready_policy(model, args, peft_config)
        self.starts_adapted = peft_config is None and hasattr(policy, "peft_config")
        self.scorer = CompletionScorer(args.head_memory_mib, args.fused_head)
        self.scorer.open(policy)
        self.references, self.resumed_from = References(self.starts_adapted), None
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = PairCollator(pad_id(kwargs.get("processing_class")))
        for key in ("train_dataset", "eval_dataset"):
            kwargs[key] = checks.ready_pairs(kwargs.get(key), key, policy, args, self.references)
        checks.warn_of_hard_labels(kwargs["train_dataset"], args)
        kwargs.setdefault("compute_metrics", lambda found: checks.held_out_metrics(self, found))
        super().__init__(model=policy, args=args, **kwargs)
        self._loss, self.metric_names = find_preference_loss(args.loss).function, ()
        self.add_callback(ReadyReferences(self))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*NEEDED, *REFERENCE_COLUMNS, "row", "pair"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows, args = train_dataset if train_dataset is not None else self.train_dataset, self.args
        if args.train_sampling_strategy != "group_by_length" or not isinstance(rows, Dataset):
            return super()._get_train_sampler(train_dataset)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.data_seed if args.data_seed is not None else args.seed
        return LengthGroupedSampler(pair_lengths(rows), batch, seed)

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, Tensor) and data.dtype == torch.float64:
            return data.to(self.args.device)  # DeepSpeed would round logits and references to bf16
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Pairs and completion tokens of the whole step, over ranks and micro-batches, [2]."""
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batch_samples:
            counts[0] += len(batch["labels"])
            counts[1] += (batch["labels"] != IGNORE).sum().to(device)
        return self.accelerator.reduce(counts, "sum") if batch_samples else None

    def tokens_of(self, items_in_step: Any) -> int:
        """Completion tokens of a step."""
        return int(items_in_step[1]) if items_in_step is not None else 0

    def log_ratios(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """log pi/reference of both responses, [B, 2] float64 nats; `initial` where it is known."""
        ids, labels = inputs["input_ids"].flatten(0, 1), inputs["labels"].flatten(0, 1)
        sums_B2 = self.scorer(model, ids, labels).view(-1, 2)
        initial, reference = (
            self.references.look_up(name, inputs) for name in ("initial_logps", "ref_logps")
        )
        base = initial if self.args.reference == "initial" and initial is not None else reference
        if base is None:
            base = checks.reference_of_start(self, sums_B2)
        found = {"reference": sums_B2 - base}
        return found if initial is None else found | {"initial": sums_B2 - initial}

    def _term(self, ratios: dict[str, Tensor], inputs: dict[str, Any]) -> LossTerm:
        """The loss of a batch as a sum over its pairs."""
        ratio_B2 = ratios["reference"]
        if self.args.length_normalize:
            ratio_B2 = ratio_B2 / (inputs["labels"] != IGNORE).sum(-1)
        delta_B, options = ratio_B2[:, 0] - ratio_B2[:, 1], self.args.loss_options()
        term = self._loss(delta_B, inputs["pref_logit"], beta=self.args.beta, **options)
        for name, each_B2 in ratios.items():
            term.metrics[f"logratio_{name}"] = each_B2.detach().mean(1).sum()
        return term

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Mean over the pairs of the whole optimizer step."""
        ratios = self.log_ratios(model, inputs)
        term = self._term(ratios, inputs)
        if model.training:
            self.record(term)
        items = None if num_items_in_batch is None else num_items_in_batch[0]
        ranks = self.accelerator.num_processes if num_items_in_batch is not None else 1
        loss = normalise(term, items, world_size=ranks).float()
        return (loss, ratios) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss and metrics of each pair, [B, 1 + metrics] float64."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            ratios = self.log_ratios(model, inputs)
        rows_BM, self.metric_names = checks.by_pair(self._term, ratios, inputs)
        return rows_BM[:, 0].mean(), rows_BM, rows_BM[:, 0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means per pair since the last training line."""
        if "loss" in logs:
            sums = self.take_sums()
            count = sums.pop("count", 0.0)
            logs |= {name: value / max(count, 1.0) for name, value in sums.items()}
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; remembers where a resumed run finds its references."""
        self.resumed_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.references.write(Path(self._get_output_dir(trial)) / name)
        super()._save_checkpoint(model, trial)
