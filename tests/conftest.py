"""Models of width 8 and data of a few rows, made in memory: nothing here needs a network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from llmkd import SaltConfig
from llmkd.data import train_bpe

torch.set_num_threads(1)
VOCAB = 40
WORDS = "the cat sat on a mat and saw two dogs run far from home while rain fell all day".split()


def tiny_llama(
    seed: int = 0, *, vocab: int = VOCAB, width: int = 8, tied: bool = True, window: int = 64
) -> LlamaForCausalLM:
    """A Llama of two layers; the same seed gives the same weights. Logits spread enough to
    differ.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=2,
        intermediate_size=2 * width,
        num_attention_heads=2,
        max_position_embeddings=window,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def token_rows(count: int = 24, *, vocab: int = VOCAB, seed: int = 0, low: int = 4, high: int = 15):
    """Rows of unequal length, so that a mean of means differs from the mean."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=make).tolist()
    rows = [torch.randint(1, vocab, (n,), generator=make).tolist() for n in lengths]
    return Dataset.from_list([{"input_ids": ids, "row": i} for i, ids in enumerate(rows)])


def salt_args(folder: Path, **settings) -> SaltConfig:
    """Settings of a run of a few steps, quiet and unsaved unless `settings` say otherwise."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "teacher_temperature": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }
    return SaltConfig(**{**defaults, **settings})


def sentences(count: int = 60, seed: int = 0) -> list[str]:
    """Short texts of ordinary words."""
    make = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (12,), generator=make).tolist())
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 300 entries."""
    return train_bpe(sentences(), 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Packed rows are cached per test, so that no test lives off another's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
