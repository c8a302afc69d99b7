"""The shipped recipes run as they stand, with a tiny model and a few rows in place of theirs."""

import numpy as np
from deqa_kit import lines, pictures, rated, save_image_scorer, save_scorer, write_rows

from llmkd.cli import main
from llmkd.files import read_json
from llmkd.shipped import shipped_recipes

RECIPES = {path.stem: path for path in shipped_recipes() if path.parent.name == "deqa"}
LEVELS = ("onehot_bin", "two_token", "pooled_sigma", "gauss_deqa", "gauss_tilt")
SMALL = {
    "dtype": "float32",
    "bf16": "false",
    "use_cpu": "true",
    "gradient_checkpointing": "false",
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "1",
    "max_steps": "2",
    "max_length": "256",
    "bootstrap_draws": "5",
    "disable_tqdm": "true",
}


def run(name, folder, **changes):
    """The shipped recipe through the command line, with flags for what this machine cannot do."""
    flags = {**SMALL, "output_dir": str(folder / "run"), **changes}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert main(["deqa", str(RECIPES[name]), *words]) == 0
    return folder / "run"


def texts(folder, make):
    rows = [make(row) for row in rated(12)]
    return {
        "model_name_or_path": save_scorer(folder / "base"),
        "score_dataset": write_rows(folder / "train.jsonl", rows[:8]),
        "score_eval_dataset": write_rows(folder / "test.jsonl", rows[8:]),
    }


def test_judge_5level_on_the_columns_of_helpsteer2(tmp_path):
    def make(row):  # as the dataset's card lists them
        said = round(row["ratings"][0] * 0.4)
        names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
        return {"prompt": row["text"], "response": "yes", **dict.fromkeys(names, said)}

    given = texts(tmp_path, make)
    data = tmp_path / "data"  # a folder of two splits, as the Hub has them
    data.mkdir()
    (tmp_path / "train.jsonl").rename(data / "train.jsonl")
    (tmp_path / "test.jsonl").rename(data / "validation.jsonl")
    given["score_dataset"] = str(data)
    del given["score_eval_dataset"]
    folder = run("judge_5level", tmp_path, **given)
    facts = read_json(folder / "run.json")
    assert facts["kind"] == "deqa" and (folder / "report.html").is_file()
    said = lines(folder / "predictions.jsonl")
    assert len(said) == 4 and all(1 <= row["mean"] <= 5 for row in said)


def test_translation_da_arm_by_arm(tmp_path):
    def make(row):
        return {
            "src": row["text"],
            "mt": row["text"],
            "scores": [10 * said for said in row["ratings"]],
        }

    folder = run("translation_da", tmp_path, **texts(tmp_path, make), validation_fraction="0")
    for arm in LEVELS:
        assert len(lines(folder / arm / "predictions.jsonl")) == 4


def test_iqa_vlm_zero3_on_one_rank(tmp_path):
    rows = [
        {"image": row["image"], "dataset": name, "mos": np.mean(row["ratings"]), "std": 0.5}
        for row, name in zip(pictures(tmp_path, 12), ["koniq", "kadid"] * 6, strict=True)
    ]
    given = {
        "model_name_or_path": save_image_scorer(tmp_path / "sees"),
        "image_root": str(tmp_path),
        "score_dataset": write_rows(tmp_path / "train.jsonl", rows[:8]),
        "score_eval_dataset": write_rows(tmp_path / "test.jsonl", rows[8:]),
    }
    folder = run("iqa_vlm_zero3", tmp_path, **given)
    assert len(lines(folder / "predictions.jsonl")) == 4
