"""Tiny models and lm_eval tasks for the harness tests, all inside the test's own folder."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

WINDOW = 32  # tokens; documents below need several windows
VOCABULARY = 304  # padded beyond the tokenizer's 300, as real heads are
TEXTS = [
    "def add(a, b):\n    return a + b\n" * 6,
    "[1, 2, 3]",  # looks like a list: a rendered template would be parsed
    "naïve café, 100 % of 7 €, and a long tail of words to fill one more window " * 3,
    "x",
]
QUESTIONS = [
    {"question": f"What follows {n}?", "choices": [str(n + 1), str(n - 1), "no"], "gold": n % 2}
    for n in range(12)
]
CHOICE_YAML = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
"""
ROLLING_YAML = """\
task: tiny_rolling
tag: tiny_tag
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


class Kit:
    """A test's folder with `tasks/` in it; models are made there by name."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Datasets are cached under the test's folder and nothing reaches for the network."""
        torch.set_num_threads(1)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        for module in ("huggingface_hub.constants", "datasets.config"):
            monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
        self.folder = folder
        self.tokenizer = tiny_tokenizer()
        self.tasks = folder / "tasks"
        self.tasks.mkdir()
        (self.tasks / "choice.yaml").write_text(CHOICE_YAML)
        (self.tasks / "rolling.yaml").write_text(ROLLING_YAML)
        write_lines(self.tasks / "questions.jsonl", QUESTIONS)
        write_lines(self.tasks / "texts.jsonl", [{"text": text} for text in TEXTS])

    @property
    def choice(self) -> str:
        return str(self.tasks / "choice.yaml")

    @property
    def rolling(self) -> str:
        return str(self.tasks / "rolling.yaml")

    def model(self, name: str = "one", seed: int = 0, uniform: bool = False) -> Path:
        """Write a Llama of width 8 and its tokenizer; `uniform` gives every token equal logits."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config)
        if uniform:
            model.lm_head.weight.data.zero_()
        model.save_pretrained(self.folder / name)
        self.tokenizer.save_pretrained(self.folder / name)
        return self.folder / name


@cache
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 300 entries, trained on `TEXTS`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    return FastTokenizer(tokenizer_object=raw, eos_token="<eos>")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def log_probability(model: Any, tokens: list[int], first: int) -> float:
    """Nats of tokens[first:] given what is before them, in float64 from the logits."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([tokens[:-1]])).logits[0].double()
    log_probs_TV = torch.log_softmax(logits_TV, dim=-1)
    targets_T = torch.tensor(tokens[1:])
    return log_probs_TV[torch.arange(len(targets_T)), targets_T][first - 1 :].sum().item()


def bits_per_byte_by_hand(model: Any, tokenizer: FastTokenizer, texts: list[str]) -> float:
    """Every token is predicted once; each window after the first sees as much past as fits."""
    nats = 0.0
    for text in texts:
        sequence = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        done = 1  # sequence[0] is the prefix
        while done < len(sequence):
            end = min(done + WINDOW, len(sequence))
            start = max(0, end - WINDOW - 1)
            nats += log_probability(model, sequence[start:end], done - start)
            done = end
    return -nats / sum(len(text.encode()) for text in texts) / math.log(2)


def value(results: dict[str, Any], task: str, metric: str) -> float:
    return results["tasks"][task]["metrics"][metric]["value"]
