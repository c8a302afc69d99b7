"""Two ranks do what one does, references included: DDP, ZeRO-2 and ZeRO-3 on gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from irepo_worker import run
from safetensors.torch import load_file

from llmkd.shipped import accelerate_configs

TESTS = Path(__file__).parents[1]
NAMES = ("loss", "accuracy", "margin", "target", "logratio_reference", "logratio_initial")
# Plain SGD: the difference of the weights is the difference of the updates times the rate.
RATE = {"learning_rate": 0.5}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "model").glob("*.safetensors")))


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def one_rank(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    tiny_llama(1).save_pretrained(folder / "start")
    run(folder / "run", {**RATE, "adapted": request.param})
    return folder / "run", request.param


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_two_ranks_are_one(tmp_path, one_rank, config):
    expected, adapted = one_rank
    tiny_llama(1).save_pretrained(tmp_path / "start")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(accelerate_configs()[f"cpu/{config}"]), "--main_process_port", "0"]
    settings = {**RATE, "adapted": adapted, "per_device_train_batch_size": 2}
    command += [str(TESTS / "irepo_worker.py"), str(tmp_path / "run"), json.dumps(settings)]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=570)
    assert done.returncode == 0, done.stderr[-4000:]
    here, there = weights(tmp_path / "run"), weights(expected)
    assert here.keys() >= there.keys()  # ZeRO-2 writes tied weights twice
    gap = max((value - here[name]).abs().max().item() for name, value in there.items())
    assert gap < 2e-5
    own, theirs = (json.loads((r / "found.json").read_text()) for r in (tmp_path / "run", expected))
    assert own["tokens"] == theirs["tokens"] > 0
    for one, other in zip(own["lines"], theirs["lines"], strict=True):
        assert {n: one[n] for n in NAMES} == pytest.approx({n: other[n] for n in NAMES}, abs=1e-4)
    for name in (*NAMES, "pairs"):
        value = theirs["scores"][f"eval_{name}"]
        assert own["scores"][f"eval_{name}"] == pytest.approx(value, abs=1e-4), name


def test_the_one_rank_run_moves(one_rank):
    folder, adapted = one_rank
    found = json.loads((folder / "found.json").read_text())
    assert abs(found["lines"][2]["logratio_reference"]) > (1e-4 if adapted else 0.1)
    assert found["scores"]["eval_pairs"] == 7
