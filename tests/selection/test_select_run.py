"""Selections from a recipe: the verb `select`, its scores file, and the four arms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import sentences
from datasets import load_dataset

from llmkd.cli import main
from llmkd.files import read_json
from llmkd.selection import SELECTIONS, controls
from llmkd.shipped import accelerate_configs

REPO = Path(__file__).parents[2]
LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 32}
SCORED = sorted(name for name, found in SELECTIONS.items() if found.needs_model)


def recipe(folder: Path, **changes) -> str:
    text = folder / "rows.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(60)))
    keys = {
        "output_dir": str(folder / "run"),
        "dataset": str(text),
        "tokenizer_vocab_size": 280,
        "max_length": 32,
        "teacher_model_config": LLAMA,
        "model_config": LLAMA,
        "kd_ratio": 0.5,
        "teacher_temperature": 1.0,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def scores_of(folder: Path) -> np.ndarray:
    file = str(folder / "run" / "scores.parquet")
    return np.array(load_dataset("parquet", data_files=file, split="train")["score"])


def test_every_selection_in_one_recipe_with_hard_labels_too(tmp_path, capsys):
    arms = {"none": {}} | {name: {"selection": name} for name in SELECTIONS}
    arms |= controls("el2n")
    path = recipe(tmp_path, arms=arms, selection="el2n")
    assert main(["salt", path]) == 0
    said = capsys.readouterr().out
    assert "el2n: held-out nats/token" in said and "el2n - random" in said
    four = said.split("margin: random rows and hard labels are not all among the arms")[1]
    assert yaml.safe_load(four.splitlines()[1]) == controls("margin")
    assert "random: random rows" not in said and "random: held-out" not in said
    facts = {name: read_json(tmp_path / "run" / name / "run.json") for name in arms}
    for name, fact in facts.items():
        assert fact["status"] == "done" and fact["data"]["selected_rows"] == 8
        chosen = arms[name].get("selection", "el2n")
        assert fact["data"]["selection"] == chosen
        assert (fact["selection_flops"] > 0) == SELECTIONS[chosen].needs_model
        assert fact["schedule"]["kd_steps"] == (0 if name.endswith("_hard") else 2)
    results = read_json(tmp_path / "run" / "eval.json")["arms"]
    assert results["el2n_soft"]["loss"] == results["el2n"]["loss"]  # the same rows, one scoring
    assert results["el2n_hard"]["loss"] != results["random_hard"]["loss"]
    assert len(list((tmp_path / "run" / "selection").glob("*.parquet"))) == len(SCORED)

    capsys.readouterr()
    assert main(["select", path]) == 0  # the folder holds the four arms: their table
    said = capsys.readouterr().out
    assert "held-out nats/token" in said and "el2n - random" in said and "arms:" not in said


@pytest.mark.parametrize("name", ["kcenter", "rad"])
def test_select_says_what_to_compare_and_its_scores_choose_the_same_rows(tmp_path, capsys, name):
    path, run = recipe(tmp_path, selection=name), tmp_path / "run"
    assert main(["select", path]) == 0
    said = capsys.readouterr().out
    assert "(8 kept)" in said or said.count("kept)") > 2
    pasted = yaml.safe_load(said[said.index("arms:") : said.index("scores: ")])
    assert pasted == {"arms": controls(name)}
    file = str((run / "scores.parquet").rename(tmp_path / "kept.parquet"))
    arms = {"own": {}, "read": {"selection_scores": file}, "random": {"selection": "random"}}
    arms["random_too"] = {**arms["random"], "selection_scores": file}  # the control reads no file
    assert main(["salt", recipe(tmp_path, selection=name, arms=arms)]) == 0
    loss = {k: v["loss"] for k, v in read_json(run / "eval.json")["arms"].items()}
    assert loss["own"] == loss["read"] != loss["random"] == loss["random_too"]
    other = SCORED[SCORED.index(name) - 1]
    wrong = recipe(tmp_path, selection=other, selection_scores=file)
    capsys.readouterr()
    assert main(["select", wrong, "--output_dir", str(tmp_path / "other")]) == 1
    assert f"holds scores of {name}, but this run selects by {other}" in capsys.readouterr().err


def test_a_model_that_cannot_read_the_rows_is_refused_before_it_scores(tmp_path, capsys):
    first = recipe(tmp_path, arms={"baseline": {"kd_ratio": 0.0}})
    assert main(["salt", first]) == 0
    model = str(tmp_path / "run" / "teacher")
    new = {"selection": "el2n", "selection_model_name_or_path": model}
    new["output_dir"] = str(tmp_path / "new")
    for changes, words in (
        ({"tokenizer_vocab_size": 290}, "cannot score these rows"),
        ({"max_length": 64}, "longer than the window of 32"),
        ({"selection_model_name_or_path": "./none"}, "cannot be loaded"),
    ):
        capsys.readouterr()
        assert main(["select", recipe(tmp_path, **{**new, **changes})]) == 1
        error = capsys.readouterr().err
        assert words in error and "selection_model_name_or_path" in error
        assert not (tmp_path / "new").exists()


NO_MODEL = {"teacher_model_config": None, "kd_weight": 0.0}


@pytest.mark.parametrize("name", SCORED)
def test_no_model_to_score_with(tmp_path, capsys, name):
    assert main(["salt", recipe(tmp_path, **NO_MODEL, selection=name)]) == 1
    error = capsys.readouterr().err
    assert f"selection: '{name}': no model to score with" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_random_needs_no_model(tmp_path):
    assert main(["salt", recipe(tmp_path, **NO_MODEL, selection="random")]) == 0
    facts = read_json(tmp_path / "run" / "run.json")
    assert facts["data"]["selected_rows"] == 8 and facts["selection_flops"] == 0


@pytest.mark.slow
def test_two_ranks_choose_what_one_does(tmp_path):
    folders = [tmp_path / f"ranks{ranks}" for ranks in (1, 2)]
    for folder in folders:
        folder.mkdir()
    assert main(["salt", recipe(folders[0], output_dir=str(tmp_path / "small"))]) == 0
    keys = {"selection": "kcenter", "selection_batch_size": 5}
    keys["selection_model_name_or_path"] = str(tmp_path / "small" / "teacher")
    one, two = (recipe(folder, **keys) for folder in folders)
    assert main(["select", one]) == 0
    config = str(accelerate_configs()["cpu/ddp"])
    command = [sys.executable, "-m", "llmkd.cli", "select", two, "--accelerate_config", config]
    command += ["--per_device_train_batch_size", "2"]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = [scores_of(folder) for folder in folders]
    assert np.isfinite(scores[0]).sum() == 8
    np.testing.assert_allclose(*scores, atol=1e-6)
