"""`llmkd label` where something is wrong: said early, said clearly, nothing left half done."""

import json
import shutil

import pytest
from conftest import sentences
from test_label_run import PLAIN
from test_salt_run import recipe

from llmkd.cli import main
from llmkd.files import read_json
from llmkd.labels import Store, StoreWriter
from llmkd.methods import label_job, label_run, salt_teacher


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher trained for it and a store of its draws; its recipe lies beside both."""
    folder = tmp_path_factory.mktemp("labels")
    lines = [" ".join(sentences(80)[i : i + 10]) for i in range(0, 80, 10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    path = recipe(folder, **PLAIN, label_draws=20)
    assert main(["label", path, "--label_store", str(folder / "store")]) == 0
    return folder


def named(made, tmp_path, **changes):
    """The same recipe with that teacher named instead of trained."""
    teacher = {"teacher_model_name_or_path": str(made / "run" / "teacher")}
    teacher |= {"teacher_model_config": None, "dataset": str(made / "rows.jsonl")}
    return recipe(tmp_path, **{**PLAIN, "label_draws": 20, **teacher, **changes})


def refuse(*_, **__):
    raise AssertionError("too late")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--label_encoding", "topk", "--label_k", "100000"], "label_k: 100000"),
        (["--label_encoding", "lowrank", "--label_rank", "9"], "label_rank: 9"),
        (["--label_draws", "0"], "label_draws: 0"),
        (["--label_store", "FOREIGN"], "holds something else: notes.txt"),
        (["--label_store", "STORE", "--label_draws", "30"], "draws: the store has 20, this run 30"),
        (["--label_store", "STORE", "--max_length", "16"], "max_length: the store has 32"),
    ],
)
def test_what_needs_no_text_is_refused_before_it_is_read(
    made, tmp_path, capsys, monkeypatch, flags, words
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    monkeypatch.setattr(label_job, "load_documents", refuse)
    places = {"FOREIGN": str(tmp_path / "mine"), "STORE": str(made / "store")}
    flags = [places.get(flag, flag) for flag in flags]
    path = named(made, tmp_path / "new")
    assert main(["label", path, "--label_store", str(tmp_path / "store"), *flags]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "store").exists() and len(list((tmp_path / "mine").iterdir())) == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--label_encoding", "topk", "--label_k", "300"], "label_k: 300"),
        (["--label_draws", "30"], "draws: the store has 20, this run 30"),
    ],
)
def test_no_teacher_is_trained_for_labels_that_cannot_be(
    made, tmp_path, capsys, monkeypatch, flags, words
):
    monkeypatch.setattr(label_job, "small_lm", refuse)
    path = recipe(tmp_path, **PLAIN, dataset=str(made / "rows.jsonl"), label_draws=20)
    assert main(["label", path, "--label_store", str(made / "store"), *flags]) == 1
    assert words in capsys.readouterr().err


def test_verify_trains_no_teacher(made, tmp_path, capsys, monkeypatch):
    store = shutil.copytree(made / "store", tmp_path / "store")
    monkeypatch.setattr(salt_teacher, "train", refuse)
    assert main(["label", "verify", str(store)]) == 0
    assert "identical to the last bit" in capsys.readouterr().out
    gone = ["--recipe", recipe(tmp_path, **PLAIN, dataset=str(made / "rows.jsonl"))]
    assert main(["label", "verify", str(store), *gone]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run' / 'teacher'}': the teacher that was trained there is gone" in said
    assert "checksums  whole" in said and "same text, tokenizer and packing" in said
    assert "nothing: that needs the teacher" in said
    assert not (tmp_path / "run").exists()
    other = sentences(80, seed=9)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in other))
    gone = ["--recipe", recipe(tmp_path, **PLAIN)]
    assert main(["label", "verify", str(store), *gone]) == 1
    assert "rows (text, tokenizer and packing): the store has" in capsys.readouterr().out


def test_verify_says_that_a_named_teacher_is_gone(made, tmp_path, capsys):
    tokenizer = {"tokenizer_name_or_path": str(made / "run" / "teacher")}
    gone = {"teacher_model_name_or_path": str(made / "run" / "techer"), **tokenizer}
    path = named(made, tmp_path, **gone)
    assert main(["label", "verify", str(made / "store"), "--recipe", path]) == 0
    said = capsys.readouterr().out
    assert f"did you mean {made / 'run' / 'teacher'}?" in said and "that needs the teacher" in said


def stream(made, tmp_path, **changes):
    tokenizer = str(made / "run" / "teacher")
    held_out = tmp_path / "held_out.jsonl"
    held_out.parent.mkdir(parents=True, exist_ok=True)
    held_out.write_text(json.dumps({"text": "a b c"}) + "\n")
    keys = {"streaming": True, "tokenizer_name_or_path": tokenizer, "eval_dataset": str(held_out)}
    return named(made, tmp_path, **keys, **changes)


def test_a_stream_that_is_too_short_is_counted_first(made, tmp_path, capsys):
    path, store = stream(made, tmp_path, max_steps=600), str(tmp_path / "store")
    assert main(["label", path, "--label_store", store]) == 1
    error = capsys.readouterr().err
    assert "max_steps: 600" in error and "takes 1,200 rows, and the stream ends after" in error
    assert not (tmp_path / "store").exists()
    fits = error.split("--max_steps ")[1].split()[0]
    assert main(["label", path, "--label_store", store, "--max_steps", fits]) == 0
    rows = read_json(tmp_path / "store" / "manifest.json")["rows"]["count"]
    assert f"the stream ends after {rows} of" in error or rows > 1


def test_a_stream_that_became_shorter_says_how_to_go_on(made, tmp_path, capsys, monkeypatch):
    path, store = stream(made, tmp_path, max_steps=600), str(tmp_path / "store")
    monkeypatch.setattr(label_job.LabelJob, "_check_stream", lambda *_: None)
    assert main(["label", path, "--label_store", store]) == 1
    error = capsys.readouterr().err
    assert "the stream is shorter than it was" in error and "--overwrite_labels true" in error


def test_a_flipped_byte_of_a_finished_store_is_mended_by_the_same_command(
    made, tmp_path, capsys, monkeypatch
):
    store = shutil.copytree(made / "store", tmp_path / "store")
    shard = sorted(store.glob("data/*.arrow"))[1]
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    shard.write_bytes(flipped)
    again = ["label", str(made / "recipe.yaml"), "--label_store", str(store)]
    assert main(again) == 0 and shard.read_bytes() == whole
    capsys.readouterr()
    monkeypatch.setattr(label_job.LabelJob, "load", refuse)  # a whole store needs no weights
    assert main(again) == 0
    said = capsys.readouterr().out
    assert "is finished already" in said and "has the SHA-256" in said
    monkeypatch.setattr(StoreWriter, "sums_up_to", 0)
    assert main(again) == 0
    assert "llmkd label verify" in capsys.readouterr().out.replace("\n", " ")


def test_the_bar_can_be_turned_off(made, tmp_path, monkeypatch):
    path, hidden, bar = named(made, tmp_path), [], label_run._bar
    monkeypatch.setattr(label_run, "_bar", lambda total, off: hidden.append(off) or bar(total, off))
    for name, flag in (("a", "false"), ("b", "true")):
        flags = ["--label_store", str(tmp_path / name), "--disable_tqdm", flag]
        assert main(["label", path, *flags]) == 0
    assert hidden == [False, True]


def test_only_a_hidden_bar_overrules_the_environment(monkeypatch):
    given = []
    monkeypatch.setattr(label_run, "tqdm", lambda **settings: given.append(settings))
    label_run._bar(3, False)
    label_run._bar(3, True)
    assert "disable" not in given[0] and given[1]["disable"] is True


def test_rows_of_stage_1_are_those_of_every_arm(made, tmp_path, capsys):
    arms = {
        "baseline": {"kd_ratio": 0.0},
        "short": {"kd_ratio": 0.2},
        "chosen": {"kd_ratio": 0.5, "selection": "random", "seed": 3},
    }
    path, store = named(made, tmp_path, arms=arms, kd_ratio=0.0), str(tmp_path / "store")
    flags = ["--label_rows", "stage1", "--label_encoding", "hidden"]
    assert main(["label", path, "--label_store", store, *flags]) == 0
    labelled = set(Store.open(store).rows.tolist())
    assert len(labelled) < read_json(tmp_path / "store" / "manifest.json")["rows"]["of"]
    assert main(["salt", path, "--label_store", store]) == 0  # each arm finds its rows
    alone = str(tmp_path / "alone")
    one = named(made, tmp_path, arms={"short": arms["short"]}, kd_ratio=0.0)
    assert main(["label", one, "--label_store", alone, *flags]) == 0
    assert set(Store.open(alone).rows.tolist()) < labelled
    capsys.readouterr()
    none = named(made, tmp_path, arms={"baseline": arms["baseline"]}, kd_ratio=0.0)
    assert main(["label", none, "--label_store", str(tmp_path / "none"), *flags]) == 1
    assert "no arm has a KD stage" in capsys.readouterr().err
