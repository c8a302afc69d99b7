"""Settings of `LatentDistillTrainer`: `TrainingArguments` plus the losses of one stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from llmkd.data.config import from_json
from llmkd.errors import RecipeError
from llmkd.objectives.latent import ATTENTION_FORMS
from llmkd.objectives.prediction import SOFT_FORMS

LOSSES = ("latent", "soft", "hard")
ATTENTION = (*ATTENTION_FORMS, "none")


@dataclass(kw_only=True)
class LatentDistillConfig(TrainingArguments):
    """What one stage minimises: latent, soft and hard losses, each with a weight."""

    attn: str = field(
        default="mse_scores",
        metadata={
            "help": "Attention part of the latent loss, head by head: mse_scores (raw scores, as "
            "TinyBERT), mse_probs, kl_probs (KL(teacher || student), nats) or none. ERNIE-Tiny's "
            "own form is not known; the default is TinyBERT's."
        },
    )
    hidden: bool = field(
        default=True,
        metadata={"help": "Hidden-state part of the latent loss: MSE after a learnt projection."},
    )
    embeddings: bool = field(
        default=True,
        metadata={"help": "Match the embeddings' output too, as one more hidden state (TinyBERT)."},
    )
    layer_map: str = field(  # or a list; YAML gives one, the command line its JSON
        default="uniform",
        metadata={
            "help": "Teacher layer of each student layer: uniform (i * N / M), last (the last M) "
            "or a list of M ascending numbers from 1. The default is ours."
        },
    )
    projection: str = field(
        default="shared",
        metadata={
            "help": "W from the student's width to the teacher's: shared (one, as TinyBERT), "
            "per_layer, or none (equal widths). Dropped at export."
        },
    )
    attn_weight: float = field(default=1.0, metadata={"help": "Weight of the attention part."})
    hidden_weight: float = field(
        default=1.0, metadata={"help": "Weight of the hidden states, embeddings included."}
    )
    soft: str = field(
        default="kl",
        metadata={
            "help": "Loss to the teacher's class distribution: kl (KL(teacher || student)), mse "
            "(of logits), nkd (Yang et al. 2023). Regression is always squared error."
        },
    )
    soft_weight: float = field(
        default=1.0, metadata={"help": "Weight of the soft loss (1 as recalled, not verified)."}
    )
    hard_weight: float = field(
        default=1.0, metadata={"help": "Weight of the hard loss (1 as recalled, not verified)."}
    )
    soft_temperature: float = field(
        default=1.0,
        metadata={"help": "Divides both sides' logits in the soft loss (1 as recalled), above 0."},
    )
    t2_scale: bool = field(
        default=False,
        metadata={"help": "Multiply the soft loss by soft_temperature squared (Hinton et al.)."},
    )
    nkd_gamma: float = field(default=1.5, metadata={"help": "gamma of nkd, at least 0."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Off: llmkd stops at a non-finite loss instead of hiding it from the log."
        },
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it upstream refuses bf16 on a machine that has no GPU
        super().__post_init__()
        given: Any = self.layer_map
        if isinstance(given, str) and given.startswith("["):
            self.layer_map = from_json("layer_map", given)
        for key, known in (("attn", ATTENTION), ("soft", SOFT_FORMS)):
            if getattr(self, key) not in known:
                raise RecipeError.of(
                    key, getattr(self, key), "unknown", f"known: {', '.join(known)}"
                )
        for key in ("attn_weight", "hidden_weight", "soft_weight", "hard_weight", "nkd_gamma"):
            if not getattr(self, key) >= 0:
                raise RecipeError.of(key, getattr(self, key), "must be at least 0")
        if not self.soft_temperature > 0:
            raise RecipeError.of("soft_temperature", self.soft_temperature, "must be above 0")
        self._check_shared()

    def _check_shared(self) -> None:
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, key) < 1:
                raise RecipeError.of(key, getattr(self, key), "must be at least 1")
        if self.attn != "none":
            for key in ("gradient_checkpointing", "torch_compile"):
                if getattr(self, key):
                    raise RecipeError.of(
                        key,
                        True,
                        f"attention maps (attn {self.attn}) are recorded while the model runs once",
                        f"--{key} false",
                        "--attn none: hidden states alone",
                    )
        if self.save_total_limit == 1:
            raise RecipeError.of(
                "save_total_limit",
                1,
                "the only checkpoint is deleted before its successor is known to be whole",
                "--save_total_limit 2",
            )


def check_losses(losses: Any, key: str) -> tuple[str, ...]:
    """Names of a stage's losses, each once; RecipeError otherwise."""
    if isinstance(losses, str):
        losses = [losses]
    if not isinstance(losses, list | tuple) or not losses or not set(losses) <= set(LOSSES):
        raise RecipeError.of(key, losses, "must be a list", f"of {', '.join(LOSSES)}")
    return tuple(name for name in LOSSES if name in losses)
