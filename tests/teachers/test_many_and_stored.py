"""Teachers by the row and several at once: what they answer, and what they refuse."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import VOCAB, tiny_llama, token_rows

from llmkd.data import PackedCollator
from llmkd.errors import DataError, MissingFileError, RecipeError, TeacherError
from llmkd.labels import StorePlan, StoreWriter, make_encoding
from llmkd.methods.label_run import Labeller, write_store
from llmkd.objectives.targets import chosen_rows, log_probs
from llmkd.teachers import LiveTeacher, ManyTeachers, StoredTeacher, as_teacher
from llmkd.types import MixtureTarget, SparseTarget


def store(folder, rows, teacher, encoding="hidden", tokenizer="none", **settings):
    live = LiveTeacher(teacher)
    live.check(VOCAB, None)
    live.load(Accelerator(cpu=True))
    codec = make_encoding(encoding, shared=VOCAB, width=teacher.config.hidden_size, **settings)
    plan = StorePlan(
        encoding=codec,
        teacher={"id": "tiny"},
        tokenizer=tokenizer,
        data="rows",
        packing=None,
        max_length=32,
        vocab=VOCAB,
        rows=np.arange(len(rows)),
        total_rows=len(rows),
        rows_per_shard=5,
    )
    labeller = Labeller(live, codec, 0, 3, 8)
    with StoreWriter(folder, plan) as writer, torch.no_grad():
        write_store(writer, labeller, rows, [rows[i] for i in range(4)])
        writer.finish()
    return folder


@pytest.fixture
def rows():
    made = token_rows(12)
    return made if "row" in made.column_names else made.add_column("row", list(range(len(made))))


def test_a_stored_answer_is_the_live_one_bit_for_bit(tmp_path, rows):
    live = LiveTeacher(tiny_llama(7))
    live.check(VOCAB, None)
    live.load(Accelerator(cpu=True))
    stored = StoredTeacher(store(tmp_path / "s", rows, tiny_llama(7), dtype="float32"))
    stored.check(VOCAB, None)
    stored.check_dataset(rows)
    stored.load(Accelerator(cpu=True))
    for numbers, tolerance in (((3, 4, 0), 1e-6), ((0, 1, 2), 0.0)):
        # labelled as (0, 1, 2): another width may round products otherwise in the last bit
        batch = PackedCollator(0)([rows[i] for i in numbers])
        counted = chosen_rows(batch["labels"] != -100)
        one, other = (teacher(batch).take(counted) for teacher in (live, stored))
        assert (one.hidden_BTH - other.hidden_BTH).abs().max() <= tolerance
        assert torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize("encoding", ["sampled", "topk", "lowrank", "dense"])
def test_other_encodings_are_near(tmp_path, rows, encoding):
    settings = {
        "sampled": {"draws": 255},
        "topk": {"k": 39},
        "lowrank": {"rank": 8},
        "dense": {"dtype": "float16"},
    }[encoding]
    teacher = tiny_llama(7)
    stored = StoredTeacher(store(tmp_path / "s", rows, teacher, encoding, **settings))
    stored.load(Accelerator(cpu=True))
    batch = PackedCollator(0)([rows[i] for i in (0, 5)])
    counted = chosen_rows(batch["labels"] != -100)
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids")}
        exact = teacher(**inputs).logits.reshape(-1, VOCAB)[counted].softmax(-1)
    found = stored(batch).take(counted)
    if isinstance(found, SparseTarget):
        near = torch.zeros_like(exact).scatter_add_(-1, found.ids_BTK, found.probs_BTK)
    else:
        near = log_probs(found, VOCAB, 1.0).exp()
    assert (near - exact).abs().sum(-1).mean() < 0.1


def test_left_padding_finds_its_tokens(tmp_path, rows):
    stored = StoredTeacher(store(tmp_path / "s", rows, tiny_llama(7), dtype="float32"))
    stored.load(Accelerator(cpu=True))
    batch = PackedCollator(0)([rows[i] for i in (3, 4)])
    lengths = [len(rows[i]["input_ids"]) for i in (3, 4)]
    width = batch["input_ids"].shape[1]
    ids, mask = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["input_ids"])
    for b, n in enumerate(lengths):
        ids[b, width - n :] = batch["input_ids"][b, :n]
        mask[b, width - n :] = 1
    left = stored({"input_ids": ids, "attention_mask": mask, "rows": batch["rows"]})
    right = stored(batch)
    for b, n in enumerate(lengths):
        assert torch.equal(left.hidden_BTH[b, width - n :], right.hidden_BTH[b, :n])


def test_other_tokens_are_refused_before_step_one_and_in_the_batch(tmp_path, rows):
    stored = StoredTeacher(store(tmp_path / "s", rows, tiny_llama(7)))
    changed = rows.map(lambda row: {"input_ids": [(i + 1) % VOCAB for i in row["input_ids"]]})
    with pytest.raises(DataError, match="other tokens"):
        stored.check_dataset(changed)
    with pytest.raises(DataError, match="no column `row`"):
        stored.check_dataset(rows.remove_columns("row"))
    stored.load(Accelerator(cpu=True))
    batch = PackedCollator(0)([changed[0], changed[1]])
    with pytest.raises(DataError, match="other tokens"):
        stored(batch)
    del batch["rows"]
    with pytest.raises(DataError, match="PackedCollator"):
        stored(batch)
    with pytest.raises(TeacherError, match="speaks of"):
        stored.check(VOCAB - 1, None)


def test_a_store_that_is_not_there(tmp_path):
    with pytest.raises(MissingFileError, match="llmkd label"):
        StoredTeacher(tmp_path / "nothing").open()


def test_several_teachers_average_their_probabilities(tmp_path, rows):
    one, other = tiny_llama(7), tiny_llama(8)
    stored = StoredTeacher(store(tmp_path / "s", rows, other, "topk", k=39))
    many = ManyTeachers([LiveTeacher(one), stored], [3, 1])
    many.check(VOCAB, None)
    many.load(Accelerator(cpu=True))
    batch = PackedCollator(0)([rows[i] for i in (0, 1)])
    answer = many(batch)
    assert isinstance(answer, MixtureTarget) and answer.weights == (0.75, 0.25)
    counted = chosen_rows(batch["labels"] != -100)
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids")}
    with torch.no_grad():
        p, q = (m(**inputs).logits.reshape(-1, VOCAB)[counted].softmax(-1) for m in (one, other))
    mixed = log_probs(answer.take(counted), VOCAB, 1.0).exp()
    torch.testing.assert_close(mixed, 0.75 * p + 0.25 * q, rtol=0, atol=2e-3)
    many.release()
    assert not many.loaded


def test_what_names_a_teacher():
    assert isinstance(as_teacher("some/model"), LiveTeacher)
    assert isinstance(as_teacher(["a/b", "c/d"]), ManyTeachers)
    with pytest.raises(RecipeError, match="weight"):
        ManyTeachers([LiveTeacher("a/b")], [1, 2])
    with pytest.raises(RecipeError, match="mixture"):
        as_teacher([ManyTeachers([LiveTeacher("a/b")])])
