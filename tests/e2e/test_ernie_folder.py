"""The folder of an ERNIE-Tiny run: what is never deleted, who may work in it, where it may lie."""

import fcntl
import gzip
import json
from pathlib import Path

import pytest
from ernie_kit import quick, recipe, refused, save_teacher  # noqa: F401
from task_kit import write_rows
from test_ernie_mistakes import finetuned

from llmkd.cli import main
from llmkd.data.sources import read_table
from llmkd.errors import DataError, RunFolderError
from llmkd.files import read_json
from llmkd.methods.recipe import Recipe, named_paths
from llmkd.methods.run_folder import LOCK, RunFolder, check_writable

OVERWRITE = ("--overwrite_run", "true")
GD = {"stages": ["gd"], "stage_settings": {"gd": {"max_steps": 1}}}
TASKLESS = {**GD, "task_dataset": None, "task_eval_dataset": None}


def old_run(folder, **facts):
    """A finished run of other settings in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    old = {"status": "done", "key": "old", "kind": "ernie-tiny", "settings": {"seed": 3}, **facts}
    (folder / "run.json").write_text(json.dumps(old))


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {LOCK}


def shaped(name):
    return {"student_name_or_path": name, "student_layers": None, "student_hidden_size": None}


# key of the error: (settings, what is put into the run's folder)
INSIDE = {
    "teacher_model_name_or_path": (
        lambda at: {"teacher_model_name_or_path": str(at)},
        lambda at: save_teacher(at),
    ),
    "finetuned_teacher_name_or_path": (
        lambda at: {"finetuned_teacher_name_or_path": str(at)},
        lambda at: finetuned(at),
    ),
    "student_name_or_path": (lambda at: shaped(str(at)), lambda at: save_teacher(at, layers=2)),
    "arms.b.student_name_or_path": (
        lambda at: {
            "student_layers": None,
            "student_hidden_size": None,
            "arms": {"a": {}, "b": {"student_name_or_path": str(at)}},
        },
        lambda at: save_teacher(at, layers=2),
    ),
    "teachers[1].model_name_or_path": (
        lambda at: {"teachers": [{"model_name_or_path": str(at.parent.parent / "g")}] * 1
                    + [{"model_name_or_path": str(at)}]},
        lambda at: (finetuned(at), finetuned(at.parent.parent / "g")),
    ),
    "dataset": (
        lambda at: {"dataset": str(at)},
        lambda at: (at.mkdir(), write_rows(at / "x.jsonl", [{"text": "a b c d"}] * 30)),
    ),
    "label_store": (lambda at: {"label_store": str(at), **GD}, lambda at: at.mkdir()),
    "general_stages": (lambda at: {"general_stages": str(at), **GD}, lambda at: at.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("key", INSIDE)
def test_nothing_that_the_run_reads_is_overwritten(tmp_path, capsys, key):
    settings, put = INSIDE[key]
    inner = tmp_path / "run" / "inner"
    old_run(tmp_path / "run")
    put(inner)
    before = files(tmp_path / "run")
    error = refused(recipe(tmp_path, **settings(inner)), capsys, *OVERWRITE)
    assert f"{key}: '{inner}': lies in output_dir" in error and "another --output_dir" in error
    assert files(tmp_path / "run") == before


def test_links_lead_nowhere_else(tmp_path, capsys):
    old_run(tmp_path / "real")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    finetuned(tmp_path / "real" / "given")
    given = {"finetuned_teacher_name_or_path": str(tmp_path / "real" / "given")}
    assert "lies in output_dir" in refused(recipe(tmp_path, **given), capsys, *OVERWRITE)
    assert (tmp_path / "real" / "given" / "model.safetensors").is_file()


def test_an_old_run_goes_with_all_but_the_lock(tmp_path):
    run = RunFolder(tmp_path / "run", main=True)
    old_run(run.path / "stages" / "gd-1")
    outside = tmp_path / "model"
    outside.mkdir()
    (outside / "x").write_text("mine")
    (run.path / "link").symlink_to(outside)
    with run.held():
        run.clear({"dataset": str(outside)})
        assert [p.name for p in run.path.iterdir()] == [LOCK]
    assert (outside / "x").read_text() == "mine"


def test_named_paths_of_recipe_and_arms(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    a, b, c = (str(tmp_path / name) for name in "abc")
    settings = {
        "dataset": a,
        "label_store": "owner/name",
        "dataset_mixture": json.dumps([{"id": b, "weight": 1}]),
        "arms": {"x": {"teachers": [{"label_store": c}]}, "y": None},
    }
    found = named_paths(Recipe(settings, settings, ()), ("dataset", "label_store"))
    assert found == {"dataset": a, "dataset_mixture[0].id": b, "arms.x.teachers[0].label_store": c}


def test_one_process_at_a_time(tmp_path, capsys):
    run = tmp_path / "run"
    old_run(run)
    with (run / LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        error = refused(recipe(tmp_path, **TASKLESS), capsys, *OVERWRITE)
        assert files(run) == {"run.json"}
    assert "output_dir" in error and "another process works on a run in this folder now" in error


def test_a_run_that_came_in_between_is_seen(tmp_path, capsys, monkeypatch):
    run, held = tmp_path / "run", RunFolder.held

    def late(self):
        old_run(run)  # after the first look, before the lock
        return held(self)

    monkeypatch.setattr(RunFolder, "held", late)
    assert "holds another recipe's run" in refused(recipe(tmp_path, **TASKLESS), capsys)
    assert files(run) == {"run.json"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"general_stages": "$/general.jsonl"}, "general_stages: '$/general.jsonl': is a file"),
        ({"general_stages": "/proc/gd"}, "general_stages: '/proc/gd': cannot be written to (/proc"),
        ({"output_dir": "/proc/run"}, "output_dir: '/proc/run': cannot be written to (/proc"),
        ({"output_dir": "$/general.jsonl/x"}, "output_dir: '$/general.jsonl/x': lies below a file"),
    ],
)
def test_folders_that_cannot_be(tmp_path, capsys, changes, words):
    changes = {key: value.replace("$", str(tmp_path)) for key, value in changes.items()}
    error = refused(recipe(tmp_path, **GD, **changes), capsys)
    assert words.replace("$", str(tmp_path)) in error
    assert not (tmp_path / "run").exists()


def test_a_folder_is_tried_without_a_trace(tmp_path):
    check_writable("output_dir", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunFolderError, match=r"output_dir: .*: is a file"):
        (tmp_path / "a").write_text("")
        check_writable("output_dir", tmp_path / "a")


def test_a_store_that_no_stage_reads_has_to_be_there(tmp_path, capsys):
    error = refused(recipe(tmp_path, **GD, label_store="./no-store"), capsys)
    assert "label_store: './no-store': no such folder" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("again", [False, True])
def test_a_head_that_later_stages_leave_alone(tmp_path, capsys, again):
    stages = ["tsd", "tad", *(["finetune"] if again else [])]
    error = recipe(tmp_path, stages=stages, max_length=64, task_max_length=64)
    capsys.readouterr()
    assert main(["ernie-tiny", error]) == 1  # beyond the window: nothing is trained for this test
    said = capsys.readouterr().out
    assert ("tad comes after tsd and does not train the task head" in said) is not again


@pytest.mark.usefixtures("quick")
def test_the_floor_is_no_part_of_the_run_and_resume_finds_the_general_stages(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = {"teacher": {"max_steps": 1}, "gd": {"max_steps": 1}, "ged": {"max_steps": 1}}
    path = recipe(
        tmp_path,
        stages=["gd", "ged"],
        stage_settings=settings,
        general_stages="shared",
        teacher_floor=1,
    )
    error = refused(path, capsys)
    assert "teacher_floor: 1" in error and "--overwrite_run true" in error
    trained = (tmp_path / "run" / "teacher" / "model.safetensors").stat().st_mtime_ns
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert main(["ernie-tiny", path, "--teacher_floor", "0"]) == 0
    assert (tmp_path / "run" / "teacher" / "model.safetensors").stat().st_mtime_ns == trained
    monkeypatch.chdir(other)
    (tmp_path / "run" / "model.safetensors").unlink()
    facts = read_json(tmp_path / "run" / "run.json")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert "gd: reused" in capsys.readouterr().out
    assert not list(other.iterdir()) and len(list((tmp_path / "shared").glob("gd-*"))) == 1


@pytest.mark.parametrize(
    "name, text, streaming",
    [
        ("x.jsonl", b"", False),
        ("x.jsonl", b"", True),
        ("x.csv", b"", False),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), False),
        ("blank.jsonl", b"\n \n", False),
    ],
)
def test_an_empty_file_is_called_empty(tmp_path, name, text, streaming):
    path = Path(tmp_path / name)
    path.write_bytes(text)
    with pytest.raises(DataError, match=f"task_dataset: .*{name}': is empty"):
        read_table(str(path), "train", key="task_dataset", streaming=streaming)


def test_empty_files_of_a_folder_are_named(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.raises(DataError, match=r"is empty \(a\.jsonl, b\.jsonl\)"):
        read_table(str(tmp_path), "train")


def test_push_looks_at_the_folder_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(["push", str(tmp_path / "none"), "me/x"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    old_run(tmp_path / "run")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "run" / name).write_text("{}")
    for repo, words in (("me/x", "needs a token"), ("a/b/c", "<you>/<name>")):
        assert main(["push", str(tmp_path / "run"), repo]) == 1
        error = capsys.readouterr().err
        assert words in error and "--push_to_hub" not in error and "--hub_model_id" not in error
