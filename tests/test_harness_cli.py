"""The verb `llmkd eval` end to end, and the stock `lm_eval` command on the same folders."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness_kit import QUESTIONS, TEXTS, Kit, value, write_lines

from llmkd.errors import MissingFileError
from llmkd.evaluation import cli
from llmkd.evaluation.harness import run_tasks
from llmkd.evaluation.harness_gap import NO_GAP
from llmkd.evaluation.harness_tasks import shipped_task_folders
from llmkd.files import read_json, write_json


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    return Kit(tmp_path, monkeypatch)


def run_cli(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="llmkd eval")
    cli.add_arguments(parser)
    return cli.main(parser.parse_args(list(words)))


def test_cli_one_model(kit: Kit, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    model = kit.model("one")
    write_json(model / "eval.json", {"held_out": {"loss": 1.0}})
    monkeypatch.setenv("COLUMNS", "120")
    flags = f"--include_path {kit.tasks} --limit 4 --batch_size 2 --device cpu".split()
    assert run_cli(str(model), "--tasks", "tiny_choice,tiny_rolling", *flags) == 0
    held = read_json(model / "eval.json")
    assert held["held_out"] == {"loss": 1.0}
    assert list(held["lm_eval"]["tasks"]) == ["tiny_choice", "tiny_rolling"]
    shown = capsys.readouterr().out
    assert "bits_per_byte ↓" in shown and "acc ↑" in shown and "4 of 12" in shown
    assert str(model / "eval.json") in shown


def test_cli_side_by_side(kit: Kit, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    student, teacher = kit.model("student", seed=1), kit.model("teacher", seed=2)
    monkeypatch.setenv("COLUMNS", "160")
    # the baseline is the teacher again: there is no gap, and the table says so
    ends = ["--teacher", str(teacher), "--baseline", str(teacher)]
    task, out = kit.choice, kit.folder / "out"
    assert run_cli(str(student), "--tasks", task, *ends, "--output", str(out)) == 0
    held = read_json(out / "eval.json")["lm_eval"]
    row = held["side_by_side"]["tasks"]["tiny_choice"]["acc"]
    assert row["gap_closed"] == {"student": None} and row["note"] == NO_GAP
    assert list(held["tasks"]) == ["tiny_choice"]
    assert not (student / "eval.json").exists() and not (teacher / "eval.json").exists()
    shown = capsys.readouterr().out
    assert "no gap" in shown and NO_GAP in shown


def test_cli_recipe_folder(kit: Kit, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    parent = kit.folder / "quickstart"
    arms = ["baseline", "rkd", "salt"]
    for seed, name in enumerate([*arms, "teacher"]):
        kit.model(f"quickstart/{name}", seed=seed)
    write_json(parent / "run.json", {"arms": arms})
    write_json(parent / "eval.json", {"arms": {"salt": {"loss": 3.5}}})
    write_lines(parent / "held_out.jsonl", [{"text": text} for text in TEXTS])
    monkeypatch.setenv("COLUMNS", "200")
    assert run_cli(str(parent), "--tasks", "heldout_bpb") == 0
    held = read_json(parent / "eval.json")
    assert held["arms"] == {"salt": {"loss": 3.5}}
    row = held["lm_eval"]["side_by_side"]["tasks"]["heldout_bpb"]["bits_per_byte"]
    assert list(row["values"]) == [*arms, "teacher"]
    assert list(row["gap_closed"]) == ["rkd", "salt"]
    for name in [*arms, "teacher"]:
        mine = read_json(parent / name / "eval.json")["lm_eval"]["tasks"]["heldout_bpb"]
        assert mine["metrics"]["bits_per_byte"]["value"] == row["values"][name]
    assert "gap closed by salt" in capsys.readouterr().out

    write_json(parent / "run.json", {"arms": [*arms, "late"]})
    with pytest.raises(MissingFileError, match=r"arms.*late"):
        run_cli(str(parent), "--tasks", "heldout_bpb")


@pytest.mark.slow
def test_stock_lm_eval_gives_the_same_numbers(kit: Kit) -> None:
    run = kit.model("parent/run", seed=5)
    write_lines(run.parent / "held_out.jsonl", [{"text": text} for text in TEXTS])
    write_lines(run.parent / "questions.jsonl", QUESTIONS)
    include = kit.folder / "include"  # the stock command takes one folder
    include.mkdir()
    (shipped,) = (file for one in shipped_task_folders() for file in one.glob("heldout_bpb.yaml"))
    for yaml in (shipped, kit.tasks / "choice.yaml"):
        (include / yaml.name).write_text(yaml.read_text())
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=run"),
        *("--include_path", str(include), "--tasks", "heldout_bpb,tiny_choice"),
        *("--device", "cpu", "--batch_size", "4", "--output_path", str(kit.folder / "stock")),
        *("--num_fewshot", "2", "--seed", "0", "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(kit.folder / "cache")}
    done = subprocess.run(
        command,
        cwd=run.parent,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stock = read_json(next((kit.folder / "stock").rglob("results_*.json")))
    ours = run_tasks(run, ["heldout_bpb", "tiny_choice"], include_path=[kit.tasks], num_fewshot=2)
    for task, metric in (("heldout_bpb", "bits_per_byte"), ("tiny_choice", "acc")):
        assert value(ours, task, metric) == pytest.approx(
            stock["results"][task][f"{metric},none"], rel=1e-6
        )
        assert ours["tasks"][task]["hash"] == stock["task_hashes"][task]
        assert ours["tasks"][task]["num_fewshot"] == stock["n-shot"][task] == 2
