"""A tiny iREPO run: a one-layer llama that speaks at random, a rule of arithmetic, prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import WORDS, sentences
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmkd.cli import main
from llmkd.data import train_bpe
from llmkd.files import read_json
from llmkd.methods import irepo_finish, irepo_sample, irepo_scores

# The rule counts its calls in a file beside it: that tells who was asked again.
RULE = """
import pathlib
def score(prompt, response):
    with open(pathlib.Path(__file__).with_name("calls"), "a") as handle:
        handle.write("x")
    return value(response)
def value(response):
    return 0.25 * (sum(map(ord, response)) % 41)
"""
WINDOW = 32


def value(response: str) -> float:
    """What RULE says of a response."""
    return 0.25 * (sum(map(ord, response)) % 41)


def save_policy(folder: Path, *, seed: int = 0, window: int = WINDOW) -> str:
    """A policy with its tokenizer (no chat template); made once a folder."""
    if not (folder / "config.json").exists():
        tokenizer = train_bpe(sentences(), 300, folder.with_name(folder.name + "-bpe"))
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            num_hidden_layers=1,
            intermediate_size=16,
            num_attention_heads=2,
            max_position_embeddings=window,
            tie_word_embeddings=True,
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(count: int = 40, first: int = 0) -> list[dict[str, str]]:
    """Three words each, all different."""
    size = len(WORDS)
    rows = [
        (i % size, (i // size + i) % size, (3 * i + 1) % size) for i in range(first, first + count)
    ]
    return [{"prompt": " ".join(WORDS[place] for place in row)} for row in rows]


def rule(folder: Path, text: str = RULE, function: str = "score", **keys: Any) -> dict[str, Any]:
    """An annotator entry, its file written."""
    (folder / "rule.py").write_text(text)
    return {"type": "rule", "function": f"{folder / 'rule.py'}:{function}", "name": "rule", **keys}


def recipe(folder: Path, **changes: Any) -> str:
    """A recipe of two iterations in `folder`, with what it needs; a key given as None is left out.
    Files that exist already are not written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "prompts.jsonl").exists():
        write_rows(folder / "prompts.jsonl", prompts())
    if not (folder / "rule.py").exists():
        rule(folder)
    keys = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": save_policy(folder / "policy"),
        "dtype": "float32",
        "prompt_dataset": str(folder / "prompts.jsonl"),
        "annotators": [rule_entry(folder)],
        "iterations": 2,
        "prompts_per_iteration": 8,
        "held_out_prompts": 6,
        "num_responses": 3,
        "max_new_tokens": 6,
        "sampling_batch_size": 4,
        "drop_truncated": False,
        "beta": 0.3,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
    return str(path)


def rule_entry(folder: Path) -> dict[str, Any]:
    """The annotator entry of the file that is there."""
    return {"type": "rule", "function": f"{folder / 'rule.py'}:score", "name": "rule"}


def done(path: str, *flags: str) -> None:
    """The run ends well."""
    assert main(["irepo", path, *flags]) == 0


def refused(path: str, capsys: Any, *flags: str) -> str:
    """The one error of a run that is refused."""
    capsys.readouterr()
    assert main(["irepo", path, *flags]) == 1
    error = capsys.readouterr().err
    assert error.count("llmkd irepo: ") == 1 and "Traceback" not in error
    return error[error.index("llmkd irepo: ") :]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Model or adapter file of a folder, as it is."""
    path = folder / "model.safetensors"
    return load_file(path if path.exists() else folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the same names have the same numbers, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def pairs_of(run: Path, number: int) -> Dataset:
    """The pairs of an iteration."""
    return load_from_disk(str(run / f"iteration-{number}" / "pairs"))


def metrics_of(run: Path, number: int) -> dict[str, Any]:
    """`metrics.json` of an iteration, without what the clock says."""
    found = read_json(run / f"iteration-{number}" / "metrics.json")
    return {key: value for key, value in found.items() if key != "seconds"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of all parts in a folder."""
    lines = "".join(path.read_text() for path in sorted(folder.glob("part-*.jsonl")))
    return [json.loads(line) for line in lines.split("\n") if line]


def calls(folder: Path) -> int:
    """How often the rule was asked so far."""
    path = folder / "calls"
    return path.stat().st_size if path.exists() else 0


def stamps(run: Path, keep: Callable[[Path], bool] = lambda path: True) -> dict[Path, int]:
    """When each file below a folder was last written."""
    files = [path for path in run.rglob("*") if path.is_file() and keep(path)]
    return {path: path.stat().st_mtime_ns for path in files}


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a run in a folder of its own, with time stamps."""
    shutil.copytree(run, folder)
    return folder


def small_parts(patch: pytest.MonkeyPatch) -> None:
    """Four prompts, or pairs, a part, so that eight make two."""
    patch.setattr(irepo_sample, "ANNOTATED_AT_ONCE", 4)
    patch.setattr(irepo_scores, "SCORED_AT_ONCE", 8)


@pytest.fixture
def quick(monkeypatch):
    """Small parts, no page and pictures: these take most of the time."""
    small_parts(monkeypatch)
    monkeypatch.setattr(irepo_finish, "write_align_report", lambda run: run / "report.html")
