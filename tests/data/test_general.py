"""General text in pieces: nothing lost but short leftovers, and never the task's own text."""

import itertools

import pytest
from conftest import sentences
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from task_kit import CLS, SEP, bert_tokenizer, ids, write_rows

from llmkd.data import (
    DataConfig,
    Documents,
    TaskCollator,
    TaskConfig,
    check_not_the_task,
    general_rows,
    load_documents,
    load_task,
)
from llmkd.data.general import SHORTEST, pieces, special_tokens
from llmkd.errors import DataError, RecipeError


def documents(texts, held_out=("the cat sat",)):
    train, rest = ({"text": list(part)} for part in (texts, held_out))
    return Documents(Dataset.from_dict(train), Dataset.from_dict(rest))


def silent(_):
    pass


def rows_of(docs, tokenizer=None, say=silent, max_length=12, max_eval_rows=None):
    tokenizer = tokenizer or bert_tokenizer()
    return general_rows(
        docs, tokenizer, max_length=max_length, max_eval_rows=max_eval_rows, say=say
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=90), st.integers(1, 30))
def test_pieces_together_are_the_document_but_for_a_short_leftover(tokens, room):
    found = pieces(tokens, room)
    together = list(itertools.chain.from_iterable(found))
    assert together == tokens[: len(together)]
    dropped = len(tokens) - len(together)
    assert dropped < min(SHORTEST, room) and (dropped == 0 or found)
    assert all(len(piece) == room for piece in found[:-1])
    assert all(0 < len(piece) <= room for piece in found)
    assert len(found) < 2 or len(found[-1]) >= min(SHORTEST, room)


def test_pieces_are_worked_out_by_hand():
    count = list(range(28))
    assert pieces(count, 10) == [count[:10], count[10:20], count[20:]]  # 8 are enough
    assert pieces(count[:27], 10) == [count[:10], count[10:20]]  # 7 are not
    assert pieces([1, 2], 10) == [[1, 2]]  # but all there is
    assert pieces(count[:12], 4) == [count[:4], count[4:8], count[8:12]]  # whole, so no leftover
    assert pieces([], 10) == []


def test_rows_have_special_tokens_and_no_labels():
    rows = rows_of(documents(["the cats sat", "a mat " * 9]))
    assert rows.train.column_names == ["input_ids", "row"]
    assert rows.train["input_ids"] == [
        [CLS, *ids("the cat ##s sat"), SEP],
        [CLS, *ids("a mat " * 5), SEP],  # 10 of its 18 tokens; documents are not joined
        [CLS, *ids("a mat " * 4), SEP],
    ]
    assert rows.train["row"] == [0, 1, 2] and rows.train_tokens == 6 + 12 + 10
    batch = TaskCollator(0)(list(rows.train))
    assert batch["attention_mask"].sum().item() == 28 and "labels" not in batch


def test_a_causal_tokenizer_adds_what_it_adds(tokenizer):
    assert special_tokens(tokenizer) == ([], [])
    assert special_tokens(bert_tokenizer()) == ([CLS], [SEP])
    texts = sentences(8)
    rows = rows_of(documents(texts), tokenizer, max_length=16)
    assert max(map(len, rows.train["input_ids"])) <= 16
    first = tokenizer.decode(rows.train["input_ids"][0])
    assert first and texts[0].startswith(first)


def test_held_out_rows_are_capped():
    docs = documents(["the cat"], sentences(9))
    assert len(rows_of(docs, max_length=64, max_eval_rows=4).held_out) == 4
    assert rows_of(docs, max_eval_rows=4).fingerprint != rows_of(docs).fingerprint


def test_rows_come_from_the_cache_until_anything_changes(tokenizer):
    docs, said = documents(sentences(6)), []
    first = rows_of(docs, say=said.append)
    assert not said
    again = rows_of(docs, say=said.append)
    assert len(said) == 2 and all("reused" in line for line in said)
    assert again.train["input_ids"] == first.train["input_ids"]
    assert again.fingerprint == first.fingerprint and again.train_tokens == first.train_tokens
    others = [
        rows_of(docs, max_length=16, say=said.append),
        rows_of(docs, tokenizer, say=said.append),
        rows_of(documents(sentences(6, seed=1)), say=said.append),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert len(said) == 3  # the held-out half of the last is unchanged


def test_a_stream_gives_the_same_numbered_rows(tmp_path):
    texts = sentences(20)
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    docs = load_documents(DataConfig(dataset=path, streaming=True, max_eval_rows=4))
    rows = rows_of(docs)
    assert isinstance(rows.train, IterableDataset) and rows.train_tokens is None
    stored = rows_of(documents(texts[4:])).train
    assert list(rows.train) == list(stored)


def test_no_room_and_no_tokens_are_refused():
    with pytest.raises(RecipeError, match="max_length: 2: 2 special tokens leave no room"):
        rows_of(documents(["the cat"]), max_length=2)
    with pytest.raises(DataError, match="make no token at all"):
        rows_of(documents(["\u200b"]))


@pytest.fixture
def task(tmp_path):
    texts = [f"{text} film" for text in sentences(40)]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    config = TaskConfig(
        task_dataset=write_rows(tmp_path / "task.jsonl", rows), task_examples_per_class=2
    )
    return texts, load_task(config, bert_tokenizer(), silent)


def general(task_texts, others):
    return documents([*task_texts, *(f"{text} home" for text in sentences(others, seed=9))])


def test_the_tasks_text_is_no_general_text(task):
    texts, rows = task  # also what the sample of four training rows left out
    with pytest.raises(DataError, match=r"^dataset: 'some/text': general text is the task's text"):
        check_not_the_task(general(texts, 0), rows, "some/text")
    with pytest.raises(DataError, match="20 of 40 documents"):
        check_not_the_task(general(texts[:20], 20), rows, "some/text")
    check_not_the_task(general(texts[:19], 21), rows, "some/text")


def test_neither_case_nor_blanks_nor_lines_nor_a_stream_hide_the_tasks_text(task):
    texts, rows = task
    changed = documents([f" {text.upper()}\t" for text in texts])
    lines = documents(["\n\n".join(texts[i : i + 10]) for i in range(0, 40, 10)])
    stream = Documents(changed.train.to_iterable_dataset(), changed.held_out)
    for docs in (changed, lines, stream):
        with pytest.raises(DataError, match="GED would be TAD"):
            check_not_the_task(docs, rows, "some/text")


def test_a_sample_is_taken_evenly(task, monkeypatch):
    texts, rows = task
    monkeypatch.setattr("llmkd.data.general.SAMPLE", 10)
    # its first quarter is the task's: of ten documents looked at, two or three
    check_not_the_task(general(texts[:10], 30), rows, "some/text")
    with pytest.raises(DataError, match="of 10 documents"):
        check_not_the_task(general(texts[:30], 10), rows, "some/text")
