"""Settings of `SaltTrainer`: `TrainingArguments` plus SALT's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from llmkd.errors import RecipeError
from llmkd.objectives.divergences import find_divergence
from llmkd.objectives.schedule import TRANSITIONS
from llmkd.trainers.arguments import check_save_limit


@dataclass(kw_only=True)
class SaltConfig(TrainingArguments):
    """SALT, arXiv 2410.18779. RKD is `kd_ratio=1`, plain training is `kd_ratio=0`."""

    kd_ratio: float = field(
        default=0.173,
        metadata={
            "help": "Share of all optimizer steps in the KD stage, 0 to 1 (the paper's 36K of "
            "about "
            "208K steps). 0 trains on hard labels alone, 1 keeps the teacher all the way (RKD)."
        },
    )
    kd_weight: float = field(
        default=0.667,
        metadata={
            "help": "Weight w of the KD term in (1 - w) CE + w KD, 0 to 1. Recalled from the "
            "paper, "
            "not verified."
        },
    )
    transition: str = field(
        default="step",
        metadata={
            "help": "How the weight reaches 0 at the end of the KD stage: step (or constant); "
            "linear (w falls on a line); linear_ratio (w / (1 - w) falls on a line); cosine (half "
            "of one). The paper finds a step sufficient."
        },
    )
    transition_hold: float = field(
        default=0.0,
        metadata={
            "help": "Share of the KD stage kept at full weight before a linear decay begins."
        },
    )
    teacher_temperature: float = field(
        default=0.25,
        metadata={
            "help": "Divides the teacher's logits, above 0. The paper's value as recalled, not "
            "verified; it sharpens the teacher. 1.0 leaves the teacher as it is."
        },
    )
    student_temperature: float = field(
        default=1.0, metadata={"help": "Divides the student's logits in the KD term, above 0."}
    )
    t2_scale: bool = field(
        default=False,
        metadata={"help": "Multiply the KD term by student_temperature squared (Hinton et al.)."},
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "The KD term: forward_kl (KL(teacher || student), the paper's), reverse_kl, "
            "js, jeffreys, skew_kl, skew_reverse_kl, tvd."
        },
    )
    divergence_beta: float = field(
        default=0.5, metadata={"help": "beta of js, 0 (forward KL) to 1 (reverse KL), as in TRL."}
    )
    divergence_skew: float = field(
        default=0.1, metadata={"help": "Skew of skew_kl and skew_reverse_kl, 0 to 1 (DistiLLM)."}
    )
    fused_head: bool = field(
        default=True,
        metadata={
            "help": "Compute the loss from hidden states, a few rows of logits at a time; false "
            "makes all logits first."
        },
    )
    head_memory_mib: int = field(
        default=192,
        metadata={"help": "MiB that the fused head may take for logits, teacher's included."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Off: llmkd stops at a non-finite loss instead of hiding it from the log."
        },
    )

    def divergence_options(self) -> dict[str, float]:
        """The settings that the divergence named takes."""
        given = {"beta": self.divergence_beta, "skew": self.divergence_skew}
        return {name: given[name] for name in find_divergence(self.divergence).options}

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it upstream refuses bf16 on a machine that has no GPU
        super().__post_init__()
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, key) < 1:
                raise RecipeError.of(key, getattr(self, key), "must be at least 1")
        for key, least in (("learning_rate", 0.0), ("weight_decay", 0.0), ("save_steps", 1e-9)):
            if not getattr(self, key) >= least:
                raise RecipeError.of(key, getattr(self, key), "is too small")
        for key in ("kd_ratio", "kd_weight", "transition_hold"):
            value = getattr(self, key)
            if not 0.0 <= value <= 1.0:
                raise RecipeError.of(key, value, "must lie in [0, 1]", f"default: {_default(key)}")
        for key in ("teacher_temperature", "student_temperature"):
            value = getattr(self, key)
            if not value > 0:
                raise RecipeError.of(key, value, "must be above 0", "1.0 leaves the logits alone")
        if self.head_memory_mib < 1:
            raise RecipeError.of("head_memory_mib", self.head_memory_mib, "must be at least 1")
        self._check_divergence()
        if self.transition not in TRANSITIONS:
            raise RecipeError.of(
                "transition", self.transition, "unknown", f"known: {', '.join(TRANSITIONS)}"
            )
        if self.transition == "linear_ratio" and self.kd_weight == 1.0:
            raise RecipeError.of(
                "kd_weight", 1.0, "has no finite ratio w / (1 - w)", "--transition linear"
            )
        if not self.average_tokens_across_devices:
            raise RecipeError.of(
                "average_tokens_across_devices",
                False,
                "the loss is divided by the tokens of all ranks",
                "leave it out (true is the default)",
            )
        check_save_limit(self)

    def _check_divergence(self) -> None:
        for name in self.divergence_options():
            value = getattr(self, f"divergence_{name}")
            if not 0.0 <= value <= 1.0:
                raise RecipeError.of(f"divergence_{name}", value, "must lie in [0, 1]")


def _default(key: str) -> object:
    return SaltConfig.__dataclass_fields__[key].default
