"""Two ranks do what one does: DDP, ZeRO-2, and ZeRO-3 (teacher sharded too) on gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_salt_run import recipe, weights

from llmkd.cli import main
from llmkd.files import read_json
from llmkd.shipped import accelerate_configs

REPO = Path(__file__).parents[2]
# Plain SGD: the difference of the weights is the difference of the updates times the rate.
SETTINGS = {
    "arms": {"rkd": {"kd_ratio": 1.0, "max_steps": 1}, "salt": {}},
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "eval_steps": 6,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert main(["salt", recipe(folder, **SETTINGS)]) == 0
    return folder / "run"


def launch(
    config: str, path: str, *flags: str, script: str = "run_salt.py"
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(accelerate_configs()[config]), "--main_process_port", "0"]
    command += [str(REPO / "scripts" / script), path, *flags]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=570)


def largest_difference(one: Path, other: Path) -> float:
    here, there = weights(one), weights(other)
    assert here.keys() == there.keys()
    return max((v - there[k]).abs().max().item() for k, v in here.items())


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_two_ranks_are_one(tmp_path, one_rank, config):
    path = recipe(tmp_path, **SETTINGS)
    done = launch(f"cpu/{config}", path, "--per_device_train_batch_size", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    assert largest_difference(run / "rkd", one_rank / "rkd") < 1e-6  # one step
    assert largest_difference(run / "salt", one_rank / "salt") < 2e-5  # six steps and a switch
    for arm in ("rkd", "salt"):
        here, there = read_json(run / arm / "eval.json"), read_json(one_rank / arm / "eval.json")
        loss = there["held_out"]["loss"]
        assert here["held_out"]["loss"] == pytest.approx(loss, abs=1e-5)
        assert here["held_out"]["tokens"] == there["held_out"]["tokens"]
        tokens = [read_json(r / arm / "run.json")["tokens"] for r in (run, one_rank)]
        assert tokens[0] == tokens[1]


def test_accumulation_is_one_batch(tmp_path, one_rank):
    flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    assert main(["salt", recipe(tmp_path, **SETTINGS), *flags]) == 0
    assert largest_difference(tmp_path / "run" / "rkd", one_rank / "rkd") < 1e-6


@pytest.mark.slow
def test_zero2_goes_on_from_a_checkpoint(tmp_path):
    settings = {**SETTINGS, "arms": None, "save_strategy": "steps", "save_steps": 2}
    path = recipe(tmp_path, **settings)
    flags = ["--per_device_train_batch_size", "2"]
    done = launch("cpu/zero2", path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    expected = weights(run)
    (run / "checkpoint-6" / "llmkd_complete.json").unlink()
    (run / "model.safetensors").unlink()
    (run / "run.json").write_text((run / "run.json").read_text().replace('"done"', '"running"'))
    done = launch("cpu/zero2", path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "goes on from checkpoint-4" in done.stdout
    assert all(torch.equal(v, expected[k]) for k, v in weights(run).items())
