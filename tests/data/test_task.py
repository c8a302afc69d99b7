"""A labelled task in: every type, splits and samples, and what is refused."""

from collections import Counter

import pytest
from conftest import sentences
from datasets import ClassLabel, Dataset, Features, List, Value
from task_kit import SEP, bert_tokenizer, ids, write_rows

from llmkd.data import TaskConfig, load_task, load_tokenizer, tokenizer_digest
from llmkd.data.task import same_text
from llmkd.errors import DataError, LlmkdError, MissingFileError, RecipeError

TEXTS = sentences(60, seed=5)


def silent(_: str) -> None:
    pass


def load(path, say=silent, tokenizer=None, **settings):
    config = TaskConfig(task_dataset=str(path), **settings)
    return load_task(config, tokenizer or bert_tokenizer(), say)


def task(tmp_path, labels, texts=TEXTS, name="rows.jsonl", **more):
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=False)]
    for column, values in more.items():
        rows = [{**row, column: value} for row, value in zip(rows, values, strict=True)]
    return write_rows(tmp_path / name, rows)


def parquet(path, label, labels, texts=TEXTS):
    features = Features({"text": Value("string"), "label": label})
    rows = {"text": texts[: len(labels)], "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def test_a_row_is_worked_out_by_hand(tmp_path):
    path = task(tmp_path, ["pos", "neg"] * 2, ["good cats", "Bad film", "great", "poor"])
    rows = load(path, task_eval_fraction=0.5)
    assert rows.kind == "single_label" and rows.label_names == ("neg", "pos") and rows.labels == 2
    found = {tuple(row["input_ids"]): row for row in [*rows.train, *rows.held_out]}
    good = found[ids("[CLS] good cat ##s [SEP]")]
    assert good["labels"] == 1 and good["attention_mask"] == [1] * 5
    assert good["token_type_ids"] == [0] * 5
    assert found[ids("[CLS] bad film [SEP]")]["labels"] == 0
    assert rows.train["row"] == rows.held_out["row"] == [0, 1]  # one of each class held out
    assert sorted(rows.train["labels"]) == sorted(rows.held_out["labels"]) == [0, 1]
    names = ["input_ids", "attention_mask", "token_type_ids", "labels", "row"]
    assert sorted(rows.train.column_names) == sorted(names)  # no text is left
    assert rows.texts == {same_text(t) for t in ("good cats", "bad film", "great", "poor")}


def test_a_pair_is_one_row_with_two_token_types(tmp_path):
    path = task(tmp_path, [0, 1, 1, 0], ["cat"] * 4, other=["dogs run", "a", "the", "mat"])
    said = []
    rows = load(path, said.append, task_text_pair_column="other", task_eval_fraction=0.5)
    found = {tuple(row["input_ids"]): row for row in [*rows.train, *rows.held_out]}
    row = found[ids("[CLS] cat [SEP] dogs run [SEP]")]
    assert row["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert same_text("cat") in rows.texts and same_text("dogs run") in rows.texts
    assert not [line for line in said if "warning" in line]  # one text alone makes no leak


CASES = {
    "text": (["b", "a"] * 9, "single_label", ("a", "b"), {0, 1}),
    "whole numbers": ([1, 0, 2] * 6, "single_label", ("0", "1", "2"), {0, 1, 2}),
    "numbers with gaps": ([7, 3, -1] * 6, "single_label", ("-1", "3", "7"), {0, 1, 2}),
    "truth values": ([True, False] * 9, "single_label", ("0", "1"), {0, 1}),
    "fractions": ([0.5, 2.25] * 9, "regression", (), {0.5, 2.25}),
}


@pytest.mark.parametrize("what", CASES)
def test_auto_reads_the_type_from_the_labels(tmp_path, what):
    labels, kind, names, values = CASES[what]
    rows = load(task(tmp_path, labels))
    assert (rows.kind, rows.label_names) == (kind, names)
    assert set(rows.train["labels"]) | set(rows.held_out["labels"]) == values
    assert rows.labels == (len(names) or 1)
    assert isinstance(rows.train["labels"][0], float if kind == "regression" else int)


def test_a_class_label_keeps_its_names_and_order(tmp_path):
    path = parquet(tmp_path / "r.parquet", ClassLabel(names=["z", "y", "x"]), [0, 2, 1] * 6)
    rows = load(path)
    assert rows.label_names == ("z", "y", "x") and rows.labels == 3
    labels = {tuple(row["input_ids"]): row["labels"] for row in [*rows.train, *rows.held_out]}
    tokenizer = bert_tokenizer()
    assert [labels[tuple(tokenizer(text)["input_ids"])] for text in TEXTS[:3]] == [0, 2, 1]


def test_the_type_named_rules_where_the_columns_allow_it(tmp_path):
    path = task(tmp_path, [0, 1, 3] * 6)
    assert load(path, task_type="regression").train["labels"][0] in (0.0, 1.0, 3.0)
    floats = task(tmp_path, [0.0, 1.0] * 9, name="f.jsonl")
    assert load(floats, task_type="single_label").label_names == ("0", "1")
    said = []
    assert load(floats, said.append).kind == "regression"
    assert any("--task_type single_label" in line for line in said)


def test_multi_label_lists_names_or_vectors(tmp_path):
    listed = [["b", "c"], [], ["a"]] * 6
    rows = load(task(tmp_path, listed))
    assert (rows.kind, rows.label_names) == ("multi_label", ("a", "b", "c"))
    assert Counter(map(tuple, [*rows.train["labels"], *rows.held_out["labels"]])) == {
        (0.0, 1.0, 1.0): 6, (0.0, 0.0, 0.0): 6, (1.0, 0.0, 0.0): 6
    }  # fmt: skip
    vectors = load(task(tmp_path, [[0, 1, 1], [0, 0, 1]] * 9))
    assert vectors.kind == "multi_label" and vectors.label_names == ("0", "1", "2")
    assert set(map(tuple, vectors.train["labels"])) == {(0.0, 1.0, 1.0), (0.0, 0.0, 1.0)}
    numbers = load(task(tmp_path, [[2], [0, 1]] * 9))  # of unequal length: numbers of classes
    assert set(map(tuple, numbers.train["labels"])) == {(0.0, 0.0, 1.0), (1.0, 1.0, 0.0)}


def test_token_labels_stand_on_the_first_token_of_each_word(tmp_path):
    words = [["the", "cats", "running", "home"], ["dogs", "sat"]] * 5
    labels = [["O", "A", "V", "O"], ["A", "V"]] * 5
    rows = load(task(tmp_path, labels, words))
    assert rows.kind == "token" and rows.label_names == ("A", "O", "V")
    long = next(row for row in rows.train if len(row["input_ids"]) == 9)
    assert long["input_ids"] == list(ids("[CLS] the cat ##s run ##n ##ing home [SEP]"))
    assert long["labels"] == [-100, 1, 0, -100, 2, -100, -100, 1, -100]
    assert same_text("dogs sat") in rows.texts


def test_words_keep_their_blanks_with_a_byte_level_tokenizer(tmp_path, tokenizer):
    words = [["the", "cat", "sat"], ["two", "dogs"]] * 5
    labels = [[0, 1, 1], [0, 1]] * 5
    rows = load(task(tmp_path, labels, words), tokenizer=tokenizer)
    assert "token_type_ids" not in rows.train.column_names
    decoded = {tokenizer.decode(row) for row in rows.train["input_ids"]}
    assert decoded == {"the cat sat", "two dogs"}


def test_words_of_unlabelled_tokens_stay_ignored(tmp_path):
    labels = [[0, -100], [1, 0]] * 5
    rows = load(task(tmp_path, labels, [["dogs", "sat"], ["cat", "ran"]] * 5))
    assert rows.label_names == ("0", "1")
    assert [-100, 0, -100, -100] in rows.train["labels"]


def test_the_split_keeps_shares_and_hangs_on_its_seed(tmp_path):
    labels = ["a"] * 36 + ["b"] * 18 + ["c"] * 5 + ["d"]
    path = task(tmp_path, labels)
    # 60 rows, a tenth is 6: quotas 3.6, 1.8, 0.5 and 0.1; whole parts 3 and 1; the two rows
    # that are left go to the largest rests, b (.8) and a (.6).
    rows = load(path)
    assert Counter(rows.held_out["labels"]) == {0: 4, 1: 2}
    assert len(rows.train) == 54 and set(rows.train["labels"]) == {0, 1, 2, 3}
    again, other = load(path), load(path, task_split_seed=1)
    assert again.held_out["input_ids"] == rows.held_out["input_ids"]
    assert again.fingerprint == rows.fingerprint != other.fingerprint
    assert other.held_out["input_ids"] != rows.held_out["input_ids"]
    half = load(path, task_eval_fraction=0.5)
    assert Counter(half.held_out["labels"]) == {0: 18, 1: 9, 2: 3}
    assert 3 in half.train["labels"]  # a class of one row is never held out


def test_labels_of_one_row_are_trained_on_not_held_out(tmp_path):
    labels = [[f"only {i}", "shared"] for i in range(10)] + [["shared"]] * 10
    rows = load(task(tmp_path, labels), task_eval_fraction=0.5)
    shared = rows.label_names.index("shared")
    assert all(sum(label) == 1 and label[shared] == 1 for label in rows.held_out["labels"])
    assert 1 <= len(rows.held_out) <= 10


def test_samples_of_each_class_are_nested_and_hang_on_their_seed(tmp_path):
    path = task(tmp_path, [0] * 30 + [1] * 26 + [2] * 4)
    said = []

    def kept(count, seed=0):
        rows = load(path, said.append, task_examples_per_class=count, task_sample_seed=seed)
        return rows, set(map(tuple, rows.train["input_ids"]))

    few, few_texts = kept(3)
    many, many_texts = kept(10)
    assert Counter(few.train["labels"]) == {0: 3, 1: 3, 2: 3}
    assert Counter(many.train["labels"]) == {0: 10, 1: 10, 2: 4}
    assert few_texts < many_texts and kept(3)[1] == few_texts != kept(3, seed=1)[1]
    assert few.held_out["input_ids"] == many.held_out["input_ids"]
    assert few.texts == many.texts and len(few.texts) == len(set(TEXTS))
    assert any("fewer than 10" in line and "2 4" in line for line in said)
    assert not any("fewer than 3" in line for line in said)


def test_caps_are_random_but_fixed_and_names_outlive_them(tmp_path):
    path = task(tmp_path, sorted("abcdef" * 10))
    rows = load(path, max_task_examples=12, max_task_eval_examples=3)
    assert len(rows.train) == 12 and len(rows.held_out) == 3 and rows.labels == 6
    assert len(set(rows.train["labels"])) > 2  # not the first twelve, which are all "a"
    assert rows.train["row"] == list(range(12))
    other = load(path, max_task_examples=12, max_task_eval_examples=3, task_sample_seed=7)
    assert other.train["input_ids"] != rows.train["input_ids"]
    assert other.held_out["input_ids"] == rows.held_out["input_ids"]  # arms stay comparable


def test_named_held_out_rows_come_from_a_split_or_another_file(tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    task(folder, ["a", "b"] * 9, TEXTS[:18], "train.jsonl")
    other = task(folder, ["b", "a"] * 2, TEXTS[18:22], "validation.jsonl")
    for settings in ({"task_eval_split": "validation"}, {"task_eval_dataset": other}):
        rows = load(folder, **settings)
        assert len(rows.train) == 18 and rows.held_out["labels"] == [1, 0, 1, 0]
    assert len(load(folder).train) == 16  # of train.jsonl alone


def test_rows_of_both_splits_are_counted_and_said(tmp_path):
    train = task(tmp_path, ["a", "b"] * 9, TEXTS[:18])
    copies = [TEXTS[0].upper(), "  " + TEXTS[3], TEXTS[30]]
    held_out = task(tmp_path, ["a", "b", "a"], copies, "dev.jsonl")
    said = []
    load(train, said.append, task_eval_dataset=held_out)
    assert any(line.startswith("warning: 2 of 3 held-out rows") for line in said)


def test_long_rows_are_refused_or_cut(tmp_path):
    path = task(tmp_path, [0, 1] * 4, [*["cat " * 20, "dogs " * 30], *TEXTS[:6]])
    with pytest.raises(DataError, match=r"task_max_length: 16: .* the longest \d+") as caught:
        load(path, task_max_length=16)
    assert "--task_truncate true" in str(caught.value)
    said = []
    rows = load(path, said.append, task_max_length=16, task_truncate=True)
    lengths = [len(row) for row in [*rows.train["input_ids"], *rows.held_out["input_ids"]]]
    assert max(lengths) == 16 and lengths.count(16) >= 2
    assert all(row[-1] == SEP for row in rows.train["input_ids"])
    assert any("cut to 16 tokens" in line for line in said)
    assert load(path, task_max_length=32).fingerprint != load(path).fingerprint


def test_cut_words_take_their_labels_along(tmp_path):
    path = task(tmp_path, [[0, 1] * 5] * 4, [["cats", "sat"] * 5] * 4)
    rows = load(path, task_max_length=7, task_truncate=True)
    assert rows.train["labels"][0] == [-100, 0, -100, 1, 0, -100, -100]


NAN = float("nan")
REFUSED = {
    "one class": ([1] * 6, {}, "a task of one class"),
    "a missing label": (["a", None, "b"], {}, r"row 1 has no label"),
    "no label at all": ([None] * 3, {}, "every row is without a label"),
    "a target that is no number": ([0.5, NAN, 1.5], {}, "row 1 is nan"),
    "an infinite target": ([0.5, 1.5, float("inf")], {}, "row 2 is inf"),
    "a fraction as class": ([0.5, 1.0], {"task_type": "single_label"}, "row 0 is 0.5"),
    "text as target": (["a", "b"], {"task_type": "regression"}, "needs numbers"),
    "labels for text": (["a", "b"], {"task_type": "multi_label"}, "needs a list"),
    "lists for a class": ([["a"], ["b"]], {"task_type": "single_label"}, "needs one label"),
    "a missing label in a list": ([["a"], ["b", None]], {}, "row 1 has no label"),
    "a repeated label": ([[3, 3], [1]], {}, "row 0 repeats a label"),
    "words that are text": ([["a"], ["b"]], {"task_type": "token"}, "no list of words"),
    "an unlabelled training split": ([-1] * 6, {}, "6 of 6 rows have no label"),
    "samples per target": ([0.5, 1.5], {"task_examples_per_class": 1}, "needs a single_label"),
    "a wrong label column": (["a", "b"], {"task_label_column": "y"}, "it has text, label"),
    "a wrong text column": (["a", "b"], {"task_text_column": "s"}, "--task_text_column text"),
    "a wrong pair column": (["a", "b"], {"task_text_pair_column": "t"}, "task_text_pair_column"),
    "text that is a number": ([1.5, 2.5], {"task_text_column": "label",
                                           "task_label_column": "text"}, "not text"),
    "classes of one row": (["a", "b"], {"task_eval_fraction": 0.5}, "can be held out"),
    "one class left": (list("ab") * 9, {"max_task_examples": 1}, "rows of one class only"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_task_is_refused(tmp_path, what):
    labels, settings, words = REFUSED[what]
    with pytest.raises(LlmkdError, match=words) as caught:
        load(task(tmp_path, labels), **settings)
    assert ": " in str(caught.value)


@pytest.mark.parametrize(
    "texts, words",
    [(["fine", "  "], "row 1 has no text"), (["fine", None], "row 1 has no text")],
)
def test_rows_without_text_are_named(tmp_path, texts, words):
    with pytest.raises(DataError, match=f"task_text_column: 'text': train: {words}"):
        load(task(tmp_path, ["a", "b"], texts))
    with pytest.raises(DataError, match=f"task_text_pair_column: 'other': train: {words}"):
        load(task(tmp_path, ["a", "b"], other=texts), task_text_pair_column="other")


@pytest.mark.parametrize(
    "words, labels, problem",
    [
        ([["a", "the"], []], [[0, 1], []], "row 1 has no words"),
        ([["a"], ["a", None]], [[0], [0, 1]], "row 1 has a word that is None"),
        ([["a", "the"], ["a", "the"]], [[0, 1], [0]], "row 1 has 2 words but 1 labels"),
    ],
)
def test_words_and_labels_must_agree(tmp_path, words, labels, problem):
    with pytest.raises(DataError, match=problem):
        load(task(tmp_path, labels, words))


def test_lists_of_text_with_one_label_are_no_task(tmp_path):
    with pytest.raises(DataError, match="holds lists; a single_label task has one text"):
        load(task(tmp_path, ["a", "b"], [["x"], ["y"]]))


def test_held_out_labels_must_be_known_to_training(tmp_path):
    train = task(tmp_path, ["a", "b"] * 9)
    for labels in (["a", "z"], [0, 1]):
        held_out = task(tmp_path, labels, name="dev.jsonl")
        with pytest.raises(DataError, match="label sets differ") as caught:
            load(train, task_eval_dataset=held_out)
        assert repr(labels[1]) in str(caught.value) and "'a', 'b'" in str(caught.value)
    listed = task(tmp_path, [["a"], ["b"]], name="dev.jsonl")
    with pytest.raises(DataError, match="holds a list in each row"):
        load(train, task_eval_dataset=listed)


@pytest.mark.parametrize("kind", ["numbers", "class label", "targets", "tags"])
def test_unlabelled_held_out_rows_are_refused_with_the_way_out(tmp_path, kind):
    label = {
        "numbers": Value("int64"),
        "class label": ClassLabel(names=["neg", "pos"]),
        "targets": Value("double"),
        "tags": List(ClassLabel(names=["neg", "pos"])),
    }[kind]
    train = [[0, 1]] * 4 if kind == "tags" else [0, 1] * 4
    test = [[-1]] * 3 if kind == "tags" else [-1] * 3
    folder = tmp_path / "glue"
    folder.mkdir()
    parquet(folder / "train.parquet", label, train)
    parquet(folder / "test.parquet", label, test, TEXTS[20:])
    with pytest.raises(DataError, match="task_eval_split: 'test': 3 of 3 rows") as caught:
        load(folder, task_eval_split="test")
    assert "--task_eval_split validation" in str(caught.value)


BAD = {
    "a share of nothing": {"task_eval_fraction": 0.0},
    "an unknown type": {"task_type": "ranking"},
    "an unknown metric": {"task_metric": "bleu"},
    "a tiny window": {"task_max_length": 3},
    "no example": {"task_examples_per_class": 0},
    "no row": {"max_task_examples": 0},
    "no held-out row": {"max_task_eval_examples": 0},
    "one column twice": {"task_label_column": "text"},
    "text without labels": {"task_dataset": "stdlib"},
    "the training split": {"task_eval_split": "train"},
    "classes of targets": {"task_examples_per_class": 3, "task_type": "regression"},
    "a pair of word lists": {"task_text_pair_column": "b", "task_type": "token"},
}


@pytest.mark.parametrize("what", BAD)
def test_recipes_that_cannot_be_are_refused_at_once(what):
    with pytest.raises(RecipeError, match=f"^{next(iter(BAD[what]))}: "):
        TaskConfig(**BAD[what])


def test_each_type_has_its_metric():
    assert TaskConfig().metric("single_label") == "accuracy"
    assert TaskConfig().metric("regression") == "pearson"
    assert TaskConfig(task_metric="matthews").metric("single_label") == "matthews"


def test_paths_and_splits_that_are_not_there_name_the_task_keys(tmp_path):
    with pytest.raises(RecipeError, match="task_dataset: None"):
        load_task(TaskConfig(), bert_tokenizer(), silent)
    with pytest.raises(MissingFileError, match=r"task_dataset: '\./nowhere.jsonl'"):
        load("./nowhere.jsonl")
    path = task(tmp_path, ["a", "b"])
    with pytest.raises(MissingFileError, match=r"task_eval_dataset: '\./nowhere.jsonl'"):
        load(path, task_eval_dataset="./nowhere.jsonl")
    with pytest.raises(DataError, match="task_train_split: 'training'"):
        load(path, task_train_split="training")
    with pytest.raises(DataError, match="--task_eval_dataset"):
        load(path, task_eval_split="dev")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(DataError, match=r"task_dataset: .*cannot be read as json"):
        load(tmp_path / "broken.jsonl")


def test_an_encoders_tokenizer_needs_no_end(tmp_path):
    bert_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path), needs_end=False)
    assert tokenizer_digest(loaded) == tokenizer_digest(bert_tokenizer())


def test_columns_may_have_each_others_names(tmp_path):
    rows = [{"label": text, "text": i % 2, "other": 1} for i, text in enumerate(TEXTS[:8])]
    path = write_rows(tmp_path / "swapped.jsonl", rows)
    found = load(path, task_text_column="label", task_label_column="text")
    assert found.label_names == ("0", "1") and len(found.train) == 7


def test_the_fingerprint_is_of_texts_labels_and_tokenizer(tmp_path, tokenizer):
    path = task(tmp_path, ["a", "b"] * 9)
    one = load(path).fingerprint
    assert load(task(tmp_path, ["a", "b"] * 9, name="copy.jsonl")).fingerprint == one
    assert load(task(tmp_path, ["b", "a"] * 9, name="other.jsonl")).fingerprint != one
    assert load(path, tokenizer=tokenizer).fingerprint != one
    changed = task(tmp_path, ["a", "b"] * 9, [*TEXTS[:17], "a cat"], "changed.jsonl")
    assert load(changed).fingerprint != one
