"""Settings of `ScoreTrainer`: `TrainingArguments` plus the losses of a scorer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from llmkd.errors import RecipeError
from llmkd.objectives.score import check_std_mode
from llmkd.trainers.arguments import check_rates, check_save_limit, check_sizes, check_unread

KL_CHOICES = ("full", "closed")
PAIR_LOSSES = ("fidelity", "binary", "binary_bce")
WEIGHTS = ("fidelity_weight", "level_weight", "in_level_weight")


@dataclass(kw_only=True)
class ScoreConfig(TrainingArguments):
    """DeQA-Score, arXiv 2501.11561; weights and std_mode as in the official release."""

    fidelity_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the loss on pairs of one group, a mean over pairs. 0 draws no pairs "
            "(the official `single` mode)."
        },
    )
    level_weight: float = field(
        default=0.05,
        metadata={
            "help": "Weight of the KL at the level token (mean over rows) plus the CE of the rest "
            "of the answer (mean over tokens). With pairs it counts once for either side, as the "
            "official code sums both: twice the mean over rows."
        },
    )
    in_level_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of max(0.01, 1 - probability of all levels), a mean over rows, for "
            "either side like level_weight. Off in the official release."
        },
    )
    kl_over: str = field(
        default="full",
        metadata={
            "help": "Softmax of the KL: full (whole vocabulary, so that probability moves onto the "
            "levels too; official) or closed (the levels alone)."
        },
    )
    std_mode: str = field(
        default="fixed1",
        metadata={
            "help": "Spread under the predicted gap of a pair: fixed1 (1 for each row, as the "
            "official scripts), pred (the predicted one, as the paper), pred_detached, target (the "
            "raters')."
        },
    )
    pair_loss: str = field(
        default="fidelity",
        metadata={
            "help": "fidelity (towards the raters' probability that A is above B; rows without a "
            "std draw no pair), or for ratings without spread binary and binary_bce (who is above; "
            "std_mode is then fixed1)."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a row; longer ones are refused. By default the window."},
    )
    fused_head: bool = field(
        default=True,
        metadata={
            "help": "Project only the answer's positions, from hidden states; false makes all "
            "logits first. Image-text models always do."
        },
    )
    head_memory_mib: int = field(
        default=192, metadata={"help": "MiB that the fused head may take for logits."}
    )
    learning_rate: float = field(
        default=2e-5, metadata={"help": "Peak learning rate (the paper's; LoRA wants 10 x)."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Off: llmkd stops at a non-finite loss instead of hiding it from the log."
        },
    )

    @property
    def sides(self) -> int:
        """How often a row's own losses count: the official code adds those of A and of B."""
        return 2 if self.fidelity_weight > 0 else 1

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it upstream refuses bf16 on a machine that has no GPU
        super().__post_init__()
        for key in WEIGHTS:
            if not 0 <= getattr(self, key) < float("inf"):
                raise RecipeError.of(key, getattr(self, key), "must be >= 0, and finite")
        if not any(getattr(self, key) for key in WEIGHTS):
            raise RecipeError.of("level_weight", 0.0, "all weights are 0: nothing is learnt")
        for key, known in (("kl_over", KL_CHOICES), ("pair_loss", PAIR_LOSSES)):
            if getattr(self, key) not in known:
                ways = f"known: {', '.join(known)}"
                raise RecipeError.of(key, getattr(self, key), "unknown", ways)
        check_std_mode(self.std_mode)
        if self.pair_loss != "fidelity" and self.std_mode != "fixed1":
            problem = f"pair_loss {self.pair_loss} knows no spread"
            raise RecipeError.of(
                "std_mode", self.std_mode, problem, "fixed1", "pair_loss: fidelity"
            )
        self._check_sizes()
        check_rates(self)
        check_unread(self)
        check_save_limit(self)

    def _check_sizes(self) -> None:
        least = {"max_length": 2, "head_memory_mib": 1}
        check_sizes(self, least)
        if self.fidelity_weight > 0 and self.per_device_train_batch_size < 2:
            raise RecipeError.of(
                "per_device_train_batch_size",
                self.per_device_train_batch_size,
                "pairs are drawn inside a micro-batch, and there is no pair in one row",
                "at least 2, better 8",
                "--fidelity_weight 0 trains without pairs",
            )
