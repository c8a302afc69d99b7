"""`llmkd label` of an ERNIE-Tiny recipe and runs that read it; rows that a function adds."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ernie_kit import SETTINGS, many_labels, numbers, recipe, same, stage, tagged, weights
from task_kit import write_rows
from test_ranks import launch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmkd.cli import LABELLERS, main
from llmkd.files import read_json
from llmkd.labels import Dense, Store
from llmkd.methods import ernie_finish, ernie_label
from llmkd.methods.recipe import method_of

# Shards of 16 rows, batches of 4: of the 48 rows there are three and twelve.
QUICK: dict[str, Any] = {"label_rows_per_shard": 16, "label_batch_size": 4}
# Batches of other rows are padded to other widths, and products of another shape round
# differently. Plain SGD hands that on as it is; Adam would make whole steps of it where a gradient
# is 0 but for rounding (the bias of attention keys).
QUICK |= {"optim": "sgd", "max_grad_norm": 0.0}
QUICK["stage_settings"] = {
    **SETTINGS,
    "teacher": {**SETTINGS["teacher"], "optim": "adamw_torch", "max_grad_norm": 1.0},
}
NEAR = 1e-6


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Runs without the report and the stopwatch, which take as long as the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ernie_finish, "write_distill_report", lambda folder: folder / "report.html")
        patch.setattr(ernie_finish, "compare_latency", lambda *_, **__: {})
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of task-specific distillation with its own teacher, and that teacher's labels."""
    folder = tmp_path_factory.mktemp("ernie")
    path = recipe(folder, stages=["tsd"], **QUICK)
    assert main(["ernie-tiny", path]) == 0
    assert main(["label", path, "--label_store", str(folder / "store")]) == 0
    return folder


def again(made, tmp_path, *flags):
    """The recipe once more in a folder of its own; its exit code and the run's folder."""
    run = tmp_path / "run"
    argv = ["ernie-tiny", str(made / "recipe.yaml"), "--output_dir", str(run), *flags]
    return main(argv), run


def stored(made):
    return ["--label_store", str(made / "store")]


def largest(one, other):
    """Largest difference of two models' weights."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_the_store_holds_what_the_teacher_says_of_each_row(made):
    store = Store.open(made / "store")
    teacher = store.manifest["teacher"]
    assert isinstance(store.encoding, Dense) and store.encoding.per == "row"
    assert store.rows.tolist() == list(range(48)) and len(store.shards) == 3
    assert teacher["label_names"] == ["neg", "pos"] and teacher["id"] == str(made / "run/teacher")
    facts = read_json(stage(made / "run", "tsd") / "run.json")["teacher"]
    assert teacher["fingerprint"] == facts["fingerprint"]
    assert (teacher["dtype"], teacher["autocast"]) == ("auto", None)
    model = AutoModelForSequenceClassification.from_pretrained(made / "run/teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "run/teacher")
    for number, line in enumerate((made / "train.jsonl").read_text().splitlines()):
        with torch.no_grad():
            logits = model(**tokenizer(json.loads(line)["text"], return_tensors="pt")).logits
        target = store.target([number], 1).logits_BTV[0]  # type: ignore[union-attr]
        torch.testing.assert_close(target, logits, atol=1e-5, rtol=1e-5)


def test_training_from_it_is_live_training_up_to_rounding(made, tmp_path):
    code, run = again(made, tmp_path, *stored(made))  # with a teacher of its own, made alike
    assert code == 0 and largest(run, made / "run") <= NEAR
    scores = read_json(run / "eval.json")["task"]
    assert "hard" in scores and "soft" not in scores  # held-out rows have no labels in the store
    (soft,) = read_json(stage(run, "tsd") / "run.json")["soft"]
    assert soft["source"] == str(made / "store")
    assert soft["fingerprint"] == Store.open(made / "store").manifest["key"]
    flags = ["--stages", json.dumps([{"stage": "tsd", "losses": ["latent", "hard"]}])]
    code, without = again(made, tmp_path / "without", *flags)
    assert code == 0 and largest(without, run) > 100 * NEAR  # the labels matter


def test_no_teacher_is_trained_or_loaded_where_all_labels_are_stored(made, tmp_path, monkeypatch):
    live, run = made / "live", tmp_path / "run"
    flags = ["--finetuned_teacher_name_or_path", str(made / "run/teacher")]
    stages = ["--stages", "prediction"]
    argv = ["ernie-tiny", str(made / "recipe.yaml"), *stages, "--output_dir"]
    assert main([*argv, str(live), *flags]) == 0

    from llmkd.teachers import latent

    def refuse(*_, **__):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(latent, "load_model", refuse)
    assert main([*argv, str(run), *stored(made)]) == 0
    assert not (run / "teacher").exists()
    assert largest(run, live) <= NEAR
    assert read_json(stage(run, "prediction") / "run.json")["teacher"] is None


def test_a_stage_of_another_teacher_does_not_read_the_store(made, tmp_path):
    wrong = [{"stage": "prediction", "teacher": "shuffled"}]
    code, run = again(made, tmp_path, "--stages", json.dumps(wrong), *stored(made))
    facts = read_json(stage(run, "prediction") / "run.json")
    assert code == 0 and facts["soft"] == [] and facts["teacher"]["source"].endswith("shuffled")


def test_another_teacher_is_refused_before_anything_trains(made, tmp_path, capsys):
    other = shutil.copytree(made / "run/teacher", tmp_path / "other")
    model = AutoModelForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        model.classifier.weight.mul_(1.5)
    model.save_pretrained(other)
    flags = ["--finetuned_teacher_name_or_path", str(other)]
    code, run = again(made, tmp_path, *stored(made), *flags)
    error = capsys.readouterr().err
    assert code == 1 and "teacher fingerprint: the store has" in error and str(other) in error
    assert not run.exists()


def test_another_teacher_of_the_runs_own_is_refused(made, tmp_path, capsys):
    code, run = again(made, tmp_path, *stored(made), "--seed", "3")
    error = capsys.readouterr().err
    assert code == 1 and "teacher fingerprint: the store has" in error
    assert (run / "teacher").exists() and not (run / "stages").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--max_task_examples", "40"], "rows (text, tokenizer and packing): the store has"),
        (["--task_max_length", "12"], "max_length: the store has 16, this run 12"),
    ],
)
def test_other_settings_are_refused_with_both_values(made, tmp_path, capsys, flags, words):
    code, run = again(made, tmp_path, *stored(made), *flags)
    assert code == 1 and words in capsys.readouterr().err and not run.exists()


def test_info_and_verify(made, tmp_path, capsys):
    assert main(["label", "info", str(made / "store")]) == 0
    assert "neg, pos" in capsys.readouterr().out
    assert main(["label", "verify", str(made / "store"), "--rows", "12"]) == 0
    text = capsys.readouterr().out
    assert "whole" in text and "12 rows: 12 identical to the last bit" in text
    argv = yaml.safe_load((made / "store/recipe.yaml").read_text())
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**argv, "label_rows_per_shard": 8}))
    assert main(["label", "verify", str(made / "store"), "--recipe", str(other)]) == 1
    assert "rows_per_shard: the store has 16, this run 8" in capsys.readouterr().err


def test_verify_finds_a_teacher_that_changed(made, tmp_path, capsys):
    store = shutil.copytree(made / "store", tmp_path / "store")
    settings = yaml.safe_load((store / "recipe.yaml").read_text())
    settings |= {"output_dir": str(tmp_path / "nowhere")}
    (store / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert main(["label", "verify", str(store)]) == 0  # gone: its rows alone
    text = capsys.readouterr().out
    assert "is gone, and is not trained again" in text and "same text, tokenizer" in text
    (store / "recipe.yaml").write_text(yaml.safe_dump({**settings, "max_task_examples": 9}))
    assert main(["label", "verify", str(store)]) == 1
    assert "not the recipe's" in capsys.readouterr().out


def test_killed_it_goes_on_and_ends_the_same(made, tmp_path, monkeypatch, capsys):
    store, ask = tmp_path / "store", ernie_label.Asker.__call__
    asked = []

    def until(asker, rows):
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return ask(asker, rows)

    argv = ["label", str(made / "recipe.yaml"), "--label_store", str(store)]
    monkeypatch.setattr(ernie_label.Asker, "__call__", until)
    assert main(argv) == 130
    (first,) = store.glob("data/*.arrow")
    when = first.stat().st_mtime_ns
    asked.append(0)
    assert main(argv) == 0
    assert first.stat().st_mtime_ns == when and sum(asked) == 24 + 32
    for path in (made / "store/data").iterdir():
        assert (store / "data" / path.name).read_bytes() == path.read_bytes()
    assert (store / "manifest.json").read_text() == (made / "store/manifest.json").read_text()
    capsys.readouterr()
    assert main(argv) == 0 and "is finished already" in capsys.readouterr().out
    assert sum(asked) == 24 + 32


KINDS = {
    "token": (tagged, ["other", "opinion"], "token"),
    "regression": (numbers, ["LABEL_0"], "row"),
    "multi_label": (many_labels, ["long", "neg", "pos"], "row"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task(tmp_path, kind):
    rows, names, per = KINDS[kind]
    write_rows(tmp_path / "train.jsonl", rows())
    write_rows(tmp_path / "dev.jsonl", rows(21, seed=1))
    path = recipe(tmp_path, stages=["prediction"], teacher_floor=-1.0, **QUICK)
    assert main(["ernie-tiny", path]) == 0
    store = ["--label_store", str(tmp_path / "store")]
    assert main(["label", path, *store]) == 0
    manifest = Store.open(tmp_path / "store").manifest
    assert sorted(manifest["teacher"]["label_names"]) == sorted(names)
    assert manifest["encoding"]["per"] == per
    assert main(["label", "verify", *store[1:]]) == 0
    assert main(["ernie-tiny", path, *store, "--output_dir", str(tmp_path / "stored")]) == 0
    assert largest(tmp_path / "stored", tmp_path / "run") <= NEAR


@pytest.fixture
def module(monkeypatch):
    """A module with a function that adds two rows."""
    extra = [{"text": "good mat", "label": "pos"}, {"text": "bad mat", "label": "neg"}]
    made = types.ModuleType("my_words")
    made.more = lambda rows, seed: extra  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_words", made)
    return made


def test_added_rows_join_the_students_stages_alone(tmp_path, module, capsys):
    arms = {"plain": {"augment": None}, "full": {}}
    stages = ["tad", "tsd", "finetune"]
    path = recipe(tmp_path, stages=stages, arms=arms, augment="my_words:more")
    assert main(["ernie-tiny", path]) == 0
    assert "my_words:more adds 2 training rows to 48" in " ".join(capsys.readouterr().out.split())
    seen = {}
    for arm in arms:
        facts = read_json(tmp_path / "run" / arm / "run.json")
        assert facts["augmented"]["function"] == "my_words:more" and facts["augmented"]["rows"] == 2
        assert facts["task"]["train_examples"] == 48
        seen[arm] = [
            read_json(Path(s["folder"]) / "run.json")["data"]["rows"] for s in facts["stages"]
        ]
        assert read_json(tmp_path / "run" / arm / "eval.json")["task"]["examples"] == 21
    assert seen == {"plain": [48, 48, 48], "full": [50, 50, 48]}
    assert read_json(tmp_path / "run/teacher/run.json")["data"]["rows"] == 48
    assert not same(*(weights(tmp_path / "run" / arm) for arm in arms))


def test_added_rows_are_labelled_too(tmp_path, module, capsys):
    path = recipe(tmp_path, stages=["tsd"], augment="my_words:more", **QUICK)
    store = ["--label_store", str(tmp_path / "store")]
    assert main(["ernie-tiny", path]) == 0 and main(["label", path, *store]) == 0
    assert len(Store.open(tmp_path / "store")) == 50
    again = ["ernie-tiny", path, *store, "--output_dir", str(tmp_path / "stored")]
    assert main(again) == 0
    assert largest(tmp_path / "stored", tmp_path / "run") <= NEAR
    capsys.readouterr()
    module.more = lambda rows, seed: rows[:1]
    assert main(["ernie-tiny", path]) == 1
    assert "but its augmented was another" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"augment": "my_words:less"}, "less is not there in the module my_words"),
        (
            {"arms": {"a": {"augment": "my_words:more"}, "b": {"augment": "sys:exit"}}},
            "one function",
        ),
    ],
)
def test_a_function_that_cannot_be_is_refused(tmp_path, module, capsys, changes, words):
    assert main(["ernie-tiny", recipe(tmp_path, **changes)]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_labeller_is_the_one_whose_keys_a_recipe_has(made, tmp_path, capsys):
    from llmkd.methods import ernie_config, salt_config

    kinds = {"salt": salt_config.TYPES, "ernie-tiny": ernie_config.TYPES}
    assert list(kinds) == list(LABELLERS)
    for argv, method in (
        ([str(made / "recipe.yaml")], "ernie-tiny"),
        (["--config", str(made / "recipe.yaml"), "--label_encoding", "topk"], "ernie-tiny"),
        (["--task_dataset", "x", "--teacher_model_name_or_path", "y"], "ernie-tiny"),
        (["--dataset", "x", "--teacher_model_name_or_path", "y"], "salt"),
        (["--kd_ratio=0.5", "--no_packing"], "salt"),
        (["--help"], "salt"),
    ):
        assert method_of(argv, kinds) == method, argv
    assert main(["label", str(made / "recipe.yaml")]) == 1
    assert "where shall the labels go?" in capsys.readouterr().err
    assert main(["label", str(made / "recipe.yaml"), "--help"]) == 0
    assert "--task_dataset" in capsys.readouterr().out
    argv = ["label", str(made / "recipe.yaml"), "--label_store", str(made)]
    assert main(argv) == 1 and "holds something else" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_two_ranks_write_what_one_does(made, tmp_path, config):
    flags = ["--label_store", str(tmp_path / "store")]
    flags += ["--finetuned_teacher_name_or_path", str(made / "run/teacher")]
    flags += ["--output_dir", str(tmp_path / "run")]
    done = launch(f"cpu/{config}", str(made / "recipe.yaml"), *flags, script="run_label.py")
    assert done.returncode == 0, done.stderr[-3000:]
    for path in (made / "store/data").glob("*.arrow"):
        assert (tmp_path / "store/data" / path.name).read_bytes() == path.read_bytes()
