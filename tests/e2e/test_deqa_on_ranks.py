"""Two ranks train a scorer as one does: DDP, ZeRO-2 and ZeRO-3 on gloo share rows and scoring."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from test_ranks import REPO, launch

from llmkd.files import read_json
from llmkd.shipped import accelerate_configs

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from deqa_kit import LORA, done, lines, rated, recipe, same, weights, write_rows

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
    "eval_fraction": 0.23,  # 7 rows, and 5 of validation: odd numbers, none is scored twice
    "validation_fraction": 0.2,
}
HALF = ["--per_device_train_batch_size", "3"]
ROWS = rated(30)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        done(prepared(folder, **KEYS))
    assert gap(folder / "run", folder / "base") > 1e-3  # a gap of 1e-6 is none
    return folder


def prepared(folder: Path, rows=ROWS, **changes) -> str:
    folder.mkdir(exist_ok=True)
    write_rows(folder / "rated.jsonl", rows)
    return recipe(folder, **changes)


def start(config, path, *flags):
    found = launch(f"cpu/{config}", path, *HALF, *flags, script="run_deqa.py")
    assert found.returncode == 0, found.stdout[-1000:] + found.stderr[-4000:]
    return found.stdout


def score(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """`llmkd score` on two ranks."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(accelerate_configs()["cpu/ddp"]), "--main_process_port", "0"]
    command += ["-m", "llmkd.cli", "score", *words, "--output_dir", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=570)


def gap(one: Path, other: Path) -> float:
    here, there = weights(one), weights(other)
    assert here.keys() == there.keys()
    return max((value - there[name]).abs().max().item() for name, value in here.items())


def probs(run: Path, name: str = "predictions.jsonl") -> np.ndarray:
    return np.array([row["probs"] for row in lines(run / name)])


def losses(run: Path) -> np.ndarray:
    """Each step's loss and its parts."""
    names = ("loss", "level_kl", "answer_ce", "level_mass", "tokens")
    said = [line for line in lines(run / "metrics.jsonl") if "level_kl" in line]
    return np.array([[line[name] for name in names] for line in said])


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_two_ranks_are_one(tmp_path, one_rank, config):
    said = start(config, prepared(tmp_path, **KEYS))
    assert said.count("report: ") == 1  # one rank speaks
    run, whole = tmp_path / "run", one_rank / "run"
    own, theirs = (read_json(folder / "run.json") for folder in (run, whole))
    for name in ("levels", "label", "steps", "tokens"):
        assert own[name] == theirs[name], name
    assert {**own["data"], "source": None} == {**theirs["data"], "source": None}
    np.testing.assert_allclose(losses(run), losses(whole), atol=1e-5)
    assert len(losses(run)) == 3
    assert gap(run, whole) < 1e-6
    rows = [[row["row"] for row in lines(r / "predictions.jsonl")] for r in (run, whole)]
    assert rows[0] == rows[1] and len(rows[0]) == 7 + 5
    np.testing.assert_allclose(probs(run), probs(whole), atol=1e-5)


def test_pairs_arms_and_a_kill_on_two_ranks_with_sharded_weights(tmp_path):
    """Groups of two rows: pairs stay inside them, so that most rows of a micro-batch have none; the
    second trainer goes on from its checkpoint to the same bits, and the first arm is left alone.
    """
    rows = [{**row, "group": str(number // 2)} for number, row in enumerate(rated())]
    arms = {"full": {}, "lora": LORA}
    path = prepared(tmp_path, rows, arms=arms, group_column="group", std_mode="pred")
    start("zero3", path)
    run, parts = tmp_path / "run", ("level_kl", "fidelity", "unpaired")
    for name in arms:
        said = [line for line in lines(run / name / "metrics.jsonl") if "level_kl" in line]
        found = {part: np.array([line[part] for line in said]) for part in parts}
        assert len(said) == 6 and np.isfinite([*found.values()]).all()
        # were groups ignored, no row would be without a pair
        assert 0.5 < found["unpaired"].mean() < 1 and found["fidelity"].max() > 0
        assert np.isfinite(probs(run / name)).all()
    assert gap(run / "full", tmp_path / "base") > 1e-3
    lora, file = run / "lora", "adapter_model.safetensors"
    expected, before = (lora / file).read_bytes(), weights(run / "full")
    (lora / file).unlink()  # killed while the last checkpoint was written
    (lora / "checkpoint-6" / "llmkd_complete.json").unlink()
    text = (lora / "run.json").read_text()
    (lora / "run.json").write_text(text.replace('"status": "done"', '"status": "running"'))
    said = start("zero3", path)
    assert "full: reused" in said and "lora: goes on from checkpoint-4" in said
    assert (lora / file).read_bytes() == expected and same(weights(run / "full"), before)


def test_ranks_share_the_rows_that_are_scored(tmp_path, one_rank):
    words = [str(one_rank / "run"), str(one_rank / "rated.jsonl"), "--ratings_column", "ratings"]
    found = score(tmp_path / "two", *words, "--draws", "0")
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("30 rows scored") == 1
    known = {row["row"]: row["probs"] for row in lines(one_rank / "run" / "predictions.jsonl")}
    table = lines(tmp_path / "two" / "scores.jsonl")
    assert [row["row"] for row in table] == list(range(30))
    for row in table:
        if row["row"] in known:
            np.testing.assert_allclose(row["probs"], known[row["row"]], atol=1e-5)
    assert read_json(tmp_path / "two" / "eval.json")["rows"] == 30


def test_a_mistake_is_said_once(tmp_path):
    rows = [{**row, "ratings": [11.0]} if number == 5 else row for number, row in enumerate(ROWS)]
    found = launch("cpu/ddp", prepared(tmp_path, rows), *HALF, script="run_deqa.py")
    assert found.returncode != 0
    assert found.stderr.count("llmkd deqa: ") == 1 and "row 5, ratings" in found.stderr
    assert not (tmp_path / "run").exists()
