"""Two ranks train a scorer as one does: DDP, ZeRO-2 and ZeRO-3 on gloo share rows and scoring."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from test_ranks import launch

from llmkd.files import read_json

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from deqa_kit import done, lines, recipe, same, weights

pytestmark = pytest.mark.slow
# Pairs are drawn inside a micro-batch, so that two ranks pair otherwise than one: no pairs where
# the numbers are compared. Plain SGD: the gap of the weights is that of the gradients.
KEYS = {
    "fidelity_weight": 0.0,
    "level_weight": 1.0,
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 0.0,
    "num_train_epochs": 1,
}
HALF = ["--per_device_train_batch_size", "3"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        done(recipe(folder, **KEYS))
    assert gap(folder / "run", folder / "base") > 1e-3  # a gap of 1e-6 is none
    return folder


def start(config, path, *flags):
    found = launch(f"cpu/{config}", path, *HALF, *flags, script="run_deqa.py")
    assert found.returncode == 0, found.stdout[-1000:] + found.stderr[-4000:]
    return found.stdout


def gap(one: Path, other: Path) -> float:
    here, there = weights(one), weights(other)
    assert here.keys() == there.keys()
    return max((value - there[name]).abs().max().item() for name, value in here.items())


def scores(run: Path) -> np.ndarray:
    found = sorted(lines(run / "predictions.jsonl"), key=lambda row: row["row"])
    return np.array([row["mean"] for row in found])


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_two_ranks_are_one(tmp_path, one_rank, config):
    said = start(config, recipe(tmp_path, **KEYS))
    assert said.count("report: ") == 1  # one rank speaks
    run, whole = tmp_path / "run", one_rank / "run"
    assert gap(run, whole) < 1e-6
    assert np.allclose(scores(run), scores(whole), atol=1e-5)
    assert len(scores(run)) == read_json(run / "run.json")["data"]["eval_rows"]
    own, theirs = (read_json(folder / "run.json")["train"] for folder in (run, whole))
    assert own["level_kl"] == pytest.approx(theirs["level_kl"], abs=1e-5)


def test_pairs_and_adapters_on_two_ranks_with_sharded_weights(tmp_path):
    adapter = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    path = recipe(tmp_path, std_mode="pred", group_column="group", **adapter)
    start("zero3", path)
    run = tmp_path / "run"
    train = read_json(run / "run.json")["train"]
    assert np.isfinite(list(train.values())).all() and train["fidelity"] > 0
    assert np.isfinite(scores(run)).all()


def test_kill_9_in_the_middle_of_training_changes_nothing(tmp_path, one_rank):
    """The whole process dies, not an exception; the same command goes on to the same bits."""
    path = recipe(tmp_path, **KEYS, save_steps=1)
    words = [sys.executable, "-c", "import sys; from llmkd.cli import main; sys.exit(main())"]
    words += ["deqa", path]
    run = tmp_path / "run"
    process = subprocess.Popen(words, start_new_session=True, stdout=-3, stderr=-3)
    deadline = time.time() + 120
    while not list(run.glob("checkpoint-*")) and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "model.safetensors").exists(), "it was done before it was killed"
    done(path)
    assert same(weights(run), weights(one_rank / "run"))
    assert np.array_equal(scores(run), scores(one_rank / "run"))
