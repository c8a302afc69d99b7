"""A tiny ERNIE-Tiny run: a Bert teacher of four layers, rows whose words tell their class, text."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import WORDS, sentences
from latent_kit import tiny_bert
from safetensors.torch import load_file
from task_kit import bert_tokenizer, write_rows

from llmkd.cli import main
from llmkd.methods import ernie_finish

MEASURED = {"student": {"batch_1_ms": 1.0}, "teacher": {"batch_1_ms": 2.0}, "ratio": {}}
GOOD, BAD = ("good", "great"), ("bad", "poor")
STAGES = ("gd", "ged", "tad", "tsd")
# The tiny teacher learns to read four words; the student then takes a few steps a stage.
SETTINGS = {
    "teacher": {
        "max_steps": 60,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
    },
    "gd": {"max_steps": 4},
    "ged": {"max_steps": 3},
    "tad": {"max_steps": 3},
    "tsd": {"max_steps": 4},
}


def save_teacher(folder: Path, *, seed: int = 0, **shape: Any) -> str:
    """A pretrained teacher with its tokenizer; made once a folder."""
    if not (folder / "config.json").exists():
        tiny_bert(seed, **shape).save_pretrained(folder)
        bert_tokenizer().save_pretrained(folder)
    return str(folder)


def review(make: random.Random, word: str) -> str:
    """Three to eight ordinary words, `word` among them."""
    words = make.choices(WORDS, k=make.randint(3, 8))
    words.insert(make.randrange(len(words) + 1), word)
    return " ".join(words)


def reviews(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Texts that hold one word of praise (label pos) or of blame (neg), in turn."""
    make = random.Random(seed)
    chosen = [
        (make.choice(BAD), "neg") if i % 2 else (make.choice(GOOD), "pos") for i in range(count)
    ]
    return [{"text": review(make, word), "label": label} for word, label in chosen]


def numbers(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with a number: 1.0 for praise, -1.0 for blame."""
    return [
        {**row, "label": 1.0 if row["label"] == "pos" else -1.0} for row in reviews(count, seed)
    ]


def tagged(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Words with a label each: opinion for praise and blame, else other."""
    words = [row["text"].split() for row in reviews(count, seed)]
    label = dict.fromkeys((*GOOD, *BAD), "opinion")
    return [{"text": w, "label": [label.get(word, "other") for word in w]} for w in words]


def many_labels(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with the list of what holds of them: pos or neg, and long from six words on."""
    found = reviews(count, seed)
    return [
        {**row, "label": [row["label"]] + ["long"] * (len(row["text"].split()) > 6)}
        for row in found
    ]


def recipe(folder: Path, **changes: Any) -> str:
    """A recipe of four short stages in `folder`, with what it needs; a key given as None is left
    out. Files that exist already are not written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train": reviews(), "dev": reviews(21, seed=1)}
    for name, rows in files.items():
        if not (folder / f"{name}.jsonl").exists():
            write_rows(folder / f"{name}.jsonl", rows)
    text = folder / "general.jsonl"
    if not text.exists():
        write_rows(text, [{"text": t} for t in sentences(40)])
    keys = {
        "output_dir": str(folder / "run"),
        "teacher_model_name_or_path": save_teacher(folder / "bert"),
        "task_dataset": str(folder / "train.jsonl"),
        "task_eval_dataset": str(folder / "dev.jsonl"),
        "task_max_length": 16,
        "dataset": str(text),
        "max_length": 16,
        "student_layers": 2,
        "student_hidden_size": 8,
        "stages": list(STAGES),
        "stage_settings": SETTINGS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
    return str(path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model file of a folder, as it is."""
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the same names have the same numbers, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def stage_folders(run: Path) -> dict[str, list[Path]]:
    """Stage name to its folders, those of general distillation included."""
    found: dict[str, list[Path]] = {}
    for root in (run / "stages", run.parent / "ernie-tiny-general"):
        for path in sorted(root.glob("*-*")):
            if path.is_dir():
                found.setdefault(path.name.rsplit("-", 1)[0], []).append(path)
    return found


def stage(run: Path, name: str) -> Path:
    """The only folder of a stage."""
    (found,) = stage_folders(run)[name]
    return found


def break_off(folder: Path, checkpoint: str) -> None:
    """Leave a folder as a kill while `checkpoint` was written does: no model, status running."""
    (folder / checkpoint / "llmkd_complete.json").unlink()
    unfinish(folder)


def unfinish(folder: Path) -> None:
    """No model, status running."""
    (folder / "model.safetensors").unlink()
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "status": "running"}))


@pytest.fixture
def quick(monkeypatch):
    """No latency, no pictures, no collecting of what pytest holds: they take most of the time."""
    monkeypatch.setattr(ernie_finish, "compare_latency", lambda *_, **__: MEASURED)
    monkeypatch.setattr(ernie_finish, "write_distill_report", lambda run: run / "report.html")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def refused(path: str, capsys: Any, *flags: str) -> str:
    """The one error of a run that is refused."""
    capsys.readouterr()
    assert main(["ernie-tiny", path, *flags]) == 1
    error = capsys.readouterr().err
    assert error.count("llmkd ernie-tiny: ") == 1 and "Traceback" not in error
    return error[error.index("llmkd ernie-tiny: ") :]
