"""Text in: formats, splits, mixtures, and what is refused."""

import gzip
import json

import numpy as np
import pytest
from conftest import sentences
from datasets import Dataset, IterableDataset

from llmkd.data import DataConfig, load_documents
from llmkd.data.sources import _broken_line
from llmkd.data.stdlib_corpus import stdlib_documents
from llmkd.errors import DataError, LlmkdError, MissingFileError, RecipeError


def write(path, texts, column="text"):
    lines = [json.dumps({column: text}) + "\n" for text in texts]
    path.write_text("".join(lines))
    return path


def test_stdlib_is_shuffled_by_seed_split_by_file_and_free_of_tests():
    rows = stdlib_documents(0)
    assert len(rows) > 300
    assert rows == stdlib_documents(0) and rows != stdlib_documents(1)
    assert sorted(r["id"] for r in rows) == sorted(r["id"] for r in stdlib_documents(1))
    assert not [r["id"] for r in rows if "/test/" in r["id"] or "site-packages" in r["id"]]
    split = load_documents(DataConfig())
    train, held_out = set(split.train["id"]), set(split.held_out["id"])
    assert not train & held_out and len(train | held_out) == len(rows)
    assert len(held_out) == round(0.05 * len(rows))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt", "jsonl.gz", "folder"])
def test_local_formats_give_the_same_documents(tmp_path, kind):
    texts = sentences(40)
    path = tmp_path / f"rows.{kind}"
    table = Dataset.from_dict({"text": texts})
    if kind == "csv":
        table.to_csv(path)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "txt":
        path.write_text("\n\n".join(text * 80 for text in texts))
        texts = [text * 80 for text in texts]
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(write(tmp_path / "x", texts).read_bytes()))
    elif kind == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        write(path / "a.jsonl", texts[:15]), write(path / "b.jsonl", texts[15:])
    else:
        write(path, texts)
    split = load_documents(DataConfig(dataset=str(path), eval_fraction=0.25))
    joined = "".join(sorted([*split.train["text"], *split.held_out["text"]]))
    assert sorted(joined) == sorted("".join(texts)) or kind == "txt"
    assert len(split.held_out) >= 1 and len(split.train) > len(split.held_out)


def test_named_held_out_text_is_used_whole(tmp_path):
    train, held_out = (
        write(tmp_path / "a.jsonl", sentences(9)),
        write(tmp_path / "b.jsonl", sentences(4, seed=3)),
    )
    split = load_documents(DataConfig(dataset=str(train), eval_dataset=str(held_out)))
    assert len(split.train) == 9 and split.held_out["text"] == sentences(4, seed=3)


def test_mixture_takes_the_shares_asked_for(tmp_path):
    write(tmp_path / "a.jsonl", [f"a {i}" for i in range(400)])
    write(tmp_path / "b.jsonl", [f"b {i}" for i in range(400)], column="body")
    parts = [
        {"id": str(tmp_path / "a.jsonl"), "weight": 3},
        {"id": str(tmp_path / "b.jsonl"), "weight": 1, "text_column": "body"},
    ]
    split = load_documents(DataConfig(dataset_mixture=parts))
    firsts = [text[0] for text in split.train["text"]]
    assert 0.68 < firsts.count("a") / len(firsts) < 0.82


def test_a_stream_holds_out_its_first_documents(tmp_path):
    path = write(tmp_path / "a.jsonl", sentences(20))
    split = load_documents(DataConfig(dataset=str(path), streaming=True, max_eval_rows=4))
    assert isinstance(split.train, IterableDataset)
    assert split.held_out["text"] == sentences(20)[:4]
    assert [row["text"] for row in split.train] == sentences(20)[4:]


BAD = {
    "a path to nowhere": ({"dataset": "./nowhere.jsonl"}, MissingFileError, "no such file"),
    "a wrong column": ({"text_column": "content"}, DataError, "it has text"),
    "a share of nothing": ({"eval_fraction": 0.0}, RecipeError, "eval_fraction: 0.0"),
    "an unknown packing": ({"packing_strategy": "tight"}, RecipeError, "bfd_split"),
    "a row of one token": ({"max_length": 1}, RecipeError, "max_length: 1"),
    "a mixture without ids": ({"dataset_mixture": [{"weight": 1}]}, RecipeError, "needs `id`"),
}


@pytest.mark.parametrize("what", BAD)
def test_mistakes_name_key_and_way_out(tmp_path, what):
    settings, kind, words = BAD[what]
    path = write(tmp_path / "rows.jsonl", sentences(5))
    with pytest.raises(kind, match=words) as caught:
        load_documents(DataConfig(**{"dataset": str(path), **settings}))
    assert isinstance(caught.value, LlmkdError)


@pytest.mark.parametrize(
    "rows, words",
    [([""] * 5, "every row is empty"), (["one document"], "at least 2"), ([3, 4], "int there")],
)
def test_empty_single_and_wrong_columns(tmp_path, rows, words):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=words):
        load_documents(DataConfig(dataset=str(path)))


def test_broken_json_is_one_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match="cannot be read as json"):
        load_documents(DataConfig(dataset=str(path)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_line_is_named(tmp_path, packed):
    text = '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n'
    path = tmp_path / ("rows.jsonl" + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(DataError, match=rf"{path.name}, line 3: Expecting .*text.*b"):
        load_documents(DataConfig(dataset=str(path)))


def test_a_list_over_many_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps([{"text": "a b"}, {"text": "c d"}], indent=1))
    assert _broken_line([path]) is None
    path.write_text('[\n {"text": "a b"},\n {"text": }\n]')
    with pytest.raises(DataError, match=r"rows\.json, Expecting value: line 3 column 11"):
        load_documents(DataConfig(dataset=str(path)))


def test_a_column_of_two_kinds_is_one_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"text_column: .*holds int there, not text"):
        load_documents(DataConfig(dataset=str(path)))


@pytest.mark.parametrize("place", [20, 100_000])
def test_a_damaged_gz_is_one_error(tmp_path, place):
    make = np.random.default_rng(0)
    rows = "".join(json.dumps({"text": make.bytes(60).hex()}) + "\n" for _ in range(4000))
    packed = bytearray(gzip.compress(rows.encode()))
    for bit in range(64):
        packed[place + bit] ^= 255
    (tmp_path / "rows.jsonl.gz").write_bytes(bytes(packed))
    with pytest.raises(DataError, match=r"dataset: .*cannot be read as json"):
        load_documents(DataConfig(dataset=str(tmp_path / "rows.jsonl.gz")))


def test_a_line_nested_without_end_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text": ' * 200_000 + "\n")
    assert "rows.jsonl, line 2: " in str(_broken_line([path]))


def test_folders_of_several_kinds_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", ["x"]), (tmp_path / "b.txt").write_text("y")
    with pytest.raises(DataError, match="several kinds"):
        load_documents(DataConfig(dataset=str(tmp_path)))
