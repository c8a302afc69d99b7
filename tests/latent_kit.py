"""Tiny Berts of unequal depth and width, and rows of unequal length with labels of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from task_kit import CLS, SEP, VOCABULARY
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

from llmkd.models.latent_student import LatentStudent, new_projections
from llmkd.trainers import LatentDistillConfig

HEADS = 2
CLASSES = 3
# kind of task: what transformers calls it, and the outputs of its model
TASKS = {
    "single_label": ("single_label_classification", CLASSES),
    "multi_label": ("multi_label_classification", CLASSES),
    "regression": ("regression", 1),
    "token": (None, CLASSES),
}


def bert_config(*, layers: int = 4, width: int = 16, heads: int = HEADS, **keys: Any) -> BertConfig:
    """A Bert over the tokenizer of `task_kit`, window 32, without dropout."""
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **keys,
    )


def tiny_bert(seed: int = 0, *, kind: str | None = None, **shape: Any) -> PreTrainedModel:
    """A body, or with `kind` a model of that task; the same seed gives the same weights."""
    torch.manual_seed(seed)
    if kind is None:
        return BertModel(bert_config(**shape))
    problem, outputs = TASKS[kind]
    config = bert_config(**shape, num_labels=outputs, problem_type=problem)
    auto: Any = AutoModelForTokenClassification if kind == "token" else None
    return (auto or AutoModelForSequenceClassification).from_config(config)


def student_of(
    seed: int = 1, *, kind: str | None = None, teacher_width: int = 16, **shape: Any
) -> LatentStudent:
    """A student of two layers, half as wide as the teacher, with one projection for all layers."""
    body = tiny_bert(seed, kind=kind, **{"layers": 2, "width": 8, **shape})
    return LatentStudent(
        body,
        new_projections(
            "shared",
            layers=range(3),
            student_width=body.config.hidden_size,
            teacher_width=teacher_width,
            seed=5,
        ),
    )


def label_of(kind: str, length: int, make: torch.Generator) -> Any:
    """A label of a row of `length` tokens, as `load_task` encodes it."""
    if kind == "single_label":
        return int(torch.randint(0, CLASSES, (), generator=make))
    if kind == "regression":
        return float(torch.randn((), generator=make))
    if kind == "multi_label":
        return torch.randint(0, 2, (CLASSES,), generator=make).float().tolist()
    return [-100, *torch.randint(0, CLASSES, (length - 2,), generator=make).tolist(), -100]


def bert_rows(count: int = 12, *, kind: str | None = None, seed: int = 0) -> Dataset:
    """[CLS] three to eleven tokens [SEP], so that a mean of means differs from the mean."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=make).tolist()
    rows: list[dict[str, Any]] = []
    for number, length in enumerate(lengths):
        words = torch.randint(5, len(VOCABULARY), (length,), generator=make).tolist()
        rows.append({"input_ids": [CLS, *words, SEP], "row": number})
        if kind is not None:
            rows[-1]["labels"] = label_of(kind, length + 2, make)
    return Dataset.from_list(rows)


def latent_args(folder: Path, **settings: Any) -> LatentDistillConfig:
    """Settings of a run of a few plain steps, quiet and unsaved unless `settings` say otherwise."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }
    return LatentDistillConfig(**{**defaults, **settings})
