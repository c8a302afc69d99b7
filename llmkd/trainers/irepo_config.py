"""Settings of `IrepoTrainer`: `TrainingArguments` plus the loss on pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from llmkd.errors import RecipeError
from llmkd.objectives.preference import PREFERENCE_LOSSES, check_flip_rate, find_preference_loss
from llmkd.trainers.arguments import check_rates, check_save_limit, check_sizes, check_unread

REFERENCE_CHOICES = ("previous", "initial")


@dataclass(kw_only=True)
class IrepoConfig(TrainingArguments):
    """iREPO, arXiv 2405.15230, and its relatives on the same pairs."""

    loss: str = field(
        default="irepo",
        metadata={
            "help": "irepo ((beta D - L)^2, D the log-ratio of a pair and L its preference "
            "logit), irepo_weighted, soft_dpo, dpo, ipo, rebel, robust_dpo."
        },
    )
    beta: float = field(
        default=0.1,
        metadata={
            "help": "What a nat of log-ratio is worth in nats of preference, above 0; small beta "
            "moves far. The paper's value is not known; the default is ours. For ipo it is tau."
        },
    )
    reference: str = field(
        default="previous",
        metadata={
            "help": "What log-ratios are measured from: previous (the model this training starts "
            "from: columns ref_logps_1 and _2) or initial (the one the first iteration started "
            "from: initial_logps_1 and _2; adapter off)."
        },
    )
    length_normalize: bool = field(
        default=False,
        metadata={"help": "Mean instead of sum over a completion's tokens; beta then means more."},
    )
    huber: float | None = field(
        default=None,
        metadata={"help": "Squares go on as straight lines beyond this residual, in nats."},
    )
    max_logit: float | None = field(
        default=None, metadata={"help": "Clamp preference logits to this size, in nats."}
    )
    flip_rate: float | None = field(
        default=None, metadata={"help": "Share of flipped labels that robust_dpo assumes, < 0.5."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of prompt and completion; longer rows are refused. By default the "
            "model's window."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Train without dropout: references are computed without it too."},
    )
    reference_batch_size: int = field(
        default=8,
        metadata={"help": "Completions at once where references are computed before training."},
    )
    fused_head: bool = field(
        default=True,
        metadata={
            "help": "Log-probabilities from hidden states, a few rows of logits at a time; false "
            "makes all logits first."
        },
    )
    head_memory_mib: int = field(
        default=192, metadata={"help": "MiB that the fused head may take for logits."}
    )
    learning_rate: float = field(
        default=1e-6, metadata={"help": "Peak learning rate (as TRL's DPO; LoRA wants 10 x)."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Off: llmkd stops at a non-finite loss instead of hiding it from the log."
        },
    )

    def loss_options(self) -> dict[str, Any]:
        """The settings that the loss named takes, beside beta."""
        given = {"huber": self.huber, "max_logit": self.max_logit, "flip_rate": self.flip_rate}
        return {name: given[name] for name in find_preference_loss(self.loss).options}

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it upstream refuses bf16 on a machine that has no GPU
        super().__post_init__()
        for key in ("beta", "huber", "max_logit"):
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise RecipeError.of(key, value, "must be above 0, and finite")
        check_rates(self)
        if self.beta is None:
            raise RecipeError.of("beta", None, "must be a number above 0", "default: 0.1")
        self._check_options()
        if self.reference not in REFERENCE_CHOICES:
            known = f"known: {', '.join(REFERENCE_CHOICES)}"
            raise RecipeError.of("reference", self.reference, "unknown", known)
        least = {"max_length": 2, "reference_batch_size": 1, "head_memory_mib": 1}
        check_sizes(self, least)
        check_unread(self)
        check_save_limit(self)

    def _check_options(self) -> None:
        options = self.loss_options()
        for key in ("huber", "max_logit", "flip_rate"):
            value = getattr(self, key)
            if value is not None and key not in options:
                able = [name for name, loss in PREFERENCE_LOSSES.items() if key in loss.options]
                way = f"it belongs to {', '.join(able)}"
                raise RecipeError.of(key, value, f"the loss {self.loss} does not read it", way)
        if "flip_rate" in options:
            if self.flip_rate is None:
                problem = f"the loss {self.loss} needs it"
                raise RecipeError.of("flip_rate", None, problem, "0.1: one label in ten is wrong")
            check_flip_rate(self.flip_rate)
