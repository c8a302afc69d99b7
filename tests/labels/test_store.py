"""Reading: the right label at the right place, for the right tokens, and what is refused."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from datasets import load_dataset
from labels_kit import LENGTHS, PLAIN, VOCAB, plan, tokens_of, values_of, write_store

from llmkd.errors import DataError, MissingFileError
from llmkd.labels import (
    Dense,
    Hidden,
    LowRank,
    Sampled,
    Store,
    TopK,
    check_matches,
    describe,
    fit_lowrank,
    positions_of,
    row_digest,
    verify_checksums,
)
from llmkd.types import Head, HiddenTarget, SparseTarget

WIDTH = 16


def head_of(width=WIDTH):
    return Head(torch.randn(VOCAB, width, generator=torch.Generator().manual_seed(0)), scale=0.5)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "s", plan())


@pytest.fixture
def copy(sampled, tmp_path):
    return shutil.copytree(sampled, tmp_path / "copy")


def batch_of(rows, width=12):
    ids, positions = np.zeros((2, len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : LENGTHS[row]] = tokens_of(row)
        positions[b] = positions_of([LENGTHS[row], width - LENGTHS[row]])
    return torch.tensor(ids), torch.tensor(positions)


def test_labels_lie_on_the_token_before_the_one_they_predict(sampled):
    store, encoding = Store.open(sampled), Sampled(20, VOCAB)
    target = store.target([5, 0, 6], 12, starts=[6, 0, 1])
    assert isinstance(target, SparseTarget) and target.tail == "renorm"
    assert target.ids_BTK.shape[:2] == (3, 12)
    for b, (row, start) in enumerate(((5, 6), (0, 0), (6, 1))):
        columns = encoding.encode(values_of(row), row=row)
        layout = store._layout([row], LENGTHS[row], None)
        ids, probs = encoding.decode([columns], layout)
        at = (b, slice(start, start + LENGTHS[row]))
        width = probs.shape[-1]
        assert torch.equal(target.probs_BTK[at][:, :width], probs[0])
        used = probs[0] > 0
        assert torch.equal(target.ids_BTK[at][:, :width][used], ids[0][used])
    assert target.probs_BTK[0, :6].sum() == 0 and target.probs_BTK[1, 7:].sum() == 0
    assert store.target([1], 5, tail="smooth").tail == "smooth"
    assert len(store) == 7 and store.rows.tolist() == list(range(7))


def test_hidden_in_float32_is_bitwise_and_brings_its_head(tmp_path):
    folder = write_store(
        tmp_path / "s", plan(Hidden(WIDTH, VOCAB, "float32")), head_of(), width=WIDTH
    )
    store = Store.open(folder)
    target = store.target([3, 2], 9)
    assert isinstance(target, HiddenTarget) and target.shared == VOCAB
    assert torch.equal(target.hidden_BTH[0, :4], values_of(3, WIDTH))
    assert torch.equal(target.hidden_BTH[1], values_of(2, WIDTH))
    assert torch.equal(target.head.weight, head_of().weight) and target.head.scale == 0.5
    moved = Head(target.head.weight.clone())
    assert store.target([1], 9, head=moved).head is moved
    assert verify_checksums(store) == []
    assert "head.safetensors" in dict(describe(store))


def test_low_rank_reads_with_the_narrower_head(tmp_path):
    sample = torch.cat([values_of(row, WIDTH) for row in range(7)])
    fit = fit_lowrank(sample, head_of(), 15)
    folder = write_store(tmp_path / "s", plan(LowRank(15, VOCAB, "float32")), fit=fit, width=WIDTH)
    target = Store.open(folder).target([4], 8)
    assert isinstance(target, HiddenTarget) and target.head.weight.shape == (VOCAB, 15)
    p = head_of()(values_of(4, WIDTH)).softmax(-1)
    q = target.dense().logits_BTV[0].softmax(-1)
    assert (p - q).abs().max() < 0.05


def test_rows_in_any_order_and_only_some_of_them(tmp_path):
    rows = np.array([6, 1, 4])
    store = Store.open(write_store(tmp_path / "s", plan(TopK(5, VOCAB), rows=rows)))
    assert store.rows.tolist() == [1, 4, 6] and store.length(4) == LENGTHS[4]
    ids = store.target([4], 8).ids_BTK[0]
    assert torch.equal(ids[:, 0], values_of(4).argmax(-1))
    with pytest.raises(DataError, match="no labels for row 2; it holds 3 rows"):
        store.target([2], 9)


@pytest.mark.parametrize("encoding", [*PLAIN, Dense(VOCAB, "float16")])
def test_datasets_reads_it_with_and_without_llmkd(tmp_path, encoding):
    folder = write_store(tmp_path / "s", plan(encoding))
    rows = Store.open(folder).as_dataset()
    assert rows.num_rows == 7 and rows["row"][:] == list(range(7))
    assert rows[2]["length"] == LENGTHS[2] and rows[2]["tokens"] == row_digest(tokens_of(2))
    for name, column in encoding.encode(values_of(2), row=2).items():
        assert rows[2][name] == column.tolist()
    plain = load_dataset("arrow", data_files=str(folder / "data/*.arrow"), split="train")
    card = load_dataset(str(folder), split="train")
    assert plain[:] == card[:] == rows[:]


def test_card_and_info_say_what_it_is(sampled):
    text = (sampled / "README.md").read_text()
    assert text.startswith("---\n") and "path: data/*.arrow" in text
    assert "| teacher | id big, revision a1" in text and "| tokens | 42 |" in text
    lines = dict(describe(Store.open(sampled)))
    assert lines["encoding"] == "name sampled, draws 20, sampling systematic"
    assert lines["rows"] == "7 of 7 (all)" and lines["tokens"] == "42" and lines["shards"] == "4"
    assert float(lines["  many"]) == 1.0 and float(lines["  ids"]) > 2


def test_a_store_can_be_pickled_and_takes_tensors_of_rows(sampled):
    store = pickle.loads(pickle.dumps(Store.open(sampled)))
    one, other = store.target(torch.tensor([1, 3]), 9), store.target([1, 3], 9)
    assert torch.equal(one.probs_BTK, other.probs_BTK)


def test_the_digest_knows_tokens_borders_and_order():
    ids, borders = [5, 6, 7, 8], [0, 1, 0, 1]
    assert row_digest(ids, borders) == row_digest(torch.tensor(ids), np.array(borders))
    assert len(row_digest(ids)) == 16 and row_digest(ids) == row_digest(ids, range(4))
    others = {row_digest(ids), row_digest(ids[::-1]), row_digest(ids, [0, 0, 1, 2])}
    assert len({row_digest(ids, borders), row_digest([5, 6, 7, 9]), *others}) == 5


@pytest.mark.parametrize("encoding", PLAIN, ids=lambda encoding: encoding.name)
def test_a_batch_is_checked_token_by_token(tmp_path, encoding):
    store = Store.open(write_store(tmp_path / "s", plan(encoding)))
    ids, positions = batch_of([2, 4])
    store.check([2, 4], ids, positions)
    left = torch.roll(ids, 3, 1)
    store.check([2, 4], left, torch.roll(positions, 3, 1), starts=[3, 3])
    with pytest.raises(DataError, match=r"row 4 has other tokens .* labelled \w{16}, in the batch"):
        store.check([2, 2 + 2], torch.cat((ids[:1], ids[:1])), positions)
    wrong = ids.clone()
    wrong[0, 8] += 1  # the last of row 2's nine tokens
    with pytest.raises(DataError, match="row 2 has other tokens"):
        store.check([2, 4], wrong, positions)
    borders = positions.clone()
    borders[1, 3] = 0
    with pytest.raises(DataError, match="row 4 has other tokens"):
        store.check([2, 4], ids, borders)
    longer = positions.clone()
    longer[1, LENGTHS[4]] = LENGTHS[4]  # row 4 goes on where its labels end
    with pytest.raises(DataError, match="a longer one"):
        store.check([2, 4], ids, longer)
    with pytest.raises(DataError, match=r"row 2 .* 9 tokens, in the batch 5"):
        store.check([2], ids[:1, :5])


def test_a_row_that_does_not_fit(sampled):
    with pytest.raises(DataError, match="row 2 has 9 labels, which do not fit a batch 8"):
        Store.open(sampled).target([2], 8)
    with pytest.raises(DataError, match="from place 4 on"):
        Store.open(sampled).target([2], 12, starts=[4])


RIGHT = {
    "tokenizer_digest": "tok-1",
    "rows_fingerprint": "data-1",
    "rows_needed": range(7),
    "max_length": 9,
    "packing": "bfd",
    "teacher_temperature": 1.0,
    "vocab": VOCAB,
    "teacher": {"id": "moved", "revision": None, "fingerprint": "f00"},
}


def test_the_right_store_passes(sampled):
    check_matches(Store.open(sampled), **RIGHT)
    check_matches(Store.open(sampled), **{**RIGHT, "teacher": None, "rows_needed": [3]})


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"tokenizer_digest": "tok-2"}, "tokenizer: the store has 'tok-1', this run 'tok-2'"),
        ({"rows_fingerprint": "x"}, r"rows \(text.*'data-1', this run 'x'"),
        ({"rows_needed": range(9)}, "store has 7, 2 that this run needs .* first is row 7"),
        ({"max_length": 8}, "max_length: the store has 9, this run 8"),
        ({"packing": None}, "packing: the store has 'bfd', this run None"),
        ({"teacher_temperature": 2.0}, "teacher_temperature: the store has 1.0, this run 2.0"),
        ({"vocab": 200}, "speak of 300 tokens, the student of 200"),
        ({"teacher": {"id": "big", "revision": "b2"}}, "teacher revision: .*'a1', this run 'b2'"),
        ({"teacher": {"fingerprint": "f01", "id": "x"}}, "teacher fingerprint: .*'f00'"),
    ],
)
def test_each_mismatch_is_named_with_both_values(sampled, wrong, words):
    with pytest.raises(DataError, match=words) as caught:
        check_matches(Store.open(sampled), **{**RIGHT, **wrong})
    assert "llmkd label RECIPE" in str(caught.value)


def test_all_mismatches_come_at_once(sampled):
    wrong = {"tokenizer_digest": "t", "rows_fingerprint": "d", "max_length": 1, "packing": "x"}
    with pytest.raises(DataError) as caught:
        check_matches(Store.open(sampled), **{**RIGHT, **wrong})
    assert str(caught.value).count("the store has") == 4


def test_hidden_labels_serve_every_temperature(tmp_path):
    folder = write_store(
        tmp_path / "s", plan(Hidden(WIDTH, VOCAB, "bfloat16")), head_of(), width=WIDTH
    )
    check_matches(Store.open(folder), **{**RIGHT, "teacher_temperature": 3.0})


def test_no_store_and_one_of_the_future(tmp_path, copy):
    with pytest.raises(MissingFileError, match="llmkd label RECIPE"):
        Store.open(tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(DataError, match="format 99, this llmkd reads up to 1"):
        Store.open(copy)
    (copy / "manifest.json").write_text(json.dumps({"name": "chrome extension"}))
    with pytest.raises(DataError, match="not the manifest of a label store"):
        Store.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json.*is damaged"):
        Store.open(copy)


def test_truncated_and_missing_shards(copy):
    shard = copy / "data/shard-00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"shard-00001.arrow.*bytes, the manifest says") as caught:
        Store.open(copy)
    assert "delete that shard and run the same `llmkd label`" in str(caught.value)
    assert "shard-00001.arrow" in verify_checksums(copy)[0]
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001.arrow.*missing"):
        Store.open(copy)
    assert len(verify_checksums(copy)) == 1


def test_every_flipped_bit_is_found_and_none_is_trained_on(copy):
    clean = Store.open(copy)
    wanted = {row: clean.target([row], 9) for row in range(7)}
    del clean
    shard = copy / "data/shard-00001.arrow"
    whole = shard.read_bytes()
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        shard.write_bytes(flipped)
        problems = verify_checksums(copy)
        assert len(problems) == 1 and "shard-00001.arrow" in problems[0]
        try:
            target = Store.open(copy).target([2, 3], 9)
        except DataError:
            continue
        for b, row in enumerate((2, 3)):  # it lay in padding or in what nobody reads
            width = wanted[row].probs_BTK.shape[-1]
            assert torch.equal(target.probs_BTK[b, :, :width], wanted[row].probs_BTK[0])
            assert torch.equal(target.ids_BTK[b, :, :width], wanted[row].ids_BTK[0])


def test_a_flipped_byte_elsewhere_is_named_too(copy, tmp_path):
    path = copy / "data/shard-00002.json"
    path.write_text(path.read_text().replace('"rows": 2', '"rows": 3'))
    assert ["shard-00002.json" in line for line in verify_checksums(copy)] == [True]
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"max_length": 9', '"max_length": 8'))
    assert "does not match its own digest" in verify_checksums(copy)[0]
    with pytest.raises(DataError, match="does not match its own digest"):
        Store.open(copy)
    folder = write_store(tmp_path / "h", plan(Hidden(WIDTH, VOCAB, "int8")), head_of(), width=WIDTH)
    head = bytearray((folder / "head.safetensors").read_bytes())
    head[-1] ^= 1
    (folder / "head.safetensors").write_bytes(head)
    assert ["head.safetensors" in line for line in verify_checksums(folder)] == [True]
