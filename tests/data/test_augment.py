"""Extra rows of a user's function: what it is given, what it may return, where they go."""

import sys
import types

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from task_kit import bert_tokenizer, ids, write_rows

from llmkd.data import TaskConfig, load_task
from llmkd.data.augment import find_augment
from llmkd.errors import DataError, RecipeError

ROWS = [
    {"text": text, "label": label}
    for text, label in [
        ("good cats", "pos"),
        ("bad film", "neg"),
        ("great", "pos"),
        ("poor", "neg"),
    ]
]
HELD_OUT = [{"text": "the cat", "label": "pos"}, {"text": "dogs run", "label": "neg"}]


@pytest.fixture
def module(monkeypatch):
    """A module that is installed, as far as Python can tell."""
    made = types.ModuleType("my_words")
    monkeypatch.setitem(sys.modules, "my_words", made)
    return made


def load(tmp_path, function=None, rows=ROWS, held_out=HELD_OUT, say=None, seed=7, **settings):
    config = TaskConfig(
        task_dataset=write_rows(tmp_path / "rows.jsonl", rows),
        task_eval_dataset=write_rows(tmp_path / "held.jsonl", held_out),
        **settings,
    )
    name = None if function is None else "my_words:more"
    if function is not None:
        sys.modules["my_words"].more = function  # type: ignore[attr-defined]
    return load_task(config, bert_tokenizer(), say or (lambda _: None), augment=name, seed=seed)


def test_rows_are_added_behind_the_training_rows(tmp_path, module):
    given, said = [], []

    def more(rows, seed):
        given.append((rows, seed))
        return [{"text": "great film", "label": "pos"}, {"text": "poor cats", "label": "neg"}]

    rows = load(tmp_path, more, say=said.append)
    assert given == [(ROWS, 7)]  # once, label names as the dataset has them
    assert rows.augmented is not None
    assert [tuple(row) for row in rows.augmented["input_ids"]] == [
        ids("[CLS] great film [SEP]"), ids("[CLS] poor cat ##s [SEP]")
    ]  # fmt: skip
    assert rows.augmented["labels"][:] == [1, 0] and rows.augmented["row"][:] == [4, 5]
    assert len(rows.train) == 4 and len(rows.held_out) == 2
    assert rows.taught["row"][:] == [0, 1, 2, 3, 4, 5]
    assert rows.taught[:4] == rows.train[:] and rows.taught[4:] == rows.augmented[:]
    assert "task: my_words:more adds 2 training rows to 4" in said


def test_held_out_rows_and_the_task_itself_stay_the_same(tmp_path, module):
    plain = load(tmp_path)
    more = load(tmp_path, lambda rows, seed: rows[:1])
    assert plain.augmented is None and plain.taught is plain.train
    assert plain.taught_fingerprint == plain.fingerprint == more.fingerprint
    assert more.held_out[:] == plain.held_out[:] and more.train[:] == plain.train[:]


def test_the_fingerprint_follows_the_rows_that_are_added(tmp_path, module):
    def word(text, label="pos"):
        return lambda rows, seed: [{"text": text, "label": label}]

    found = [
        load(tmp_path, function).taught_fingerprint
        for function in (None, word("cat"), word("cat"), word("mat"), word("cat", "neg"))
    ]
    assert found[1] == found[2] and len(set(found)) == 4


def test_no_rows_are_no_augmentation(tmp_path, module):
    rows = load(tmp_path, lambda rows, seed: [])
    assert rows.augmented is None and rows.taught_fingerprint == rows.fingerprint


def test_only_rows_that_are_kept_are_given(tmp_path, module):
    given = []
    load(tmp_path, lambda rows, seed: given.extend(rows) or [], task_examples_per_class=1)
    assert sorted(row["label"] for row in given) == ["neg", "pos"]


def echo(rows, seed):
    return rows


def test_every_kind_of_label_comes_back_as_it_went(tmp_path, module):
    cases = {
        "regression": [{"text": "cat", "label": 0.5}, {"text": "mat", "label": 2.25}],
        "multi_label": [{"text": "cat", "label": ["a", "b"]}, {"text": "mat", "label": []}],
        "token": [
            {"text": ["the", "cats"], "label": ["x", "y"]},
            {"text": ["dogs"], "label": ["x"]},
        ],
        "single_label": [{"text": "cat", "label": 7}, {"text": "mat", "label": 3}],
    }
    for kind, rows in cases.items():
        given = []
        found = load(
            tmp_path, lambda r, _, given=given: given.extend(r) or r, rows=rows, held_out=rows[:1]
        )
        assert found.kind == kind and given == rows
        assert found.augmented is not None
        assert found.augmented["labels"][:] == found.train["labels"][:]
        assert found.taught.features == found.train.features


def test_numbers_of_a_regression_may_be_whole(tmp_path, module):
    rows = [{"text": "cat", "label": 0.5}, {"text": "mat", "label": 2.25}]
    found = load(tmp_path, lambda *_: [{"text": "a", "label": 3}], rows=rows, held_out=rows[:1])
    assert found.augmented["labels"][:] == [3.0] and len(found.taught) == 3


def test_a_class_label_is_given_by_its_name(tmp_path, module):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"text": ["cat", "mat", "the", "a"], "label": [0, 1, 1, 0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    given = []
    module.more = lambda rows, seed: given.extend(rows) or [{"text": "dogs", "label": "yes"}]
    config = TaskConfig(task_dataset=str(tmp_path / "rows.parquet"), task_eval_fraction=0.5)
    found = load_task(config, bert_tokenizer(), lambda _: None, augment="my_words:more")
    assert {row["label"] for row in given} == {"no", "yes"}
    assert found.augmented["labels"][:] == [1]


def test_pairs_have_both_texts(tmp_path, module):
    rows = [{**row, "other": "the mat"} for row in ROWS]
    given = []

    def more(rows, seed):
        given.extend(rows)
        return [{"text": "cat", "text_pair": "a mat", "label": "pos"}]

    found = load(tmp_path, more, rows=rows, held_out=rows[:2], task_text_pair_column="other")
    assert given[0] == {"text": "good cats", "text_pair": "the mat", "label": "pos"}
    assert tuple(found.augmented[0]["input_ids"]) == ids("[CLS] cat [SEP] a mat [SEP]")
    assert found.augmented[0]["token_type_ids"] == [0, 0, 0, 1, 1, 1]


def test_rows_that_are_held_out_are_warned_of(tmp_path, module):
    said = []
    load(tmp_path, lambda *_: [{"text": "The  cat", "label": "pos"}], say=said.append)
    assert any("1 of 2 held-out rows are training rows too" in line for line in said)


def test_rows_too_long_are_cut_or_refused_like_any(tmp_path, module):
    def long(rows, seed):
        return [{"text": "cat " * 9, "label": "pos"}]

    with pytest.raises(DataError, match="task_max_length: 6"):
        load(tmp_path, long, task_max_length=6)
    rows = load(tmp_path, long, task_max_length=6, task_truncate=True)
    assert len(rows.augmented[0]["input_ids"]) == 6


@pytest.mark.parametrize(
    "made, words",
    [
        (None, "returned NoneType, not a list"),
        ([{"text": "a", "label": "pos"}, "cat"], "row 1 it returned has str"),
        ([{"text": "a"}], r"row 0 it returned has \['text'\], not \['label', 'text'\]"),
        ([{"text": "a", "label": "pos", "text_pair": "b"}], "has .*text_pair.*, not"),
        ([{"text": " ", "label": "pos"}], "has no text: ' '"),
        ([{"text": ["a"], "label": "pos"}], "has no text"),
        ([{"text": "a", "label": "positive"}], "label 'positive'; the task knows neg, pos"),
        ([{"text": "a", "label": 1}], "label 1; the task knows"),
        ([{"text": "a", "label": ["pos"]}], r"label \['pos'\]; the task knows"),
    ],
)
def test_what_is_no_row_is_named(tmp_path, module, made, words):
    with pytest.raises(DataError, match=f"augment: 'my_words:more': .*{words}"):
        load(tmp_path, lambda rows, seed: made)


@pytest.mark.parametrize(
    "kind, label, words",
    [
        ("token", ["x"], "2 words but 1 labels"),
        ("token", "x", "a token task has a list"),
        ("token", ["x", "z"], "label 'z'"),
        ("regression", "high", "no finite number"),
        ("regression", float("nan"), "no finite number"),
    ],
)
def test_labels_of_other_kinds_are_checked_too(tmp_path, module, kind, label, words):
    rows = [{"text": ["the", "cat"], "label": ["x", "y"]}] * 2
    text: object = ["a", "mat"]
    if kind == "regression":
        rows, text = [{"text": "cat", "label": 0.5}, {"text": "mat", "label": 1.5}], "a mat"
    with pytest.raises(DataError, match=words):
        load(tmp_path, lambda *_: [{"text": text, "label": label}], rows=rows, held_out=rows[:1])


@pytest.mark.parametrize(
    "name, words",
    [
        ("my_words", "names no function"),
        ("my_words:", "names no function"),
        ("no_such_module_x:f", "cannot be imported: No module named 'no_such_module_x'"),
        ("my_words:nothing", "nothing is not there in the module my_words"),
        ("my_words:__name__", "__name__ is no function"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(module, name, words):
    with pytest.raises(RecipeError, match=f"augment: '{name}': .*{words}"):
        find_augment(name)
