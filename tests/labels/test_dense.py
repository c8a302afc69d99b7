"""Class logits: kept bit for bit, one answer a row or a token, written shard by shard."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from class_kit import LENGTHS, NAMES, answer, class_rows, logits_of, plan, token_answer, write

from llmkd.errors import DataError, NonFiniteError, RecipeError, RunFolderError, TeacherError
from llmkd.labels import (
    Dense,
    Layout,
    Store,
    StoreWriter,
    class_plan,
    classes,
    describe,
    row_digest,
    verify_checksums,
    write_class_store,
)
from llmkd.types import DenseLogits

HERE = Path(__file__).parent
ODD = torch.tensor([[-0.0, 1e-42, 3.4e38], [1.1, float("-inf"), -2e-9]])
ARGUMENTS = {"rows": class_rows(), "answer": answer, "batch_size": 2, "main": True, "quiet": True}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def back(encoding, values):
    columns = encoding.encode(values)
    assert {name: column.dtype.type for name, column in columns.items()} == encoding.columns
    return encoding.decode([columns], Layout((len(values),), (0,), len(values)))[0]


def bits(values):
    return values.contiguous().view(torch.int32)


def test_float32_is_bitwise():
    assert torch.equal(bits(back(Dense(3), ODD)), bits(ODD))
    narrow = ODD[:, :2].bfloat16()
    assert torch.equal(back(Dense(2), narrow), narrow.float())
    assert torch.equal(back(Dense(2), ODD), ODD[:, :2])  # what lies beyond `shared` is no class


def test_float16_is_within_half_a_step():
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 8
    found = back(Dense(7, "float16"), values)
    assert found.dtype == torch.float32 and not torch.equal(found, values)
    assert ((found - values).abs() <= values.abs() * 2**-11 + 2**-25).all()
    with pytest.raises(RecipeError, match=r"label_dtype: 'float16': .* beyond 65,504"):
        back(Dense(2, "float16"), torch.tensor([[1.0, 70_000.0]]))
    with pytest.raises(RecipeError, match="--label_dtype float32"):
        back(Dense(2, "float16"), torch.tensor([[1.0, -1e9]]))
    ruled_out = torch.tensor([[1.0, float("-inf")]])
    assert torch.equal(back(Dense(2, "float16"), ruled_out), ruled_out)


def test_a_piece_outlives_the_buffer_it_came_from():
    buffer, encoding = torch.ones(2, 3), Dense(3)
    piece = encoding.reduce(buffer)
    buffer.zero_()
    assert encoding.pack(piece)["logits"].tolist() == [1.0] * 6


def test_rows_of_a_batch_lie_where_they_should():
    encoding = Dense(2)
    rows = [encoding.encode(torch.full((n, 2), float(n))) for n in (2, 3)]
    found = encoding.decode(rows, Layout((2, 3), (2, 0), 4))
    assert found[..., 1].tolist() == [[0, 0, 2, 2], [3, 3, 3, 0]]


@pytest.mark.parametrize("row", [[1, float("nan")], [float("inf"), 0], [float("-inf")] * 2])
def test_answers_without_a_distribution(row):
    values = torch.zeros(3, 2)
    values[1] = torch.tensor(row)
    with pytest.raises(NonFiniteError, match="first is token 1"):
        Dense(2).encode(values)
    column = {"logits": values.numpy().reshape(-1)}  # as if another writer had let it in
    with pytest.raises(ValueError, match="NaN"):
        Dense(2).decode([column], Layout((3,), (0,), 3))


def test_columns_of_another_size_are_damage():
    columns, layout = Dense(2).encode(torch.zeros(3, 2)), Layout((3,), (0,), 3)
    for encoding in (Dense(3), Dense(1)):
        with pytest.raises(ValueError, match="do not fit together"):
            encoding.decode([columns], layout)
    with pytest.raises(ValueError, match="2 logits for 3 classes"):
        Dense(3).encode(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="one answer a row, not 3"):
        Dense(2, per="row").encode(torch.zeros(3, 2))


def test_settings_out_of_range():
    assert Dense(4096).columns == {"logits": np.float32}
    with pytest.raises(RecipeError, match="4,097 classes") as caught:
        Dense(4097)
    assert "--label_encoding topk" in str(caught.value) and "sampled" in str(caught.value)
    with pytest.raises(RecipeError, match=r"label_dtype: 'int8': dense knows: float32, float16"):
        Dense(3, "int8")  # pyright: ignore[reportArgumentType]
    for names in ((), ("a", "b", "a")):
        with pytest.raises(RecipeError, match="label_names"):
            plan(label_names=names)
    with pytest.raises(DataError, match="rows to label: none at all"):
        plan(total_rows=0)


def test_one_answer_a_row_comes_back_bitwise(tmp_path):
    store = Store.open(write(tmp_path / "s"))
    assert store.encoding == Dense(3, "float32", "row") and len(store) == 7
    assert store.manifest["teacher"]["label_names"] == list(NAMES)
    target = store.target([5, 0, 2], 1)
    assert isinstance(target, DenseLogits) and target.shared == 3
    wanted = torch.tensor([logits_of(class_rows()[row]["input_ids"]) for row in (5, 0, 2)])
    assert torch.equal(bits(target.logits_BTV[:, 0]), bits(wanted))
    assert store.length(2) == 1 and verify_checksums(store) == []
    raw = store.as_dataset()
    assert raw["row"][:] == list(range(7)) and len(raw[3]["logits"]) == 3
    assert raw[3]["tokens"] == row_digest([31, 32, 33, 34])


def test_one_answer_a_token(tmp_path):
    store = Store.open(write(tmp_path / "s", token_answer, per="token"))
    target = store.target([3, 6], 5, starts=[1, 0])
    assert isinstance(target, DenseLogits)
    assert target.logits_BTV[0, :, 0].tolist() == [0, 31, 32, 33, 34]
    assert target.logits_BTV[1, :, 2].tolist() == [-61, -62, -63, 0, 0]
    assert store.length(3) == 4 and store.manifest["tokens"] == sum(LENGTHS)


def test_tokens_are_compared_whatever_the_number_of_answers(tmp_path):
    store = Store.open(write(tmp_path / "s"))
    ids = torch.zeros(2, 9, dtype=torch.long)
    ids[0], ids[1, 2:6] = torch.arange(21, 30), torch.arange(31, 35)
    store.check([2, 3], ids, starts=[0, 2], lengths=[9, 4])
    store.check([2], [list(range(21, 30))])  # no lengths: no padding
    with pytest.raises(DataError, match="row 3 has other tokens"):
        store.check([2, 3], ids, starts=[0, 2], lengths=[9, 3])
    with pytest.raises(DataError, match="row 3 has other tokens"):
        store.check([2, 3], ids, starts=[0, 2])
    ids[0, 8] += 1
    with pytest.raises(DataError, match="row 2 has other tokens"):
        store.check([2, 3], ids, starts=[0, 2], lengths=[9, 4])


def test_card_and_info_say_what_it_is(tmp_path):
    text = (write(tmp_path / "s") / "README.md").read_text()
    assert "in the order of `label_names`: neg, neutral, pos." in text
    assert "| answers | 7 |" in text and "| classes | 3 of" in text and "width=1" in text
    assert "token after t" not in text
    lines = dict(describe(Store.open(tmp_path / "s")))
    assert lines["answers"] == "7" and lines["  logits"] == "12.00"
    assert lines["teacher label_names"] == "neg, neutral, pos"


def test_every_flipped_bit_is_found_and_none_is_trained_on(tmp_path):
    folder = write(tmp_path / "s")
    clean = Store.open(folder).target([2, 3], 1)
    assert isinstance(clean, DenseLogits)
    shard = folder / "data/shard-00001.arrow"
    whole, refused = shard.read_bytes(), 0
    for place in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        shard.write_bytes(flipped)
        assert ["shard-00001.arrow" in line for line in verify_checksums(folder)] == [True]
        try:
            target = Store.open(folder).target([2, 3], 1)
        except DataError:
            refused += 1
            continue
        assert isinstance(target, DenseLogits)
        assert torch.equal(target.logits_BTV, clean.logits_BTV)  # in what nobody reads
    assert refused > 10
    shard.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"shard-00001.arrow.*bytes, the manifest says"):
        Store.open(folder)


def test_a_row_of_another_number_of_classes_is_refused(tmp_path):
    this = plan(rows_per_shard=7)
    with StoreWriter(tmp_path / "s", this) as writer:
        row = {"tokens": row_digest([1]), "length": 1, **Dense(2).encode(torch.zeros(1, 2))}
        writer.write_shard(0, [{"row": number, **row} for number in range(7)])
        writer.finish()
    with pytest.raises(DataError, match=r"is damaged: rows \[4\]: .*classes"):
        Store.open(tmp_path / "s").target([4], 1)


def test_a_killed_run_goes_on_and_only_what_is_missing_is_asked(tmp_path):
    whole = contents(write(tmp_path / "whole"))
    asked = []

    def dies(rows):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([row["row"] for row in rows])
        return answer(rows)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", dies)
    assert asked == [[0, 1], [2, 3]]  # longest first, row 2 has nine tokens
    asked.clear()
    with pytest.raises(DataError, match="not finished: 2 of 4 shards"):
        Store.open(tmp_path / "s")

    def notes(rows):
        asked.append([row["row"] for row in rows])
        return answer(rows)

    assert contents(write(tmp_path / "s", notes)) == whole
    assert asked == [[4, 5], [6]]
    (tmp_path / "s/data/shard-00001.arrow").unlink()
    asked.clear()
    assert contents(write(tmp_path / "s", notes)) == whole and asked == [[2, 3]]
    asked.clear()
    write(tmp_path / "s", notes)
    assert contents(tmp_path / "s") == whole and asked == []


def test_batches_hold_rows_of_like_length_and_labels_stay_in_order(tmp_path):
    asked = []

    def notes(rows):
        asked.append([len(row["input_ids"]) for row in rows])
        return answer(rows)

    folder = write(tmp_path / "s", notes, rows_per_shard=7)
    assert asked == [[9, 8], [7, 6], [5, 4], [3]]
    assert Store.open(folder).as_dataset()["row"][:] == list(range(7))
    some = write(tmp_path / "some", rows=[6, 1, 4])
    assert Store.open(some).rows.tolist() == [1, 4, 6]
    target = Store.open(some).target([4], 1)
    assert isinstance(target, DenseLogits)
    assert target.logits_BTV[0, 0, 0].item() == 44.5  # the mean of 41 .. 48


def test_other_settings_are_refused_or_overwritten(tmp_path):
    folder = write(tmp_path / "s")
    whole = contents(folder)
    with pytest.raises(RunFolderError, match=r"teacher.label_names: .*'pos'\], this run \['a', "):
        write(folder, label_names=("a", "b", "c"))
    assert contents(folder) == whole
    other = plan(label_names=("a", "b", "c"))
    assert write_class_store(folder, plan=other, overwrite=True, **ARGUMENTS) == 7
    assert Store.open(folder).manifest["teacher"]["label_names"] == ["a", "b", "c"]
    assert write_class_store(folder, plan=other, **ARGUMENTS) == 0


def test_wrong_answers_write_nothing(tmp_path):
    for made, words in (
        (lambda rows: answer(rows)[:, :2], r"teacher: \[2, 2\]: .*\[2, 3\] is wanted"),
        (lambda rows: answer(rows)[:1], r"\[1, 3\]"),
        (token_answer, "is wanted for 2 rows and 3 classes"),
    ):
        with pytest.raises(TeacherError, match=words):
            write(tmp_path / "s", made)
    with pytest.raises(TeacherError, match=r"\[2, 7 or more, 3\] is wanted"):
        write(tmp_path / "t", lambda rows: token_answer(rows)[:, :6], per="token")
    with pytest.raises(NonFiniteError, match="its answer to row 1 is no distribution"):
        write(tmp_path / "s", lambda rows: answer(rows).where(answer(rows) != 13, torch.nan))
    assert not list((tmp_path / "s").rglob("*.arrow"))


def test_rows_that_are_not_the_plans(tmp_path):
    with pytest.raises(ValueError, match="6 of 7"):
        given = {**ARGUMENTS, "rows": class_rows().select(range(6))}
        write_class_store(tmp_path / "s", plan=plan(), **given)
    shuffled = {**ARGUMENTS, "rows": class_rows().select([1, 0, 2, 3, 4, 5, 6])}
    with pytest.raises(DataError, match="its column `row` says 1"):
        write_class_store(tmp_path / "s", plan=plan(), **shuffled)


def test_the_bar_can_be_turned_off(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(classes, "tqdm", lambda **settings: given.append(settings))
    classes._bar(3, False)
    classes._bar(3, True)
    assert [settings.get("disable") for settings in given] == [None, True]


SCRIPT = """
import json, sys, time
sys.path.insert(0, {tests!r})
from class_kit import answer, class_rows, plan
from llmkd.labels import write_class_store
from llmkd.launch import leave
from accelerate import PartialState

state, asked = PartialState(cpu=True), []
def ask(rows):
    asked.append(rows[0]["row"])
    if {hang} and rows[0]["row"] == 4:  # in the middle of shard 2
        print("now", flush=True)
        time.sleep(60)
    return answer(rows)
write_class_store({folder!r}, rows=class_rows(), answer=ask, plan=plan(), batch_size=2,
                  main=state.is_main_process, quiet=True, in_step=True)
# a file of each rank: what two write into one pipe can come out mixed
with open({folder!r} + f"-asked-{{state.process_index}}.json", "w") as file:
    json.dump(asked, file)
leave(0)
"""


def script(tmp_path, hang):
    code = SCRIPT.format(tests=str(HERE), folder=str(tmp_path / "s"), hang=hang)
    (tmp_path / "script.py").write_text(code)
    path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    return str(tmp_path / "script.py"), {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_kill_9_loses_the_open_shard_only(tmp_path):
    path, env = script(tmp_path, hang=True)
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, env=env)
    try:
        assert process.stdout is not None and process.stdout.readline().strip() == b"now"
        with pytest.raises(
            RunFolderError, match=rf"written by another process \(pid {process.pid}"
        ):
            write(tmp_path / "s")
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    with StoreWriter(tmp_path / "s", plan()) as writer:
        assert writer.missing_shards() == [2, 3]
    assert contents(write(tmp_path / "s")) == contents(write(tmp_path / "whole"))


@pytest.mark.slow
def test_two_ranks_take_shards_in_turn_and_ask_equally_often(tmp_path):
    write(tmp_path / "s", rows_per_shard=2)
    (tmp_path / "s/data/shard-00003.json").unlink()
    for number in (0, 1):
        (tmp_path / f"s/data/shard-0000{number}.json").unlink()
    path, env = script(tmp_path, hang=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", path], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    asked = [json.loads((tmp_path / f"s-asked-{rank}.json").read_text()) for rank in (0, 1)]
    # missing are 0, 1 and 3: rank 0 makes 0 and 3, rank 1 makes 1 and then asks once more
    assert asked == [[0, 6], [2, 0]]
    assert contents(tmp_path / "s") == contents(write(tmp_path / "whole"))


def test_a_plan_takes_the_names_as_words():
    this = class_plan(
        label_names=["a", "b"],
        teacher={},
        tokenizer_digest="t",
        rows_fingerprint="d",
        max_length=4,
        total_rows=9,
        rows=[3, 1],
    )
    assert this.settings["teacher"] == {"label_names": ["a", "b"]} and this.vocab == 2
    assert this.settings["packing"] is None and this.rows.tolist() == [3, 1]
    assert this.settings["encoding"] == {"name": "dense", "dtype": "float32", "per": "row"}
