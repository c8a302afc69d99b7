"""Writing: whole or absent, resumable, one at a time, and never over something else."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from labels_kit import PLAIN, VOCAB, plan, shard_rows, values_of, write_store

from llmkd.errors import DataError, RunFolderError
from llmkd.labels import (
    Dense,
    Hidden,
    LowRank,
    Sampled,
    Store,
    StoreWriter,
    TopK,
    check_folder,
    fit_lowrank,
    verify_checksums,
)
from llmkd.labels import shards as shards_module
from llmkd.types import Head

HERE = Path(__file__).parent
encodings = pytest.mark.parametrize("encoding", PLAIN, ids=lambda encoding: encoding.name)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@encodings
def test_the_same_plan_gives_the_same_bytes(tmp_path, encoding):
    one = contents(write_store(tmp_path / "a", plan(encoding)))
    assert one == contents(write_store(tmp_path / "b", plan(encoding)))
    assert set(one) == {
        "README.md",
        "manifest.json",
        *(f"data/shard-0000{n}.{kind}" for n in range(4) for kind in ("arrow", "json")),
    }


@encodings
def test_an_unfinished_store_says_so_and_goes_on(tmp_path, encoding):
    this = plan(encoding)
    folder, whole = tmp_path / "s", contents(write_store(tmp_path / "whole", this))
    with StoreWriter(folder, this) as writer:
        assert writer.missing_shards() == [0, 1, 2, 3] and not writer.done
        writer.write_shard(2, shard_rows(this, 2))
        with pytest.raises(RunFolderError, match=r"not whole: .*shard-00000.arrow.*3 such files"):
            writer.finish()
    with pytest.raises(DataError, match="not finished: 1 of 4 shards"):
        Store.open(folder)
    with pytest.raises(DataError, match="not finished: 1 of 4 shards"):
        verify_checksums(folder)
    with StoreWriter(folder, this) as writer:
        assert writer.missing_shards() == [0, 1, 3]
        for number in (3, 0, 1):
            writer.write_shard(number, shard_rows(this, number))
        writer.finish()
        assert writer.done and writer.missing_shards() == []
    assert contents(folder) == whole


@encodings
def test_only_shards_that_agree_with_their_json_count(tmp_path, encoding):
    folder, this = tmp_path / "s", plan(encoding)
    with StoreWriter(folder, this) as writer:
        for number in range(4):
            writer.write_shard(number, shard_rows(this, number))
    flipped = bytearray((folder / "data/shard-00000.arrow").read_bytes())
    flipped[-20] ^= 1
    (folder / "data/shard-00000.arrow").write_bytes(flipped)
    (folder / "data/shard-00001.json").unlink()
    (folder / "data/shard-00002.json").write_text("{")
    os.truncate(folder / "data/shard-00003.arrow", 100)
    with StoreWriter(folder, this) as writer:
        assert writer.missing_shards() == [0, 1, 2, 3]
        assert writer.missing_shards(sums=False) == [1, 2, 3]


@encodings
def test_a_deleted_shard_of_a_finished_store_is_made_anew(tmp_path, encoding):
    folder = write_store(tmp_path / "s", plan(encoding))
    whole = contents(folder)
    (folder / "data/shard-00001.arrow").unlink()
    assert contents(write_store(folder, plan(encoding))) == whole


def test_a_shard_holds_its_rows_in_order_and_declared_types(tmp_path):
    with StoreWriter(tmp_path / "s", plan()) as writer:
        with pytest.raises(ValueError, match=r"shard 0 holds rows \[0, 1\]"):
            writer.write_shard(0, shard_rows(plan(), 1))
        rows = shard_rows(plan(), 0)
        rows[0]["many"] = rows[0]["many"].astype(np.int32)
        with pytest.raises(ValueError, match="many must be flat uint8"):
            writer.write_shard(0, rows)
        assert writer.missing_shards() == [0, 1, 2, 3]
    assert not list((tmp_path / "s").rglob("*.part"))


KILLED = """
import sys, os, time
sys.path.insert(0, {tests!r})
from labels_kit import plan, shard_rows
from llmkd.labels import StoreWriter
from llmkd.labels import shards

real = shards._record_batch
def slow(rows, *rest):
    if rows[0]["row"] == 4:  # in the middle of shard 2: its stream is open, half of it written
        print("now", flush=True)
        time.sleep(60)
    return real(rows, *rest)
shards._record_batch = slow
with StoreWriter({folder!r}, plan()) as writer:
    for number in writer.missing_shards():
        writer.write_shard(number, shard_rows(plan(), number))
"""


@pytest.fixture
def killable(tmp_path):
    """A process that hangs while it writes shard 2 of the store at tmp_path / "s"."""
    code = KILLED.format(tests=str(HERE), folder=str(tmp_path / "s"))
    path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None and process.stdout.readline().strip() == b"now"
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_kill_9_loses_the_open_shard_only(tmp_path, killable):
    whole = contents(write_store(tmp_path / "whole", plan()))
    with pytest.raises(RunFolderError, match=rf"written by another process \(pid {killable.pid}"):
        StoreWriter(tmp_path / "s", plan()).__enter__()
    killable.send_signal(signal.SIGKILL)
    killable.wait()
    assert list((tmp_path / "s/data").glob(".*.part"))
    time.sleep(0.1)
    with StoreWriter(tmp_path / "s", plan()) as writer:
        assert writer.missing_shards() == [2, 3]
    assert contents(write_store(tmp_path / "s", plan())) == whole


@encodings
def test_two_writers_on_one_store(tmp_path, encoding):
    this = plan(encoding)
    with StoreWriter(tmp_path / "s", this):
        with pytest.raises(RunFolderError, match=rf"pid {os.getpid()} on"):
            StoreWriter(tmp_path / "s", this).__enter__()
        with StoreWriter(tmp_path / "s", this, main=False) as helper:  # another rank
            helper.write_shard(1, shard_rows(this, 1))
            with pytest.raises(ValueError, match="only the main writer"):
                helper.finish()
    with StoreWriter(tmp_path / "s", this) as writer:  # the lock is free again
        assert writer.missing_shards() == [0, 2, 3]
    with pytest.raises(ValueError, match="main writer must be open"):
        StoreWriter(tmp_path / "new", this, main=False).__enter__()


class FullDisk:
    """`open` whose binary files take `room` bytes, then no more."""

    def __init__(self, room):
        self.room, self.real = room, Path.open

    def __call__(self, path, mode="r", *args, **kwargs):
        handle = self.real(path, mode, *args, **kwargs)
        if "w" not in mode:
            return handle
        write = handle.write

        def limited(data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(data)

        class Handle:
            closed = property(lambda self: handle.closed)
            write = staticmethod(limited)

            def __getattr__(self, name):
                return getattr(handle, name)

            def __enter__(self):
                return self

            def __exit__(self, *args):
                handle.close()

        return Handle()


@pytest.mark.parametrize("room", [0, 100, 800, 1500, 2500])
def test_a_full_disk_leaves_whole_shards_only(tmp_path, monkeypatch, room):
    folder, whole = tmp_path / "s", contents(write_store(tmp_path / "whole", plan()))
    with (
        pytest.raises(RunFolderError, match="disk is full") as caught,
        StoreWriter(folder, plan()) as writer,
    ):
        writer.write_shard(0, shard_rows(plan(), 0))
        full = FullDisk(room)
        monkeypatch.setattr(Path, "open", lambda path, *a, **k: full(path, *a, **k))
        for number in (1, 2, 3):
            writer.write_shard(number, shard_rows(plan(), number))
    monkeypatch.undo()
    assert "make room and run the same command again" in str(caught.value)
    assert not list(folder.rglob("*.part"))
    with StoreWriter(folder, plan()) as writer:
        assert 0 not in writer.missing_shards()
    assert contents(write_store(folder, plan())) == whole


@pytest.mark.parametrize("name", ["manifest.json", "README.md", "head.safetensors"])
def test_a_full_disk_at_other_files(tmp_path, monkeypatch, name):
    real = os.replace

    def replace(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RunFolderError, match=rf"{name}.*disk is full"):
        write_store(tmp_path / "s", plan(Hidden(16, VOCAB)), Head(torch.ones(VOCAB, 16)), width=16)
    assert not list((tmp_path / "s").rglob("*.part"))
    monkeypatch.undo()
    write_store(tmp_path / "s", plan(Hidden(16, VOCAB)), Head(torch.ones(VOCAB, 16)), width=16)
    assert verify_checksums(tmp_path / "s") == []


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"encoding": Dense(VOCAB)}, r"encoding.name: the store has 'sampled', this run 'dense'"),
        ({"encoding": TopK(5, VOCAB)}, r"encoding.name: the store has 'sampled', this run 'topk'"),
        ({"tokenizer": "tok-2"}, "tokenizer: the store has 'tok-1', this run 'tok-2'"),
        ({"rows": np.arange(5)}, "rows.count: the store has 7, this run 5"),
        ({"encoding": Sampled(20, VOCAB, seed=1), "seed": 1}, "seed: the store has 0, this run 1"),
        ({"teacher": {"id": "big", "fingerprint": "f01"}}, "teacher.fingerprint: .*'f00'"),
        ({"max_length": 10}, "max_length: the store has 9, this run 10"),
    ],
)
def test_a_store_of_other_settings_is_kept_unless_told_otherwise(tmp_path, settings, words):
    folder = write_store(tmp_path / "s", plan())
    whole = contents(folder)
    with pytest.raises(RunFolderError, match=words) as caught:
        StoreWriter(folder, plan(**settings)).__enter__()
    assert "--overwrite_labels" in str(caught.value) and contents(folder) == whole
    with StoreWriter(folder, plan(**settings), overwrite=True) as writer:
        assert len(writer.missing_shards()) == writer.plan.shards
    with pytest.raises(DataError, match="not finished"):
        Store.open(folder)


def test_a_teacher_that_moved_is_the_same_teacher(tmp_path):
    folder = write_store(tmp_path / "s", plan())
    moved = {"id": "/elsewhere/big", "revision": "a1", "fingerprint": "f00", "dtype": "float32"}
    with StoreWriter(folder, plan(teacher=moved)) as writer:
        assert writer.done
    without = {"id": "/elsewhere/big", "dtype": "float32"}
    with pytest.raises(RunFolderError, match="holds labels of other settings"):
        StoreWriter(folder, plan(teacher=without)).__enter__()


def test_overwriting_the_same_settings_keeps_what_is_done(tmp_path):
    folder = write_store(tmp_path / "s", plan())
    with StoreWriter(folder, plan(), overwrite=True) as writer:
        assert writer.missing_shards() == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "data/train.csv", "README.md", "manifest.json"])
def test_a_folder_of_another_kind_is_never_touched(tmp_path, name, overwrite):
    path = tmp_path / "s" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    with pytest.raises(RunFolderError, match="name an empty or a new folder"):
        StoreWriter(tmp_path / "s", plan(), overwrite=overwrite).__enter__()
    assert contents(tmp_path / "s") == {name: b'{"mine": 1}'}


@pytest.mark.parametrize("name", ["notes.txt", "data/train.csv", "README.md", "manifest.json"])
def test_a_folder_of_another_kind_is_seen_before_there_is_a_plan(tmp_path, name):
    path = tmp_path / "s" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    with pytest.raises(RunFolderError, match="name an empty or a new folder"):
        check_folder(tmp_path / "s")
    with pytest.raises(RunFolderError, match="is a file"):
        check_folder(path)
    with pytest.raises(RunFolderError, match="is a file"):
        StoreWriter(path, plan()).__enter__()


def test_other_settings_are_seen_as_soon_as_they_are_known(tmp_path):
    folder = write_store(tmp_path / "s", plan())
    check_folder(tmp_path / "new")
    check_folder(folder, {"max_length": 9})
    with pytest.raises(RunFolderError, match="max_length: the store has 9, this run 16"):
        check_folder(folder, {"max_length": 16, "seed": 0})
    check_folder(folder, {"max_length": 16}, overwrite=True)
    (folder / "manifest.json").unlink()
    check_folder(folder)  # whose shards they are is seen once the plan is there


def test_a_flipped_byte_of_a_finished_store_is_seen_where_reading_it_is_quick(tmp_path):
    folder = write_store(tmp_path / "s", plan())
    shard = folder / "data/shard-00002.arrow"
    flipped = bytearray(shard.read_bytes())
    flipped[-20] ^= 1
    shard.write_bytes(flipped)
    with StoreWriter(folder, plan()) as writer:
        assert writer.done and writer.reads_sums and writer.missing_shards() == [2]
        writer.sums_up_to = 100  # a large store: its size alone
        assert not writer.reads_sums and writer.missing_shards() == []


def test_a_deleted_manifest_costs_no_shard_but_never_mixes_stores(tmp_path):
    folder = write_store(tmp_path / "s", plan())
    whole = contents(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(RunFolderError, match="holds something else"):
        StoreWriter(folder, plan(tokenizer="tok-2")).__enter__()
    with StoreWriter(folder, plan()) as writer:
        assert writer.missing_shards() == []
        writer.finish()
    assert contents(folder) == whole


def test_a_resumed_low_rank_store_uses_the_first_fit(tmp_path):
    sample = torch.cat([values_of(row, 16) for row in range(7)])
    head = Head(torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(0)))
    first, other = fit_lowrank(sample, head, 4), fit_lowrank(sample[:20], head, 4)
    this = plan(LowRank(4, VOCAB))
    with StoreWriter(tmp_path / "s", this) as writer:
        assert not writer.has_head
        writer.put_head(fit=first)
        writer.write_shard(0, shard_rows(this, 0, writer.lowrank(), 16))
    with StoreWriter(tmp_path / "s", this) as writer:
        assert writer.has_head
        writer.put_head(fit=other)  # is not taken
        assert torch.equal(writer.lowrank().encoder, first.encoder)
        (tmp_path / "s/head.json").unlink()
        with pytest.raises(RunFolderError, match="a new fit is not theirs"):
            writer.put_head(fit=other)


def test_a_plan_needs_rows(tmp_path):
    for rows in ([], [1, 1]):
        with pytest.raises(DataError, match="none at all, or one is named twice"):
            plan(rows=np.array(rows))


def test_large_rows_go_into_several_record_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "BATCH_ELEMENTS", 100)
    folder = write_store(tmp_path / "s", plan(rows_per_shard=7))
    monkeypatch.undo()
    store, other = Store.open(folder), Store.open(write_store(tmp_path / "o", plan()))
    assert len(store.shards[0]._lists) > 1
    assert torch.equal(store.target(range(7), 9).probs_BTK, other.target(range(7), 9).probs_BTK)
    assert json.loads((folder / "manifest.json").read_text())["shard_count"] == 1
