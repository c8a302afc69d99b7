"""What the tests of ERNIE-Tiny cards share: a run folder by the contract, tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

STAGES = [
    {"name": "gd", "teacher": "pretrained", "data": "general", "losses": ["latent"], "steps": 1500},
    {"name": "ged", "teacher": "finetuned", "data": "general", "losses": ["latent"], "steps": 500},
    {"name": "tad", "teacher": "finetuned", "data": "task", "losses": ["latent"], "steps": 500},
    {
        "name": "tsd",
        "teacher": "finetuned",
        "data": "task",
        "losses": ["latent", "soft", "hard"],
        "steps": 800,
        "wall_seconds": 61.4,
    },
]
RUN: dict[str, Any] = {
    "kind": "ernie-tiny",
    "name": "all",
    "status": "done",
    "seed": 17,
    "wall_seconds": 61.2,
    "peak_memory_bytes": 2**30,
    "task": {
        "source": "stanfordnlp/sst2",
        "kind": "single_label",
        "labels": ["negative", "positive"],
        "metric": "accuracy",
        "train_examples": 8000,
        "eval_examples": 872,
        "max_length": 48,
        "fingerprint": "feedbeef00000003",
    },
    "general": {
        "source": "stdlib",
        "fingerprint": "feedbeef00000004",
        "train_tokens": 640000,
    },
    "student": {
        "parameters": 14400000,
        "layers": 4,
        "hidden_size": 312,
        "heads": 12,
        "intermediate_size": 1200,
        "source": "config",
    },
    "teacher": {
        "source": "google-bert/bert-base-uncased",
        "revision": "86b5e0934494bd15c9632b12f734a8a67f723594",
        "fingerprint": "feedbeef00000002",
        "parameters": 108000000,
        "score": 0.92,
        "finetuned_here": True,
    },
    "stages": STAGES,
    "versions": {"torch": "2.13.0"},
    "key": "0",
    "command": "llmkd ernie-tiny recipes/ernie_tiny/quickstart.yaml",
}
SCORES = {"accuracy": 0.9016, "macro_f1": 0.9, "matthews": 0.8, "loss": 0.25, "examples": 870}
LATENCY = {
    "student": {"length": 128, "threads": 1, "batch_1_ms": 3.0, "batch_32_ms": 40.0},
    "teacher": {"length": 128, "threads": 1, "batch_1_ms": 12.6, "batch_32_ms": 180.0},
    "ratio": {"batch_1": 4.25},
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}


def write_task_run(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(RUN | changes))
    (folder / "recipe.yaml").write_text("learning_rate: 0.0005\n")
    (folder / "eval.json").write_text(json.dumps({"task": SCORES, "latency": LATENCY}))


def write_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(62)} | {"[PAD]": 62, "[UNK]": 63}
    tokens = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)


def make_model(kind: str) -> Any:
    """A model of eight numbers a token with the head of `kind`. Its config does not say the kind of
    problem, so that the lines of the card have to."""
    torch.manual_seed(0)
    config = BertConfig(**TINY, num_labels=1 if kind == "regression" else 3)
    classes = {"token": BertForTokenClassification, "bare": BertModel}
    return classes.get(kind, BertForSequenceClassification)(config)
