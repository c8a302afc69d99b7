"""Documents to rows to batches: nothing lost, nothing seen across documents, nothing made twice."""

import numpy as np
import pytest
import torch
from conftest import sentences, tiny_llama
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.data import (
    DataConfig,
    Documents,
    PackedCollator,
    prepare_rows,
    tokenizer_digest,
    train_bpe,
    training_order,
)
from llmkd.data.collator import CountableTargets
from llmkd.errors import DataError, RecipeError


def documents(count=30):
    texts = sentences(count)
    texts[3] = " ".join(texts)  # one longer than a row
    return Documents(Dataset.from_dict({"text": texts}), Dataset.from_dict({"text": texts[:4]}))


def test_packing_keeps_every_token_and_ends_every_document(tokenizer):
    docs = documents()
    rows = prepare_rows(docs, tokenizer, DataConfig(max_length=32))
    packed = sorted(t for ids in rows.train["input_ids"] for t in ids)
    end = tokenizer.eos_token_id
    expected = sorted(
        t for text in docs.train["text"] for t in [*tokenizer(text)["input_ids"], end]
    )
    assert packed == expected and rows.train_tokens == len(expected)
    assert all(sum(r["seq_lengths"]) == len(r["input_ids"]) <= 32 for r in rows.train)
    assert rows.eval_bytes == sum(len(t.encode()) for t in docs.held_out["text"])


def test_rows_come_from_the_cache_until_anything_changes(tokenizer):
    said = []
    docs = documents()
    first = prepare_rows(docs, tokenizer, DataConfig(max_length=32), said.append)
    assert said == []
    again = prepare_rows(docs, tokenizer, DataConfig(max_length=32), said.append)
    assert len(said) == 2 and all("reused" in line for line in said)
    assert again.fingerprint == first.fingerprint and again.train[0] == first.train[0]
    other = prepare_rows(docs, tokenizer, DataConfig(max_length=24), said.append)
    assert len(said) == 2 and other.fingerprint != first.fingerprint


def test_rows_too_long_are_refused_or_cut(tokenizer):
    docs = documents()
    with pytest.raises(DataError, match=r"(?s)1 of 4 rows are longer.*--packing.*--truncate"):
        prepare_rows(docs, tokenizer, DataConfig(max_length=64, packing=False))
    rows = prepare_rows(docs, tokenizer, DataConfig(max_length=64, packing=False, truncate=True))
    assert max(len(ids) for ids in rows.train["input_ids"]) == 64 and len(rows.train) == 30


def test_packed_documents_neither_see_nor_predict_each_other():
    model = tiny_llama(3).eval()
    one, two, three = [5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]
    packed = {"input_ids": one + two + three, "seq_lengths": [4, 3, 5]}
    batch = PackedCollator(0, pad_to_multiple_of=16)([packed])
    assert batch["labels"][0].tolist()[:12] == [-100, 6, 7, 8, -100, 10, 11, -100, 13, 14, 15, 16]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3]
    with torch.no_grad():
        # with a key-value cache transformers ignores where documents begin; trainers switch it off
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        together = model(**inputs, use_cache=False).logits[0]
        alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in (one, two, three)]
    torch.testing.assert_close(together[:12], torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_left_padding_predicts_nothing_from_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    batch = {"labels": torch.tensor([[-100, -100, 7, 8], [1, 2, 3, 4]]), "attention_mask": mask}
    labels = CountableTargets(lambda rows: dict(batch))([])["labels"]
    assert labels.tolist() == [[-100, -100, -100, 8], [-100, 2, 3, 4]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 99), st.integers(0, 60))
def test_order_uses_the_selected_first_and_replays_nothing_early(rows, needed, seed, chosen):
    first = np.random.default_rng(seed).permutation(rows)[: min(chosen, rows)]
    order = training_order(rows, needed, seed, first)
    assert len(order) == needed and order.min() >= 0 and order.max() < rows
    head = order[: min(needed, len(first))]
    assert set(head) <= set(first.tolist()) or len(first) == 0
    epoch = order[: min(needed, rows)]
    assert len(set(epoch.tolist())) == len(epoch)
    assert np.array_equal(order, training_order(rows, needed, seed, first))


def test_order_without_selection_depends_on_the_seed_alone():
    assert not np.array_equal(training_order(50, 50, 0), training_order(50, 50, 1))
    assert np.array_equal(training_order(50, 80, 0)[:50], training_order(50, 50, 0))


def test_bpe_round_trips_and_has_the_size_asked_for(tokenizer, tmp_path):
    assert len(tokenizer) == 300
    text = "def f(x):\n\treturn 'Zażółć' + 语言  # \u00a0"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(RecipeError, match="tokenizer_vocab_size: 200"):
        train_bpe(["x"], 200, tmp_path)


def test_tokenizer_digest_ignores_calls_but_not_vocabulary(tokenizer, tmp_path):
    before = tokenizer_digest(tokenizer)
    tokenizer("the cat", truncation=True, max_length=2, padding="max_length")
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(train_bpe(sentences(), 301, tmp_path)) != before
