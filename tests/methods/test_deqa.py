"""`llmkd deqa` and `llmkd score`: whole tiny runs, reuse, kills, and what is refused."""

import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from deqa_kit import (
    LORA,
    done,
    lines,
    pictures,
    rated,
    recipe,
    refused,
    same,
    save_image_scorer,
    save_scorer,
    stamps,
    weights,
    write_rows,
)

from llmkd.cli import main
from llmkd.files import read_json
from llmkd.models.scorer import Scorer

ARMS = {"bin": {"label": "onehot_bin"}, "tilt": LORA}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a run of two arms that is done; nobody changes it."""
    folder = tmp_path_factory.mktemp("world")
    done(recipe(folder, arms=ARMS, group_column="group", validation_fraction=0.2))
    return folder


@pytest.fixture
def run(world):
    return world / "run"


def test_every_arm_is_a_folder_that_scores_alone(run):
    facts = read_json(run / "run.json")
    assert facts["kind"] == "deqa" and facts["status"] == "done" and facts["arms"] == [*ARMS]
    base = weights(run.parent / "base")
    for name, label in (("bin", "onehot_bin"), ("tilt", "gauss_tilt")):
        arm = run / name
        own = read_json(arm / "run.json")
        assert own["label"] == label and own["status"] == "done" and own["tokens"] > 0
        assert not same(weights(arm), base)
        kept = yaml.safe_load((arm / "recipe.yaml").read_text())
        assert "arms" not in kept and kept["output_dir"] == str(arm)
        assert read_json(arm / "levels.json")["scale"] == [0, 10]
        said = lines(arm / "predictions.jsonl")
        texts = {n: row["text"] for n, row in enumerate(rated())}
        table = Scorer(str(arm)).score([texts[row["row"]] for row in said])
        np.testing.assert_allclose([row["mean"] for row in said], table.mean_N, atol=1e-5)
        np.testing.assert_allclose([row["probs"] for row in said], table.probs_NL, atol=1e-5)
    assert (run / "tilt" / "adapter" / "adapter_model.safetensors").is_file()
    assert "tilt" in (run / "report.html").read_text() and not list(run.rglob("*.part"))


def test_predictions_stand_beside_what_people_said(run):
    said = lines(run / "bin" / "predictions.jsonl")
    given = rated()
    assert {row["split"] for row in said} == {"held_out", "validation"}
    for row in said:
        ratings = np.array(given[row["row"]]["ratings"])
        assert row["human_mean"] == pytest.approx(1 + 0.4 * ratings.mean())
        assert row["human_std"] == pytest.approx(0.4 * ratings.std(ddof=1))
        # half levels are split on both: the histogram's mean is the ratings'
        mean = float(np.dot(row["human_probs"], [5, 4, 3, 2, 1]))
        assert mean == pytest.approx(row["human_mean"])
        assert row["group"] == given[row["row"]]["group"]


def test_eval_says_what_the_predictions_say(run):
    top = read_json(run / "eval.json")
    for name in ARMS:
        said = [r for r in lines(run / name / "predictions.jsonl") if r["split"] == "held_out"]
        mean, human = ([row[key] for row in said] for key in ("mean", "human_mean"))
        found = read_json(run / name / "eval.json")["held_out"]
        assert found["rows"] == len(said) == 6 and set(found["groups"]) <= {"a", "b"}
        plcc, mae = np.corrcoef(mean, human)[0, 1], np.abs(np.subtract(mean, human)).mean()
        assert found["measures"]["plcc"]["value"] == pytest.approx(plcc)
        assert found["measures"]["mae"]["value"] == pytest.approx(mae)
        assert top["arms"][name] == found["measures"]
    gap = top["arms"]["bin"]["mae"]["value"] - top["arms"]["tilt"]["mae"]["value"]
    assert top["against"] == "bin" and top["paired"].keys() == {"tilt"}
    assert top["paired"]["tilt"]["mae"]["mean"] == pytest.approx(gap)


def test_the_same_command_reuses_and_a_new_arm_is_added(tmp_path, capsys):
    path = recipe(tmp_path, arms={"bin": ARMS["bin"]})
    done(path)
    before, eval_ = stamps(tmp_path / "run"), read_json(tmp_path / "run" / "bin" / "eval.json")
    capsys.readouterr()
    done(recipe(tmp_path, arms={"bin": ARMS["bin"], "two": {"label": "two_token"}}))
    assert "bin: reused" in capsys.readouterr().out
    after = stamps(tmp_path / "run")
    assert {p: after[p] for p in before} == before and (tmp_path / "run/two/levels.json").is_file()
    assert read_json(tmp_path / "run" / "bin" / "eval.json") == eval_
    error = refused(recipe(tmp_path, learning_rate=0.5, arms=ARMS), capsys)
    assert "another recipe's run" in error and "learning_rate" in error
    write_rows(tmp_path / "rated.jsonl", rated(20))
    assert "rows" in refused(recipe(tmp_path, arms={"bin": ARMS["bin"]}), capsys)
    assert stamps(tmp_path / "run") == after
    done(recipe(tmp_path, arms={"bin": ARMS["bin"]}), "--overwrite_run", "true")
    assert not (tmp_path / "run" / "two").exists()


@pytest.mark.parametrize("where", ["checkpoint-4", "predictions.jsonl"])
def test_a_kill_changes_nothing(tmp_path, monkeypatch, capsys, where):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    done(recipe(whole))
    path, run = recipe(folder), folder / "run"
    if where == "predictions.jsonl":
        real = os.replace

        def replace(source, target, *args, **keys):
            if Path(target).name == where:
                raise KeyboardInterrupt
            return real(source, target, *args, **keys)

        patch = pytest.MonkeyPatch()
        patch.setattr(os, "replace", replace)
    else:
        from llmkd.trainers import ScoreTrainer

        patch, step = pytest.MonkeyPatch(), ScoreTrainer.training_step

        def killed(self, *args, **keys):
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            return step(self, *args, **keys)

        patch.setattr(ScoreTrainer, "training_step", killed)
    assert main(["deqa", path]) == 130
    patch.undo()
    assert not (run / "predictions.jsonl").exists()
    trained = where == "predictions.jsonl"
    assert (read_json(run / "run.json")["status"] == "done") is trained
    capsys.readouterr()
    assert main(["resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert ("reused" if trained else "goes on from checkpoint-4") in said
    assert same(weights(run), weights(whole / "run"))
    for name in ("eval.json", "predictions.jsonl"):
        one, other = (f / "run" / name for f in (folder, whole))
        if name == "eval.json":
            assert read_json(one)["held_out"] == read_json(other)["held_out"]
        else:
            assert one.read_text() == other.read_text()


def changed(rows, number, **keys):
    return [{**row, **keys} if n == number else row for n, row in enumerate(rows)]


BAD_ROWS = {
    "outside the scale": ({"ratings": [3, 11]}, r"row 5, ratings.*outside the scale 0 to 10"),
    "NaN": ({"ratings": [3, float("nan")]}, "row 5, ratings.*NaN"),
    "no rating": ({"ratings": []}, "row 5, ratings.*no rating"),
    "no text": ({"text": " "}, "row 5, text.*has no text"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_are_named_before_anything_is_written(tmp_path, what, capsys):
    keys, words = BAD_ROWS[what]
    write_rows(tmp_path / "rated.jsonl", changed(rated(), 5, **keys))
    error = refused(recipe(tmp_path), capsys)
    assert re.search(f"(?s){words}", error), error
    assert not (tmp_path / "run").exists()


def test_lists_and_mappings_come_from_the_command_line_too(tmp_path, capsys):
    words = ["--level_words", '["superb", "good"]', "--questions", '["How?"]']
    error = refused(recipe(tmp_path), capsys, *words)
    assert "superb" in error and "not one token" in error
    error = refused(recipe(tmp_path), capsys, "--arms", "{a: {label: onehot}}")
    assert "arms.a.label: 'onehot'" in error


def test_a_level_word_that_splits_is_named_with_a_way_out(tmp_path, capsys):
    words = ["excellent", "middlingly", "bad"]
    error = refused(recipe(tmp_path, level_words=words), capsys)
    assert "'middlingly'" in error and "not one token" in error and "level_words: [" in error
    assert not (tmp_path / "run").exists()


def test_one_rater_and_agreement_are_allowed(tmp_path, capsys):
    rows = changed(changed(rated(), 3, ratings=[4]), 4, ratings=[6, 6, 6])
    write_rows(tmp_path / "rated.jsonl", rows)
    done(recipe(tmp_path, label="gauss_deqa", eval_fraction=0.5, split_seed=1))
    counts = read_json(tmp_path / "run" / "run.json")["data"]["counts"]
    assert counts["one_rater"] == 1 and counts["all_agree"] >= 1
    assert "two_token" in capsys.readouterr().out


def test_all_ratings_equal_need_a_scale(tmp_path, capsys):
    rows = [{**row, "ratings": [5, 5]} for row in rated()]
    write_rows(tmp_path / "rated.jsonl", rows)
    keys = {"score_low": None, "score_high": None}
    assert "no scale can be read off" in refused(recipe(tmp_path, **keys), capsys)
    done(recipe(tmp_path))
    found = read_json(tmp_path / "run" / "eval.json")["held_out"]["measures"]
    assert found["plcc"]["value"] is None and found["plcc"]["words"]
    assert found["mae"]["value"] is not None


def test_groups_of_one_row_have_no_pairs(tmp_path, capsys):
    rows = [{**row, "group": str(number)} for number, row in enumerate(rated())]
    write_rows(tmp_path / "rated.jsonl", rows)
    path = recipe(tmp_path, group_column="group")
    assert "no pair can be drawn" in refused(path, capsys)
    assert not (tmp_path / "run").exists()
    done(path, "--fidelity_weight", "0")


BAD_KEYS = {
    "label": ({"label": "gauss_dega"}, "label: 'gauss_dega'.*gauss_deqa"),
    "option": ({"label_options": {"sigma": 1}}, r"label_options.sigma: 1: gauss_tilt has no"),
    "option's value": ({"label": "ordinal", "label_options": {"temperature": 0}}, r"label_options"),
    "uneven": ({"label": "gauss_deqa", "level_values": [9, 4, 3, 2, 1]}, "label: 'gauss_deqa'"),
    "arm's key": ({"arms": {"a": {"labl": "ordinal"}}}, "arms.a.labl.*did you mean 'label'"),
    "arm's value": ({"arms": {"a": {"label": "x"}}}, "arms.a.label: 'x'"),
    "arm's rows": ({"arms": {"a": {"text_column": "x"}}}, "is one for all arms"),
    "arm's name": ({"arms": {"eval.json": {}}}, "cannot name a folder"),
    "no model": ({"model_name_or_path": None}, "no model is named"),
    "no rows": ({"score_dataset": None}, "no rated rows"),
    "no spread": ({"ratings_column": None, "mean_column": "m"}, "pair_loss.*spread"),
    "histogram of means": (
        {"ratings_column": None, "mean_column": "m", "label": "histogram"},
        "needs single ratings",
    ),
    "push of arms": (
        {"push_to_hub": True, "hub_model_id": "a/b", "arms": {"a": {}, "b": {}}},
        "arms make several.*llmkd push",
    ),
    "push without a name": ({"push_to_hub": True}, "hub_model_id"),
    "images for a text model": ({"image_column": "image"}, "reads text only"),
    "no such column": ({"text_column": "txt"}, "text_column: 'txt'"),
    "no such model": ({"model_name_or_path": "/nowhere/x"}, "model_name_or_path"),
    "too short": ({"max_length": 12}, "max_length"),
}


@pytest.mark.parametrize("what", BAD_KEYS)
def test_mistakes_name_key_and_way_out(tmp_path, what, capsys):
    keys, words = BAD_KEYS[what]
    error = refused(recipe(tmp_path, **keys), capsys)
    assert re.search(f"(?s){words}", error), error
    assert not (tmp_path / "run").exists()


def test_images(tmp_path, capsys):
    write_rows(tmp_path / "rated.jsonl", pictures(tmp_path, 10))
    keys = {"model_name_or_path": save_image_scorer(tmp_path / "sees"), "image_column": "image"}
    path = recipe(tmp_path, **keys, per_device_train_batch_size=4)
    broken = tmp_path / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    assert "row 3, image" in refused(path, capsys)
    broken.unlink()
    assert "row 3, image" in refused(path, capsys)
    assert not (tmp_path / "run").exists()
    broken.write_bytes(whole)
    done(path)
    assert read_json(tmp_path / "run" / "levels.json")["inputs"] == "images"
    words = ["score", str(tmp_path / "run"), str(tmp_path / "rated.jsonl")]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    means = [row["mean"] for row in lines(tmp_path / "out" / "scores.jsonl")]
    assert len(means) == 10 and len(set(means)) > 5


def test_score_writes_a_table_and_what_it_is_worth(world, run, tmp_path, capsys):
    words = ["score", str(run / "tilt"), str(world / "rated.jsonl"), "--draws", "20"]
    out = ["--output_dir", str(tmp_path / "out")]
    assert main([*words, *out, "--ratings_column", "ratings", "--group_column", "group"]) == 0
    table = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert table == lines(tmp_path / "out" / "scores.jsonl") and len(table) == 24
    known = {row["row"]: row for row in lines(run / "tilt" / "predictions.jsonl")}
    for row in table:
        assert row["score"] == pytest.approx((row["mean"] - 1) * 2.5)  # on the raters' scale
        if row["row"] in known:
            assert row["mean"] == pytest.approx(known[row["row"]]["mean"], abs=1e-5)
            assert row["human_mean"] == pytest.approx(known[row["row"]]["human_mean"])
    found = read_json(tmp_path / "out" / "eval.json")
    mae = np.mean([abs(row["mean"] - row["human_mean"]) for row in table])
    assert found["measures"]["mae"]["value"] == pytest.approx(mae)
    assert set(found["groups"]) == {"a", "b"} and (tmp_path / "out/reliability.png").is_file()
    capsys.readouterr()
    # the same rows unrated: nothing of the first call's agreement is left behind
    assert main([*words, *out, "--k", "2"]) == 0
    again = lines(tmp_path / "out" / "scores.jsonl")
    assert [row["mean"] for row in again] == [row["mean"] for row in table]
    assert again[0]["reward"] == pytest.approx(again[0]["mean"] - 2 * again[0]["std"])
    assert "human_mean" not in again[0] and not (tmp_path / "out" / "eval.json").exists()


def test_score_refuses(world, run, tmp_path, capsys):
    data, out = str(world / "rated.jsonl"), ["--output_dir", str(tmp_path / "out")]
    base = save_scorer(world / "base")
    assert "it is no scorer" in refused(base, capsys, data, *out, verb="score")
    own = ["--output_dir", str(run / "tilt")]
    assert "is a run's folder" in refused(str(run / "tilt"), capsys, data, *own, verb="score")
    bad = ["--ratings_column", "ratings", "--score_low", "4", "--score_high", "5"]
    error = refused(str(run / "tilt"), capsys, data, *bad, *out, verb="score")
    assert "outside the scale 4 to 5" in error and not (tmp_path / "out").exists()


def test_report_is_made_again(world, run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Arms against bin" in page
