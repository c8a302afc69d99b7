"""A tiny DeQA-Score run: a one-layer llama, texts whose rating is what their words say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conftest import WORDS
from PIL import Image
from safetensors.torch import load_file
from score_kit import image_scorer, score_llama, score_tokenizer

from llmkd.cli import main

LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}


def save_scorer(folder: Path, *, window: int = 256) -> str:
    """The model that training starts from, with its tokenizer; made once a folder."""
    if not (folder / "config.json").exists():
        score_llama(pad_vocab=0, window=window).save_pretrained(folder)
        score_tokenizer(chat=True).save_pretrained(folder)
    return str(folder)


def rated(count: int = 24, raters: int = 4) -> list[dict[str, Any]]:
    """Texts of three words; raters agree about most of them. On 0 to 10, in two groups."""
    make = np.random.default_rng(0)
    rows = []
    for number in range(count):
        places = [number % len(WORDS), (7 * number + 1) % len(WORDS), number // len(WORDS)]
        centre = 10 * (number % len(WORDS)) / (len(WORDS) - 1)
        said = np.clip(np.round(centre + make.normal(0, 1.5, raters)), 0, 10)
        text = " ".join(WORDS[place] for place in places) + f" {number}"
        rows.append({"text": text, "ratings": said.tolist(), "group": "ab"[number % 2]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_image_scorer(folder: Path) -> str:
    """An image-text model that training starts from, with its processor."""
    for part in image_scorer():
        part.save_pretrained(folder)
    return str(folder)


def pictures(folder: Path, count: int) -> list[dict[str, Any]]:
    """Files `0.png`, `1.png`, ... of one colour each, and rows that name and rate them, 0 to 10."""
    rows = []
    for number in range(count):
        colour = (240 * number // count, 40, 90)
        Image.new("RGB", (20, 20), colour).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "ratings": [number % 11, min(number % 11 + 1, 10)]})
    return rows


def recipe(folder: Path, **changes: Any) -> str:
    """A recipe of one arm in `folder`, with what it needs; a key given as None is left out. Files
    that exist already are not written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rated.jsonl").exists():
        write_rows(folder / "rated.jsonl", rated())
    keys = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": save_scorer(folder / "base"),
        "dtype": "float32",
        "score_dataset": str(folder / "rated.jsonl"),
        "ratings_column": "ratings",
        "score_low": 0,
        "score_high": 10,
        "eval_fraction": 0.25,
        "questions": ["How good is this text?", "Rate the text."],
        "label": "gauss_tilt",
        "bootstrap_draws": 20,
        "scoring_batch_size": 4,
        "per_device_train_batch_size": 6,
        "num_train_epochs": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
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


def done(path: str, *flags: str) -> None:
    """The run ends well."""
    assert main(["deqa", path, *flags]) == 0


def refused(path: str, capsys: Any, *flags: str, verb: str = "deqa") -> str:
    """The one error of a run that is refused."""
    capsys.readouterr()
    assert main([verb, path, *flags]) == 1
    error = capsys.readouterr().err
    assert error.count(f"llmkd {verb}: ") == 1 and "Traceback" not in error
    return error[error.index(f"llmkd {verb}: ") :]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model file of a folder."""
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the same names have the same numbers, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def stamps(folder: Path) -> dict[Path, int]:
    """When each file below a folder was last written, but what a second call may write."""
    names = ("report.html", "run.json", "recipe.yaml", "eval.json", ".lock")
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".png"]
    return {path: path.stat().st_mtime_ns for path in files if path.name not in names}
