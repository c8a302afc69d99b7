"""Settings of `LatentDistillTrainer`: `TrainingArguments` plus the losses of one stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from llmkd.data.config import from_json
from llmkd.trainers.latent_rules import ATTENTION, LOSSES, check_config, check_losses

__all__ = ["ATTENTION", "LOSSES", "LatentDistillConfig", "check_losses"]


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
        check_config(self)
