"""A stored classifier: the logits of the row asked about, or a refusal that says why."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import VOCAB, token_rows

from llmkd.errors import DataError, MissingFileError, TeacherError
from llmkd.labels import Sampled, Store, StorePlan, StoreWriter, class_plan, row_digest
from llmkd.labels.classes import write_class_store
from llmkd.teachers import StoredClasses, StoredTeacher

NAMES = ["neg", "neutral", "pos"]
RIGHT = {
    "rows_fingerprint": "data-1",
    "tokenizer_digest": "tok-1",
    "max_length": 16,
    "label_names": NAMES,
    "rows_needed": range(6),
}


def table(vocab=VOCAB):
    return torch.randn(vocab, 3, generator=torch.Generator().manual_seed(0))


def answer(rows):
    return torch.stack([table()[row["input_ids"]].mean(0) for row in rows])


def token_answer(rows):
    parts = [table()[row["input_ids"]] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def store(folder, rows, answer=answer, names=NAMES, **settings):
    plan = class_plan(
        label_names=names,
        teacher={"id": "big", "fingerprint": "f00"},
        tokenizer_digest="tok-1",
        rows_fingerprint="data-1",
        max_length=16,
        total_rows=len(rows),
        rows_per_shard=4,
        **settings,
    )
    write_class_store(
        folder, rows=rows, answer=answer, plan=plan, batch_size=3, main=True, quiet=True
    )
    return folder


def batch_of(rows, numbers, left=False, pad=0):
    width = max(len(rows[n]["input_ids"]) for n in numbers) + 2
    ids = torch.full((len(numbers), width), pad)
    mask = torch.zeros(len(numbers), width, dtype=torch.long)
    for b, number in enumerate(numbers):
        length = len(rows[number]["input_ids"])
        at = slice(width - length, None) if left else slice(0, length)
        ids[b, at], mask[b, at] = torch.tensor(rows[number]["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask, "rows": torch.tensor(numbers)}


@pytest.fixture
def rows():
    return token_rows(10)


@pytest.fixture
def folder(tmp_path, rows):
    return store(tmp_path / "s", rows)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mask", [torch.int64, torch.bool, torch.float32])
def test_a_stored_answer_is_the_live_one_bit_for_bit(folder, rows, left, mask):
    stored = StoredClasses(folder)
    assert not stored.loaded and stored.name == str(folder) and stored.forwards == 0
    stored.load(Accelerator(cpu=True))
    batch = batch_of(rows, [7, 0, 3], left)
    batch["attention_mask"] = batch["attention_mask"].to(mask)
    found = stored(batch)
    assert found.shape == (3, 3) and found.dtype == torch.float32
    assert torch.equal(found, answer([rows[n] for n in (7, 0, 3)]))
    assert stored.loaded and stored.forwards == 1 and stored.per_row
    assert stored.label_names == NAMES
    stored.release()
    assert not stored.loaded
    assert torch.equal(stored(batch), found)  # opened again when asked


def test_without_a_mask_there_is_no_padding(folder, rows):
    stored = StoredClasses(Store.open(folder))
    batch = {"input_ids": torch.tensor([rows[4]["input_ids"]]), "rows": torch.tensor([4])}
    assert torch.equal(stored(batch), answer([rows[4]]))
    padded = batch_of(rows, [4])
    del padded["attention_mask"]
    with pytest.raises(DataError, match="row 4 has other tokens"):
        stored(padded)


@pytest.mark.parametrize("left", [False, True])
def test_one_answer_a_token(tmp_path, rows, left):
    stored = StoredClasses(store(tmp_path / "t", rows, token_answer, per="token"))
    batch = batch_of(rows, [2, 5], left)
    found, mask = stored(batch), batch["attention_mask"].bool()
    assert not stored.per_row and found.shape == (*mask.shape, 3)
    assert torch.equal(found[mask], table()[batch["input_ids"]][mask])
    assert not found[~mask].any()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with pytest.raises(DataError, match="row 2 has other tokens"):
        stored(batch)


def test_float16_is_near(tmp_path, rows):
    stored = StoredClasses(store(tmp_path / "h", rows, dtype="float16"))
    found, exact = stored(batch_of(rows, [1, 8])), answer([rows[1], rows[8]])
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("left", [False, True])
def test_other_tokens_are_refused(folder, rows, left):
    stored = StoredClasses(folder)
    for place in ("first", "last"):
        batch = batch_of(rows, [0, 6], left)
        at = batch["attention_mask"][1].nonzero()[0 if place == "first" else -1]
        batch["input_ids"][1, at] += 1
        with pytest.raises(DataError, match="row 6 has other tokens"):
            stored(batch)
    longer = batch_of(rows, [0, 6], left)
    at = longer["attention_mask"][1].nonzero()
    longer["attention_mask"][1, at[0] - 1 if left else at[-1] + 1] = 1  # padding called a token
    with pytest.raises(DataError, match="row 6 has other tokens"):
        stored(longer)
    swapped = batch_of(rows, [0, 6], left)
    swapped["rows"] = torch.tensor([6, 0])
    with pytest.raises(DataError, match="row 6 has other tokens"):
        stored(swapped)
    with pytest.raises(DataError, match="no labels for row 10; it holds 10 rows"):
        stored({**swapped, "rows": torch.tensor([0, 10])})
    del swapped["rows"]
    with pytest.raises(DataError, match="keep the column `row`"):
        stored(swapped)


def test_what_padding_holds_does_not_matter(folder, rows):
    one, other = (StoredClasses(folder)(batch_of(rows, [0, 1], pad=pad)) for pad in (0, 7))
    assert torch.equal(one, other)


def test_rows_are_compared_before_step_one(folder, rows):
    stored = StoredClasses(folder)
    stored.check_dataset(rows)
    stored.check_dataset(rows.select([5, 2]))
    with pytest.raises(DataError, match="row 0 has other tokens"):
        stored.check_dataset(rows.map(lambda row: {"input_ids": [*row["input_ids"], 1]}))


def test_the_right_store_passes(folder):
    StoredClasses(folder).check(**RIGHT)
    StoredClasses(folder).check(**RIGHT, teacher={"fingerprint": "f00", "id": "moved"})


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"rows_fingerprint": "x"}, "'data-1', this run 'x'"),
        ({"tokenizer_digest": "tok-2"}, "tokenizer: the store has 'tok-1', this run 'tok-2'"),
        ({"max_length": 8}, "max_length: the store has 16, this run 8"),
        ({"rows_needed": [3, 11]}, "the first is row 11"),
        ({"label_names": ["neg", "pos"]}, r"label names: .*'neutral', 'pos'\], this run \['neg', "),
        ({"label_names": NAMES[::-1]}, r"\['pos', 'neutral', 'neg'\] \(the same, in another order"),
        ({"teacher": {"fingerprint": "f01"}}, "teacher fingerprint: .*'f00'"),
    ],
)
def test_each_mismatch_is_named_with_both_values(folder, wrong, words):
    with pytest.raises(DataError, match=words):
        StoredClasses(folder).check(**{**RIGHT, **wrong})


def test_all_mismatches_come_at_once(folder):
    wrong = {"rows_fingerprint": "x", "tokenizer_digest": "y", "max_length": 1, "label_names": "ab"}
    with pytest.raises(DataError) as caught:
        StoredClasses(folder).check(**wrong, rows_needed=[99])
    assert str(caught.value).count("the store has") == 5


def test_of_many_names_the_first_that_differs_is_shown(tmp_path, rows):
    names = [f"intent_{i}" for i in range(77)]
    many = StoredClasses(store(tmp_path / "m", rows, lambda r: torch.zeros(len(r), 77), names))
    for other, words in (
        (
            [*names[:40], "x", *names[41:]],
            "has 77, this run 77; class 40 is 'intent_40' there, 'x'",
        ),
        (names[:70], "has 77, this run 70; one begins like the other"),
        ([*names[1:], names[0]], "class 0 is 'intent_0' there, 'intent_1' here .*another order"),
    ):
        with pytest.raises(DataError, match=words):
            many.check(**{**RIGHT, "label_names": other})


def test_a_store_of_another_kind(tmp_path, folder):
    with pytest.raises(MissingFileError, match="no such folder"):
        StoredClasses(tmp_path / "nothing").open()
    with pytest.raises(TeacherError, match="one answer a row, of a classifier"):
        StoredTeacher(folder).check(VOCAB, None)
    encoding = Sampled(5, VOCAB)
    facts = {"teacher": {}, "tokenizer": "t", "data": "d", "packing": None, "max_length": 2}
    plan = StorePlan(encoding=encoding, vocab=VOCAB, rows=np.arange(1), total_rows=1, **facts)
    with StoreWriter(tmp_path / "lm", plan) as writer:
        label = {"row": 0, "tokens": row_digest([1, 2]), "length": 2}
        writer.write_shard(0, [{**label, **encoding.encode(torch.zeros(2, VOCAB))}])
        writer.finish()
    with pytest.raises(DataError, match="holds sampled labels of a language model"):
        StoredClasses(tmp_path / "lm").open()


def test_a_damaged_store_is_refused(folder, rows):
    shard = folder / "data/shard-00001.arrow"
    whole, stored = shard.read_bytes(), StoredClasses(folder)
    clean = stored(batch_of(rows, [4, 5]))
    stored.release()
    value = clean[1].numpy().tobytes()
    assert whole.count(value) == 1
    flipped = bytearray(whole)
    flipped[whole.index(value)] ^= 1
    shard.write_bytes(flipped)
    assert torch.equal(StoredClasses(folder)(batch_of(rows, [4])), clean[:1])
    with pytest.raises(DataError, match="row 5 does not have the checksum"):
        StoredClasses(folder)(batch_of(rows, [4, 5]))
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"shard-00001\.arrow"):
        StoredClasses(folder).load(None)
