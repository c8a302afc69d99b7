"""`llmkd label` and a run that reads it: make, look, verify, train, refuse, go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import sentences
from test_ranks import launch
from test_salt_run import SMALL, recipe, same, weights
from transformers import AutoModelForCausalLM

from llmkd.cli import main
from llmkd.files import read_json

REPO = Path(__file__).parents[2]
# Batches of one size, live and stored: then products round alike.
PLAIN = {"arms": None, "save_strategy": "no"}
PLAIN |= {"label_rows_per_shard": 8, "label_batch_size": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with its own teacher, and a store of each encoding from that teacher."""
    folder = tmp_path_factory.mktemp("labels")
    lines = [" ".join(sentences(80)[i : i + 10]) for i in range(0, 80, 10)]  # rows of full width
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    path = recipe(folder, **PLAIN)
    assert main(["salt", path]) == 0
    for name, flags in {
        "hidden": ["--label_encoding", "hidden", "--label_dtype", "float32"],
        "sampled": ["--label_encoding", "sampled", "--label_draws", "20"],
        "topk": ["--label_encoding", "topk", "--label_k", "9"],
        "lowrank": ["--label_encoding", "lowrank", "--label_rank", "6"],
        "dense": ["--label_encoding", "dense"],
    }.items():
        store = str(folder / name)
        assert main(["label", path, "--label_store", store, *flags]) == 0
    return folder


def again(made, tmp_path, *flags):
    """The same recipe trained once more, on labels."""
    changed = {**PLAIN, "teacher_model_config": None, "dataset": str(made / "rows.jsonl")}
    path = recipe(tmp_path, **changed)
    return main(["salt", path, *flags]), tmp_path / "run"


def test_a_run_on_stored_hidden_states_is_the_live_run_bit_for_bit(made, tmp_path):
    code, run = again(made, tmp_path, "--label_store", str(made / "hidden"))
    assert code == 0
    assert same(weights(run), weights(made / "run"))
    teacher = read_json(run / "run.json")["teacher"]
    assert teacher["labels"]["name"] == "hidden" and teacher["source"].endswith("teacher")
    assert read_json(run / "run.json")["schedule"]["kd_steps"] == 3


@pytest.mark.parametrize(
    "name, near", [("sampled", 0.3), ("topk", 0.1), ("lowrank", 0.05), ("dense", 1e-4)]
)
def test_a_run_on_other_labels_is_near_the_live_one(made, tmp_path, name, near):
    code, run = again(made, tmp_path, "--label_store", str(made / name))
    assert code == 0
    live, here = weights(made / "run"), weights(run)
    assert not same(live, here) or name == "dense"  # which may well be exact
    loss = [read_json(f / "eval.json")["held_out"]["loss"] for f in (made / "run", run)]
    assert loss[1] == pytest.approx(loss[0], abs=near)


def test_arms_may_differ_in_their_labels(made, tmp_path):
    arms = {"baseline": {"kd_ratio": 0.0}, "hidden": {"label_store": str(made / "hidden")}}
    code, run = again(made, tmp_path, "--arms", json.dumps(arms))
    assert code == 0
    assert read_json(run / "baseline" / "run.json")["teacher"] is None
    assert same(weights(run / "hidden"), weights(made / "run"))


def test_several_teachers_live_and_stored(made, tmp_path):
    teachers = [
        {"model_name_or_path": str(made / "run" / "teacher"), "weight": 2},
        {"label_store": str(made / "hidden")},
    ]
    code, run = again(made, tmp_path, "--teachers", json.dumps(teachers))
    assert code == 0
    facts = read_json(run / "run.json")["teacher"]
    assert [round(one["weight"]) for one in facts["teachers"]] == [2, 1]
    # both are the same model, so the mixture is that teacher
    loss = [read_json(f / "eval.json")["held_out"]["loss"] for f in (made / "run", run)]
    assert loss[1] == pytest.approx(loss[0], abs=1e-4)


def test_info_and_verify(made, capsys):
    assert main(["label", "info", str(made / "topk")]) == 0
    text = capsys.readouterr().out
    assert "bytes a token" in text and "name topk" in text
    for name in ("topk", "hidden", "lowrank", "sampled", "dense"):
        assert main(["label", "verify", str(made / name), "--rows", "8"]) == 0, name
        assert "identical to the last bit" in capsys.readouterr().out
    import datasets

    files = str(made / "topk" / "data" / "*.arrow")
    rows = datasets.load_dataset("arrow", data_files=files, split="train")
    assert {"row", "tokens", "length", "ids"} <= set(rows.column_names)


def test_one_flipped_byte_is_found(made, tmp_path, capsys):
    store = shutil.copytree(made / "sampled", tmp_path / "store")
    shard = sorted(store.glob("data/*.arrow"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["label", "verify", str(store), "--checksums_only"]) == 1
    assert shard.name in capsys.readouterr().out


def test_a_truncated_shard_is_refused_before_step_one_and_made_anew(made, tmp_path, capsys):
    store = shutil.copytree(made / "sampled", tmp_path / "store")
    shard = sorted(store.glob("data/*.arrow"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    code, run = again(made, tmp_path, "--label_store", str(store))
    error = capsys.readouterr().err
    assert code == 1 and shard.name in error and "llmkd label" in error
    assert not (run / "run.json").exists()
    shard.unlink()
    flags = ["--label_encoding", "sampled", "--label_draws", "20"]
    assert main(["label", str(made / "recipe.yaml"), "--label_store", str(store), *flags]) == 0
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--max_length", "16"], "max_length"),
        (["--packing_strategy", "bfd"], "packing"),
        (["--teacher_temperature", "2"], "teacher_temperature"),
        (["--tokenizer_vocab_size", "290"], "tokenizer"),
    ],
)
def test_a_store_of_other_settings_is_refused_with_both_values(
    made, tmp_path, capsys, flags, words
):
    code, run = again(made, tmp_path, "--label_store", str(made / "sampled"), *flags)
    error = capsys.readouterr().err
    assert code == 1 and words in error and "the store has" in error
    assert not (run / "run.json").exists()


def test_rows_of_stage_1_alone_serve_their_own_run_only(made, tmp_path, capsys):
    path, store = str(made / "recipe.yaml"), str(tmp_path / "store")
    flags = ["--label_store", store, "--label_rows", "stage1", "--label_encoding", "hidden"]
    assert main(["label", path, *flags, "--label_dtype", "float32"]) == 0
    manifest = read_json(tmp_path / "store" / "manifest.json")
    assert manifest["rows"]["count"] < manifest["rows"]["of"]
    code, run = again(made, tmp_path, "--label_store", store)
    assert code == 0 and same(weights(run), weights(made / "run"))
    code, _ = again(made, tmp_path / "b", "--label_store", store, "--seed", "7")
    assert code == 1 and "that this run needs are not among them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--label_encoding", "topk", "--label_k", "100000"], "label_k: 100000"),
        (["--label_encoding", "sampeld"], "did you mean 'sampled'"),
        (["--label_draws", "0"], "label_draws"),
        (["--label_dtype", "int7", "--label_encoding", "hidden"], "int7"),
        (["--teacher_model_name_or_path", "nowhere/here"], "exclude"),
    ],
)
def test_bad_settings_leave_nothing_behind(made, tmp_path, capsys, flags, words):
    store = tmp_path / "store"
    path = str(made / "recipe.yaml")
    assert main(["label", path, "--label_store", str(store), *flags]) == 1
    assert words in capsys.readouterr().err
    assert not store.exists()


def test_no_place_no_teacher(made, capsys):
    path = str(made / "recipe.yaml")
    assert main(["label", path]) == 1
    assert "label_store" in capsys.readouterr().err
    flags = ["--label_store", "x", "--teacher_model_config", "null"]
    assert main(["label", path, *flags]) == 1
    assert "need a teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(made, tmp_path):
    store = tmp_path / "store"
    command = [sys.executable, "-m", "llmkd.cli", "label", str(made / "recipe.yaml")]
    command += ["--label_store", str(store), "--label_draws", "20", "--label_rows_per_shard", "2"]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(store.glob("data/*.json"))) < 2 and run.poll() is None:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    # a shard is there once the JSON that vouches for it is
    done = [path.with_suffix(".arrow") for path in store.glob("data/shard-*.json")]
    kept = {path.name: path.stat().st_mtime_ns for path in done}
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0
    assert len(kept) >= 2
    for name, at in kept.items():
        assert (store / "data" / name).stat().st_mtime_ns == at  # finished shards were not redone
    other = tmp_path / "other"
    flags = ["--label_store", str(other), "--label_draws", "20", "--label_rows_per_shard", "2"]
    assert main(["label", str(made / "recipe.yaml"), *flags]) == 0
    for path in other.glob("data/*"):
        assert (store / "data" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_two_ranks_write_what_one_does(made, tmp_path, config):
    flags = ["--label_store", str(tmp_path / "store"), "--label_draws", "20"]
    flags += ["--teacher_model_config", "null"]  # its own run had one rank
    flags += ["--teacher_model_name_or_path", str(made / "run" / "teacher")]
    done = launch(f"cpu/{config}", str(made / "recipe.yaml"), *flags, script="run_label.py")
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(path.name for path in (made / "sampled" / "data").glob("*.arrow"))
    same_bytes = [
        (tmp_path / "store" / "data" / name).read_bytes()
        == (made / "sampled" / "data" / name).read_bytes()
        for name in files
    ]
    assert len(files) > 2 and all(same_bytes)


@pytest.mark.slow
def test_two_ranks_train_on_a_store(made, tmp_path):
    changed = {**PLAIN, "teacher_model_config": None, "dataset": str(made / "rows.jsonl")}
    path = recipe(tmp_path, **changed)
    flags = ["--label_store", str(made / "hidden"), "--per_device_train_batch_size", "2"]
    done = launch("cpu/zero3", path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    here, there = (read_json(f / "eval.json") for f in (tmp_path / "run", made / "run"))
    loss = there["held_out"]["loss"]
    assert here["held_out"]["loss"] == pytest.approx(loss, abs=2e-3)


def test_labels_need_no_teacher_in_memory(made, tmp_path, monkeypatch):
    from llmkd.teachers import live

    def refuse(*_, **__):
        raise AssertionError("the teacher's weights were read")

    monkeypatch.setattr(live, "load_model", refuse)
    code, _ = again(made, tmp_path, "--label_store", str(made / "topk"))
    assert code == 0


def test_a_stream_is_labelled_and_trained_on_in_its_order(made, tmp_path):
    teacher = ["--teacher_model_name_or_path", str(made / "run" / "teacher")]
    changed = {
        **PLAIN,
        "teacher_model_config": None,
        "dataset": str(made / "rows.jsonl"),
        "streaming": True,
        "tokenizer_name_or_path": str(made / "run" / "tokenizer"),
        "eval_dataset": str(made / "run" / "held_out.jsonl"),
    }
    live, stored = tmp_path / "live", tmp_path / "stored"
    assert main(["salt", recipe(live, **changed), *teacher]) == 0
    store = ["--label_store", str(tmp_path / "store")]
    flags = [*store, "--label_encoding", "hidden", "--label_dtype", "float32"]
    assert main(["label", recipe(stored, **changed), *teacher, *flags]) == 0
    assert read_json(tmp_path / "store" / "manifest.json")["rows"]["count"] == 12
    assert main(["salt", recipe(stored, **changed), *store]) == 0
    assert same(weights(live / "run"), weights(stored / "run"))


def test_a_teacher_that_is_not_at_hand_is_compared_by_its_name(made, tmp_path, capsys):
    store = ["--label_store", str(made / "hidden")]
    store += ["--tokenizer_name_or_path", str(made / "run" / "tokenizer")]
    code, _ = again(made, tmp_path, *store, "--teacher_model_name_or_path", "some/teacher")
    error = capsys.readouterr().err
    assert code == 1 and "some/teacher" in error and "teacher id" in error


def test_a_teacher_that_would_be_trained_is_compared_too(made, tmp_path, capsys):
    store = ["--label_store", str(made / "hidden")]

    def train(folder, **changes):
        changed = {**PLAIN, "dataset": str(made / "rows.jsonl"), **changes}
        return main(["salt", recipe(folder, **changed), *store])

    larger = {**SMALL, "hidden_size": 16}
    assert train(tmp_path / "size", teacher_model_config=larger) == 1
    error = capsys.readouterr().err
    assert "teacher parameters: the store has" in error and not (tmp_path / "size/run").exists()

    assert train(tmp_path / "none") == 0  # no weights to compare: it says so
    said = " ".join(capsys.readouterr().out.split())
    assert "holds none yet" in said and not (tmp_path / "none/run/teacher").exists()

    other = shutil.copytree(made / "run" / "teacher", tmp_path / "other/run/teacher")
    assert train(tmp_path / "other") == 0  # the very teacher, moved
    shutil.rmtree(tmp_path / "other")
    shutil.copytree(made / "run" / "teacher", other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    model.save_pretrained(other)
    assert train(tmp_path / "other") == 1
    error = capsys.readouterr().err
    assert "teacher fingerprint: the store has" in error and str(other) in error
