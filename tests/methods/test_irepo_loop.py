"""`llmkd irepo`: what a finished run holds, and what is refused without touching it."""

import fcntl
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from irepo_kit import (
    calls,
    copy_of,
    done,
    metrics_of,
    pairs_of,
    prompts,
    quick,
    recipe,
    refused,
    rows_of,
    rule,
    same,
    save_policy,
    small_parts,
    stamps,
    value,
    weights,
    write_rows,
)
from scipy.special import expit
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkd.cli import main
from llmkd.evaluation.align_run import read_rows
from llmkd.files import read_json
from llmkd.methods import irepo_finish
from llmkd.models.log_probs import completion_log_probs

__all__ = ["quick"]  # a fixture
COLUMNS = {
    *("row", "prompt", "response_1", "response_2", "prompt_ids", "ids_1", "ids_2", "pref_logit"),
    *("wins", "votes", "ref_logps_1", "ref_logps_2", "initial_logps_1", "initial_logps_2"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a run that is done; nobody changes it."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(irepo_finish, "write_align_report", lambda run: run / "report.html")
        small_parts(patch)
        done(recipe(folder))
    return folder


@pytest.fixture
def run(world):
    return world / "run"


def log_probs(folder, rows, side):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return completion_log_probs(model, [*rows["prompt_ids"]], [*rows[f"ids_{side}"]])


def test_every_iteration_is_a_folder(run):
    for number in range(3):
        names = {path.name for path in (run / f"iteration-{number}").iterdir()}
        assert {"held_out", "held_out_verdicts.jsonl", "metrics.json", "seconds.json"} <= names
        if number:
            assert {"responses", "annotations", "pairs", "model", "held_out_annotations"} <= names
    facts = read_json(run / "run.json")
    assert facts["status"] == "done" and facts["kind"] == "irepo" and facts["iterations"] == 2
    assert facts["annotators"] == ["rule"] and facts["sampling"]["num_responses"] == 3
    assert facts["tokens"] == sum(metrics_of(run, number)["tokens"] for number in (1, 2)) > 0
    kept = yaml.safe_load((run / "recipe.yaml").read_text())
    assert kept["iterations"] == 2 and kept["output_dir"] == str(run)
    assert not list(run.rglob("*.part"))


def test_no_prompt_serves_twice(run):
    served = [rows_of(run / f"iteration-{n}" / "responses") for n in (1, 2)]
    numbers = [[row["row"] for row in rows] for rows in served]
    held_out = [row["row"] for row in rows_of(run / "iteration-0" / "held_out")]
    assert [len(one) for one in (*numbers, held_out)] == [8, 8, 6]
    assert len({*numbers[0], *numbers[1], *held_out}) == 22
    for number in (1, 2):
        assert [r["row"] for r in rows_of(run / f"iteration-{number}" / "held_out")] == held_out
    for row in served[0]:
        assert len(row["responses"]) == len(row["ids"]) == len(row["finished"]) == 3
        assert all(1 <= len(ids) <= 6 for ids in row["ids"])


@pytest.mark.parametrize("number", [1, 2])
def test_pairs_are_the_best_and_the_worst_with_their_sign(run, number):
    rows = pairs_of(run, number)
    assert set(rows.column_names) == COLUMNS and len(rows) == 8
    said = {row["row"]: row for row in rows_of(run / f"iteration-{number}" / "responses")}
    for row in rows:
        one, two = row["response_1"], row["response_2"]
        assert row["pref_logit"] == value(one) - value(two)
        given = said[row["row"]]
        values = [value(text) for text in given["responses"] if text.strip()]
        assert abs(row["pref_logit"]) == max(values) - min(values)
        places = [given["responses"].index(text) for text in (one, two)]
        assert places[0] < places[1]  # as they were sampled, not as they were ranked
        assert [given["ids"][place] for place in places] == [row["ids_1"], row["ids_2"]]
        assert given["prompt_ids"] == row["prompt_ids"] and given["prompt"] == row["prompt"]
        assert row["wins"] is None and row["votes"] is None
    signs = np.sign(rows["pref_logit"])
    assert {-1.0, 1.0} <= set(signs)
    types = {name: str(rows.features[name].dtype) for name in ("pref_logit", "wins", "votes")}
    assert set(types.values()) == {"float64"}


def test_references_are_those_of_the_iterates(world, run):
    start, first = world / "policy", run / "iteration-1" / "model"
    for number, previous in ((1, start), (2, first)):
        rows = pairs_of(run, number)
        for side in (1, 2):
            for name, folder in (("ref", previous), ("initial", start)):
                expected = log_probs(folder, rows, side)
                found = rows[f"{name}_logps_{side}"]
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    rows = pairs_of(run, 2)
    assert np.abs(np.subtract(rows["ref_logps_1"], rows["initial_logps_1"])).max() > 1e-3


def test_the_first_step_starts_from_the_reference(run):
    for number in (1, 2):
        lines = (run / f"iteration-{number}" / "model" / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines if '"loss"' in line]
        assert found[0]["logratio_reference"] == pytest.approx(0, abs=1e-5)
        assert abs(found[1]["logratio_reference"]) > 1e-4
        at_once = [row["pref_logit"] for row in pairs_of(run, number)]
        # of no log-ratio the loss is the mean of squared logits
        pairs = metrics_of(run, number)["mean_abs_logit"]
        assert pairs == pytest.approx(np.abs(at_once).mean())
        assert found[0]["loss"] <= max(np.square(at_once)) + 1e-6


def test_metrics_say_what_the_files_say(run):
    start = rows_of(run / "iteration-0" / "held_out")
    zero = metrics_of(run, 0)
    assert zero["held_out"]["kl_initial"] == {"mean": 0.0, "se": 0.0, "per_token": 0.0}
    assert "win_rate_start" not in zero["held_out"] and zero["annotators"] == []
    before = start
    for number in (1, 2):
        found = metrics_of(run, number)
        assert [found[key] for key in ("prompts", "responses", "pairs")] == [8, 24, 8]
        assert found["dropped"].keys() == {"duplicate", "truncated", "empty"}
        assert found["prompts_without_pair"] == 0 and found["warnings"] == []
        assert {"loss", "accuracy", "margin", "target"} <= found["train"].keys()
        assert found["annotators"][0]["name"] == "rule"
        held_out = found["held_out"]
        rows = rows_of(run / f"iteration-{number}" / "held_out")
        assert held_out["prompts"] == held_out["responses"] == 6
        assert held_out["lengths"] == [len(row["ids"][0]) for row in rows]
        for name, others in (("start", start), ("previous", before)):
            gaps = [
                value(one["responses"][0]) - value(other["responses"][0])
                for one, other in zip(rows, others, strict=True)
            ]
            assert any(gaps)
            rate = held_out[f"win_rate_{name}"]
            assert rate["soft"] == pytest.approx(np.mean(expit(gaps)))
            assert rate["hard"] == pytest.approx(np.mean(0.5 + 0.5 * np.sign(gaps)))
            assert rate["prompts"] == 6 and rate["low"] <= rate["soft"] <= rate["high"]
        before = rows
    seconds = read_json(run / "iteration-2" / "seconds.json")
    assert seconds.keys() == {"sample", "annotate", "reference", "train", "evaluate"}


def test_kl_is_the_mean_log_ratio_on_the_iterates_own_samples(world, run):
    folders = [world / "policy", run / "iteration-1" / "model", run / "iteration-2" / "model"]
    for number in (1, 2):
        rows = rows_of(run / f"iteration-{number}" / "held_out")
        prompt_ids, ids = [r["prompt_ids"] for r in rows], [r["ids"][0] for r in rows]
        sums = []
        for folder in folders:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            sums.append(completion_log_probs(model, prompt_ids, ids))
        held_out = metrics_of(run, number)["held_out"]
        for name, other in (("initial", 0), ("previous", number - 1)):
            mean = float(np.mean(sums[number] - sums[other]))
            assert held_out[f"kl_{name}"]["mean"] == pytest.approx(mean, abs=1e-5) != 0


def test_reward_of_the_start_is_known_in_the_end(run):
    lines = list(read_rows(run / "iteration-1" / "held_out_verdicts.jsonl"))
    others = [line for line in lines if line["against"] == "start"]
    assert any(line["response"] == line["other"] for line in others)  # unchanged ones count too
    rows = rows_of(run / "iteration-0" / "held_out")
    assert [line["other_score"] for line in others] == [value(r["responses"][0]) for r in rows]
    for number in range(3):
        rows = rows_of(run / f"iteration-{number}" / "held_out")
        reward = metrics_of(run, number)["held_out"]["reward"]
        assert reward["values"] == [value(row["responses"][0]) for row in rows]
        assert reward["mean"] == pytest.approx(np.mean(reward["values"]))
    scores = read_json(run / "eval.json")["policy"]
    held_out = metrics_of(run, 2)["held_out"]
    assert scores == {key: held_out[key] for key in scores} and "win_rate_start" in scores


def test_the_last_iterate_is_at_the_top(world, run):
    model, info = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(weights(run), weights(run / "iteration-2" / "model"))
    folders = [world / "policy", run / "iteration-1" / "model", run]
    assert not any(same(weights(one), weights(other)) for one, other in pairwise(folders))
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_the_same_command_reuses_everything(world, tmp_path, quick, capsys):
    kept = stamps(world / "run", lambda path: path.suffix in (".safetensors", ".pt"))
    parts = stamps(world / "run", lambda path: path.parent.name not in ("run", "pairs"))
    shown = {number: metrics_of(world / "run", number) for number in range(3)}
    asked, (top,) = calls(world), [k for k in kept if k.parent == world / "run"]
    capsys.readouterr()
    done(str(world / "recipe.yaml"))
    said = capsys.readouterr().out
    assert said.count("holds this very run") == 2 and calls(world) == asked
    after = stamps(world / "run")
    assert {path: after[path] for path in kept} == kept and top in after
    changed = {path.name for path in parts if after[path] != parts[path]}
    assert changed <= {"metrics.json", "seconds.json", "held_out_verdicts.jsonl"}
    assert {number: metrics_of(world / "run", number) for number in range(3)} == shown
    assert read_json(world / "run" / "run.json")["status"] == "done"


def untouched(world, capsys, *flags, path=None):
    """The error of a command that leaves the finished run as it is."""
    before = stamps(world / "run")
    error = refused(path or str(world / "recipe.yaml"), capsys, *flags)
    assert stamps(world / "run") == before
    return error


def test_other_settings_are_another_run(world, capsys):
    error = untouched(world, capsys, "--beta", "0.5")
    for words in ("output_dir", "beta: 0.3 -> 0.5", "--overwrite_run true"):
        assert words in error
    assert "prompts_per_iteration: 8 -> 9" in untouched(
        world, capsys, "--prompts_per_iteration", "9"
    )


def test_changed_prompts_are_another_run(world, capsys):
    kept = (world / "prompts.jsonl").read_bytes()
    write_rows(world / "prompts.jsonl", prompts(first=7))
    try:
        error = untouched(world, capsys)
    finally:
        (world / "prompts.jsonl").write_bytes(kept)
    assert "output_dir" in error and "of the same settings, but not of the same" in error


def test_other_weights_of_the_start_are_another_run(world, tmp_path, capsys):
    path, kept = world / "policy" / "model.safetensors", tmp_path / "kept"
    shutil.copy2(path, kept)
    try:
        shutil.copy2(Path(save_policy(tmp_path / "other", seed=9)) / "model.safetensors", path)
        error = untouched(world, capsys)
    finally:
        shutil.copy2(kept, path)
    assert "not of the same models" in error


def test_two_processes_in_one_folder(world, capsys):
    with (world / "run" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # as another process of this machine does
        error = refused(str(world / "recipe.yaml"), capsys)
    assert "another process works on a run in this folder now" in error
    assert read_json(world / "run" / "run.json")["status"] == "done"


@pytest.mark.parametrize("what", ["rule", "prompts", "policy"])
def test_overwriting_deletes_nothing_it_reads(world, tmp_path, capsys, what):
    run = copy_of(world / "run", tmp_path / "run")
    inside = {
        "rule": lambda: {"annotators": [rule(run, name="rule")]},
        "prompts": lambda: {"prompt_dataset": write_rows(run / "prompts.jsonl", prompts())},
        "policy": lambda: {"model_name_or_path": str(run / "iteration-1" / "model")},
    }[what]()
    before = stamps(run)
    error = refused(recipe(tmp_path, **inside), capsys, "--overwrite_run", "true")
    key = {"rule": "annotators[0].function", "prompts": "prompt_dataset"}
    assert key.get(what, "model_name_or_path") in error
    assert "which overwrite_run would delete with it" in error
    assert {k: v for k, v in stamps(run).items() if k.name != ".lock"} == {
        k: v for k, v in before.items() if k.name != ".lock"
    }


def test_overwriting_waits_until_annotators_are_there(world, tmp_path, capsys):
    run = copy_of(world / "run", tmp_path / "run")
    before = stamps(run)
    missing = [{"type": "rule", "function": f"{tmp_path}/no.py:score"}]
    for key in ("annotators", "held_out_annotators"):
        error = refused(recipe(tmp_path, **{key: missing}), capsys, "--overwrite_run", "true")
        assert f"irepo: {key}[0]: " in error and "no such file" in error
    assert stamps(run) == before


# settings; words of the error
BAD_INPUT = {
    "prompt longer than the window": (
        {"max_new_tokens": 30},
        ["max_prompt_length", "there is room for 2", "--long_prompts drop"],
    ),
    "responses longer than the window": (
        {"max_new_tokens": 32},
        ["max_new_tokens: 32", "window of 32"],
    ),
    "long prompt": ({"max_prompt_length": 2}, ["max_prompt_length: 2", "the prompt of row"]),
    "too few prompts": (
        {"iterations": 5},
        ["prompts_per_iteration: 8", "5 iterations need 40 prompts; there are 34"],
    ),
    "no such policy": (
        {"model_name_or_path": "./no-such-policy"},
        ["model_name_or_path: './no-such-policy'"],
    ),
    "no such column": ({"prompt_column": "text"}, ["text", "prompt"]),
    "a chat without a template": ({"as_chat": "true"}, ["as_chat", "has no chat template"]),
    "two annotators of one name": (
        {"annotators": [{"type": "rule", "function": "llmkd.annotators.examples:prose"}] * 2},
        ["annotators[1].name", "is another annotator's too"],
    ),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_said_before_anything_is_written(tmp_path, capsys, what):
    changes, words = BAD_INPUT[what]
    error = refused(recipe(tmp_path, **changes), capsys)
    for word in words:
        assert word in error, error
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_strangers_model(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"mine")
    error = refused(recipe(tmp_path), capsys, "--overwrite_run", "true")
    assert "holds a model that no llmkd run wrote" in error
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == b"mine"


def test_resume_names_a_folder_that_is_none(tmp_path, capsys):
    assert main(["resume", str(tmp_path)]) == 1
    assert "holds no recipe.yaml" in capsys.readouterr().err


def test_verdicts_survive_odd_characters_and_pairs_nobody_judged(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"response": "a\u2028b\x85c", "logit": None}, {"response": "d", "logit": 1.5}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert list(read_rows(path)) == rows
    assert not math.isnan(rows[1]["logit"])
