"""Two ranks distil as one does: DDP, ZeRO-2, and ZeRO-3 (teacher sharded too) on gloo."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ernie_kit import SETTINGS, break_off, recipe, stage, unfinish, weights
from test_ranks import launch

from llmkd.cli import main
from llmkd.files import read_json

TWO = ["tad", "tsd"]
# Plain SGD: the difference of the weights is the difference of the updates times the rate.
KEYS = {
    "stages": TWO,
    "stage_settings": {
        "teacher": SETTINGS["teacher"],
        "tad": {"max_steps": 3},
        "tsd": {"max_steps": 3},
    },
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
}
HALF = ["--per_device_train_batch_size", "2"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A pretrained and a fine-tuned teacher, as one rank made it."""
    folder = tmp_path_factory.mktemp("teachers")
    assert main(["ernie-tiny", recipe(folder, stages=["tad"], learning_rate=0.01)]) == 0
    return {
        "teacher_model_name_or_path": str(folder / "bert"),
        "finetuned_teacher_name_or_path": str(folder / "run" / "teacher"),
    }


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, teachers):
    folder = tmp_path_factory.mktemp("one")
    assert main(["ernie-tiny", recipe(folder, **KEYS, **teachers)]) == 0
    before, after = (weights(stage(folder / "run", name)) for name in TWO)
    moved = (after[f"bert.{name}"] - value for name, value in before.items())
    assert max(value.abs().max().item() for value in moved) > 0.01  # a gap of 1e-5 is none
    return folder / "run"


def start(config, path, *flags):
    done = launch(f"cpu/{config}", path, *HALF, *flags, script="run_ernie_tiny.py")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout


def gap(one: Path, other: Path) -> float:
    here, there = weights(one), weights(other)
    assert here.keys() == there.keys()
    return max((value - there[name]).abs().max().item() for name, value in here.items())


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_two_ranks_are_one(tmp_path, one_rank, teachers, config):
    start(config, recipe(tmp_path, **KEYS, **teachers))
    run = tmp_path / "run"
    for name in TWO:
        assert gap(stage(run, name), stage(one_rank, name)) < 1e-5
        tokens = [read_json(stage(r, name) / "run.json")["tokens"] for r in (run, one_rank)]
        assert tokens[0] == tokens[1] > 0
    assert gap(run, one_rank) < 1e-5
    own, theirs = (read_json(r / "eval.json")["task"] for r in (run, one_rank))
    assert own == pytest.approx(theirs, abs=1e-5)
    outputs = [np.load(r / "predictions.npz")["outputs"] for r in (run, one_rank)]
    assert outputs[0].shape == (21, 2)  # an odd number of rows: none twice
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-4)
    own, theirs = (read_json(stage(r, "tad") / "eval.json")["held_out"] for r in (run, one_rank))
    for part in ("attn", "hidden", "loss"):
        assert own[part] == pytest.approx(theirs[part], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_whole_run_on_two_ranks_from_the_fine_tuning_on(tmp_path, config):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    path = recipe(tmp_path, **{**saving, "teacher_floor": 0.0})
    start(config, path)
    run = tmp_path / "run"
    expected = weights(run)
    # killed while the last checkpoint of tad was written
    shutil.rmtree(stage(run, "tsd"))
    break_off(stage(run, "tad"), "checkpoint-3")
    unfinish(run)
    said = start(config, path)
    assert "tad: goes on from checkpoint-2" in said and "ged: reused" in said
    assert all(torch.equal(value, expected[name]) for name, value in weights(run).items())
