"""`kill -9` anywhere in `llmkd deqa` changes no bit of what the same command ends with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deqa_killed import PLACES
from deqa_kit import LORA, done, lines, recipe, same, weights

from llmkd.files import read_json

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
# Pairs and dropout: both draw as they go, and must go on drawing where they were.
KEYS = {
    "arms": {"full": {"label": "two_token"}, "lora": {**LORA, "lora_dropout": 0.3}},
    "group_column": "group",
    "optim": "adamw_torch",
}


def test_kill_9_at_five_places(tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    done(recipe(whole, **KEYS))
    path, run = recipe(folder, **KEYS), folder / "run"
    words = [sys.executable, str(TESTS / "methods" / "deqa_killed.py"), path]
    # as many threads as here: sums of another order are other bits
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    env = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    found = subprocess.run(words, capture_output=True, text=True, env=env, timeout=500)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert [f"killed: {place}" in found.stdout for place in PLACES] == [True] * len(PLACES)
    assert "full: goes on from checkpoint-2" in found.stdout  # after the first kill
    assert "full: goes on from checkpoint-6" in found.stdout  # after the second: nothing to train
    assert not (run / "lora" / "model.safetensors").exists()
    assert read_json(run / "run.json")["status"] == "running"
    capsys.readouterr()
    done(path)
    said = capsys.readouterr().out
    assert "full: reused" in said and "lora: goes on from checkpoint-4" in said
    for arm in KEYS["arms"]:
        mine, theirs = run / arm, whole / "run" / arm
        assert same(weights(mine), weights(theirs))
        assert lines(mine / "predictions.jsonl") == lines(theirs / "predictions.jsonl")
        assert read_json(mine / "run.json")["train"] == read_json(theirs / "run.json")["train"]
        assert read_json(mine / "run.json")["tokens"] == read_json(theirs / "run.json")["tokens"]
    both = [read_json(folder / "run" / "eval.json") for folder in (folder, whole)]
    assert both[0] == both[1]
    assert not list(run.rglob("*.part"))
