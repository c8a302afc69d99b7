"""Every mistake in an ERNIE-Tiny recipe is one error, before anything trains or is written."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import sentences
from ernie_kit import numbers, recipe, refused, reviews, save_teacher, tagged
from latent_kit import bert_config
from safetensors.torch import load_file, save_file
from task_kit import bert_tokenizer, write_rows
from transformers import BertForSequenceClassification, BertTokenizer

from llmkd.files import read_json

RUN = "run"


def other_tokenizer(folder):
    """A teacher's folder whose tokenizer knows other words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(folder)


def finetuned(folder, names=("neg", "pos"), **shape):
    """A model with a head for these classes; its weights are new."""
    config = bert_config(**shape)
    config.id2label = dict(enumerate(names))
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)


def three_classes(folder):
    rows = [{**row, "label": "abc"[i % 3]} for i, row in enumerate(reviews())]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "dev.jsonl", rows[:6])


def other_kind(rows):
    def write(folder):
        write_rows(folder / "train.jsonl", rows())
        write_rows(folder / "dev.jsonl", rows(9, seed=1))

    return write


def unknown_dev_label(folder):
    write_rows(folder / "dev.jsonl", [{"text": "a cat", "label": "mixed"}])


def text_of_the_task(folder):
    write_rows(folder / "general.jsonl", [{"text": row["text"]} for row in reviews()])


def nan_teacher(folder):
    save_teacher(folder / "bert")
    broken(folder / "bert" / "model.safetensors")


def broken(path):
    """A weight file with one number that is none."""
    found = load_file(path)
    name = next(name for name in found if name.endswith("layer.0.output.dense.weight"))
    found[name][0, 0] = float("nan")
    save_file(found, path, metadata={"format": "pt"})


TASKLESS = {"task_dataset": None, "task_eval_dataset": None}
FINETUNED = "finetuned_teacher_name_or_path"
# what: (changed keys, words of the error in order, how the folder is prepared)
MISTAKES = {
    "fine-tuned teacher of another tokenizer": (
        {FINETUNED: "$/given"},
        [FINETUNED, "/given'", "has another tokenizer", "take models of one family"],
        lambda at: (finetuned(at / "given"), other_tokenizer(at / "given")),
    ),
    "student of another tokenizer": (
        {"student_name_or_path": "$/own", "student_layers": None, "student_hidden_size": None},
        ["student_name_or_path", "/own'", "has another tokenizer", "take models of one family"],
        lambda at: (save_teacher(at / "own", layers=2), other_tokenizer(at / "own")),
    ),
    "an arm's student of another tokenizer": (
        {
            "student_layers": None,
            "student_hidden_size": None,
            "arms": {"a": {}, "b": {"student_name_or_path": "$/own"}},
        },
        ["student_name_or_path", "/own'", "has another tokenizer"],
        lambda at: (save_teacher(at / "own", layers=2), other_tokenizer(at / "own")),
    ),
    "fine-tuned teacher without a head": (
        {FINETUNED: "$/given"},
        [FINETUNED, "/given'", "has no head for the task (BertModel)", "leave it out"],
        lambda at: save_teacher(at / "given"),
    ),
    "fine-tuned teacher of other classes": (
        {FINETUNED: "$/given"},
        [FINETUNED, "/given'", "has the classes pos, neg, the task neg, pos", "same order"],
        lambda at: finetuned(at / "given", ("pos", "neg")),
    ),
    "fine-tuned teacher of another width": (
        {FINETUNED: "$/given"},
        [FINETUNED, "/given'", "is 8 wide and teacher_model_name_or_path 16"],
        lambda at: finetuned(at / "given", width=8),
    ),
    "fine-tuned teacher that is not there": (
        {FINETUNED: "$/givn"},
        [FINETUNED, "/givn'", "no such folder", "did you mean", "/given?"],
        lambda at: finetuned(at / "given"),
    ),
    "fine-tuned teacher of NaN": (
        {FINETUNED: "$/given"},
        [FINETUNED, "/given'", "bert.encoder.layer.0.output.dense.weight holds NaN"],
        lambda at: (finetuned(at / "given"), broken(at / "given" / "model.safetensors")),
    ),
    "one of several teachers that is not there": (
        {"teachers": [{"model_name_or_path": "$/given"}, {"model_name_or_path": "$/none"}]},
        ["teachers[1]", "/none'", "no such folder"],
        lambda at: finetuned(at / "given"),
    ),
    "pretrained teacher of NaN": (
        {},
        ["teacher_model_name_or_path", "layer.0.output.dense.weight holds NaN", "download"],
        nan_teacher,
    ),
    "no teacher": (
        {"teacher_model_name_or_path": None},
        ["teacher_model_name_or_path: None: no teacher is named", "a Hub id or a folder"],
        None,
    ),
    "dev labels that nobody trains": (
        {},
        ["task_eval_dataset", "label sets differ", "'mixed'", "the training labels are"],
        unknown_dev_label,
    ),
    "uneven layers": (
        {"student_layers": 3},
        ["layer_map: 'uniform'", "4 teacher layers", "among 3", "--layer_map last", "1, 2, 4"],
        None,
    ),
    "deeper student": (
        {"student_layers": 5},
        ["student_layers: 5", "must lie in 1..4"],
        None,
    ),
    "text of the task": (
        {},
        ["dataset", "general text is the task's text: GED would be TAD", "--dataset"],
        text_of_the_task,
    ),
    "general rows beyond the window": (
        {"max_length": 64},
        ["max_length: 64", "longer than the window of 32", "--max_length 32"],
        None,
    ),
    "task rows beyond the window": (
        {"task_max_length": 64},
        ["task_max_length: 64", "longer than the window of 32", "--task_max_length 32"],
        None,
    ),
    "rows beyond task_max_length": (
        {"task_max_length": 6},
        ["task_max_length: 6", "rows are longer", "--task_max_length 11", "--task_truncate true"],
        None,
    ),
    "unknown stage": (
        {"stages": ["gd", "tadd"]},
        ["stages: 'tadd': no such stage", "did you mean 'tad'?", "known: gd, ged"],
        None,
    ),
    "unknown key of a stage": (
        {"stages": [{"stage": "gd", "max_stepz": 3}]},
        ["stages.gd.max_stepz: 3: no such training key", "did you mean 'max_steps'?"],
        None,
    ),
    "settings of no stage": (
        {"stage_settings": {"tadd": {"max_steps": 3}}},
        ["stage_settings.tadd", "no such stage", "did you mean 'tad'?"],
        None,
    ),
    "key of a stage that all share": (
        {"stage_settings": {"gd": {"seed": 3}}},
        ["stage_settings.gd.seed: 3: is one for all stages"],
        None,
    ),
    "unknown loss": (
        {"stages": [{"stage": "tsd", "losses": ["latent", "sotf"]}]},
        ["stages.tsd.losses", "'sotf'", "of latent, soft, hard"],
        None,
    ),
    "value of a stage": (
        {"stage_settings": {"tsd": {"soft": "kld"}}},
        ["stage tsd", "soft: 'kld'", "known: kl, mse, nkd"],
        None,
    ),
    "soft loss to a pretrained teacher": (
        {"stages": [{"stage": "tsd", "teacher": "pretrained"}]},
        ["stages.tsd: 'pretrained'", "no soft labels", "teacher: finetuned"],
        None,
    ),
    "latent loss of nobody": (
        {"stages": [{"stage": "gd", "teacher": "none"}]},
        ["stages.gd: 'none': nobody teaches, and latent needs a teacher"],
        None,
    ),
    "labels of general text": (
        {"stages": [{"stage": "gd", "losses": ["hard"]}]},
        ["stages.gd: ['hard']", "general text has no labels", "losses: [latent]"],
        None,
    ),
    "task stages without a task": (
        TASKLESS,
        ["task_dataset: None", "stage ged needs a task", "--task_dataset", "--stages gd"],
        None,
    ),
    "key that arms share": (
        {"arms": {"a": {"max_length": 8}}},
        ["arms.a.max_length: 8: is one for all arms"],
        None,
    ),
    "mistyped key of an arm": (
        {"arms": {"a": {"student_layer": 8}}},
        ["arms.a.student_layer: 8: no such key", "did you mean 'student_layers'?"],
        None,
    ),
    "mistyped key": (
        {"student_layer": 2},
        ["student_layer", "did you mean 'student_layers'?"],
        None,
    ),
    "adapter": (
        {"use_peft": True},
        ["use_peft: True", "an adapter needs a trained base", "llmkd salt"],
        None,
    ),
    "other heads": (
        {"student_heads": 4},
        ["student_heads: 4", "the teacher has 2", "--student_heads 2", "--attn none"],
        None,
    ),
    "unknown key of the fine-tuning": (
        {"stage_settings": {"teacher": {"max_stepz": 3}}},
        ["stage_settings.teacher.max_stepz: 3", "did you mean 'max_steps'?"],
        None,
    ),
    "no stages": ({"stages": []}, ["stages: []: must be a list of stages"], None),
    "layer map of a stage": (
        {"stage_settings": {"tad": {"layer_map": [4, 2]}}},
        ["layer_map: [4, 2]", "must ascend"],
        None,
    ),
    "stream without an end": (
        {"streaming": True, "stage_settings": {}},
        ["max_steps: -1", "a stream has no length", "--max_steps"],
        None,
    ),
    "unknown metric": (
        {"task_metric": "acuracy"},
        ["task_metric: 'acuracy': unknown", "known: accuracy"],
        None,
    ),
    "no projection": (
        {"projection": "none"},
        ["projection: 'none'", "the student is 8 wide, the teacher 16", "--projection shared"],
        None,
    ),
    "metric of another kind": (
        {"task_metric": "pearson"},
        ["task_metric: 'pearson'", "kind single_label has no such score", "accuracy"],
        None,
    ),
    "metric of two classes for three": (
        {"task_metric": "f1"},
        ["task_metric: 'f1'", "this task has 3 classes", "task_metric: macro_f1"],
        three_classes,
    ),
    "soft loss of another kind": (
        {"soft": "nkd"},
        ["soft: 'nkd'", "needs one gold class; the task is regression", "mse"],
        other_kind(numbers),
    ),
    "shuffled tokens": (
        {"stages": ["tsd", {"stage": "ged", "teacher": "shuffled"}]},
        ["stages: 'shuffled'", "cannot change their tokens' labels"],
        other_kind(tagged),
    ),
    "store and teachers": (
        {"label_store": "$/s", "teachers": [{"model_name_or_path": "$/given"}]},
        ["label_store", "and teachers exclude each other"],
        None,
    ),
    "store that is not there": (
        {"label_store": "./no-store"},
        ["label_store: './no-store'", "no such folder"],
        None,
    ),
    "student of a shorter window": (
        {
            "student_name_or_path": "$/own",
            "student_layers": None,
            "student_hidden_size": None,
        },
        ["max_length: 16", "longer than the window of 8 tokens of student_name_or_path"],
        lambda at: short_student(at / "own"),
    ),
    "no latent part": (
        {"attn": "none", "hidden": False},
        ["attn: 'none': and hidden false leave no latent loss", "--hidden true"],
        None,
    ),
    "checkpointing of maps": (
        {"gradient_checkpointing": True},
        ["gradient_checkpointing: True", "--attn none"],
        None,
    ),
    "dropout": ({"student_dropout": 1.0}, ["student_dropout: 1.0", "must lie in [0, 1)"], None),
}


def short_student(folder):
    config = bert_config(layers=2, width=8)
    config.max_position_embeddings = 8
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)


def filled(value, folder):
    """Settings with `$` as the test's folder."""
    if isinstance(value, dict):
        return {k: filled(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v, folder) for v in value]
    return value.replace("$", str(folder)) if isinstance(value, str) else value


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_error_and_no_model(tmp_path, capsys, what):
    changes, words, prepare = MISTAKES[what]
    if prepare is not None:
        prepare(tmp_path)
    error = refused(recipe(tmp_path, **filled(changes, tmp_path)), capsys)
    at = 0
    for word in words:
        assert word in error[at:], error
        at = error.index(word, at)
    assert not (tmp_path / RUN).exists() and not (tmp_path / "ernie-tiny-general").exists()


def test_no_room_is_said_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert "GiB free, the run needs about" in refused(recipe(tmp_path, stages=["gd"]), capsys)
    assert not list((tmp_path / "ernie-tiny-general").rglob("*.safetensors"))


def test_a_folder_with_a_strangers_model(tmp_path, capsys):
    run = tmp_path / RUN
    run.mkdir()
    (run / "model.safetensors").write_bytes(b"mine")
    error = refused(recipe(tmp_path), capsys, "--overwrite_run", "true")
    assert "holds a model that no llmkd run wrote" in error
    assert (run / "model.safetensors").read_bytes() == b"mine"


def test_overwriting_waits_until_the_new_input_is_checked(tmp_path, capsys):
    run = tmp_path / RUN
    run.mkdir(parents=True)
    old = {"status": "done", "key": "old", "kind": "ernie-tiny", "settings": {"seed": 3}}
    (run / "run.json").write_text(json.dumps(old))
    write_rows(tmp_path / "general.jsonl", [{"text": t} for t in sentences(20)])
    error = refused(recipe(tmp_path, max_length=64), capsys, "--overwrite_run", "true")
    assert "longer than the window" in error
    assert read_json(run / "run.json") == old
