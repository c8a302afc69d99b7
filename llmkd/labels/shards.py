"""One shard: an Arrow stream on disk, whole or absent, and the small JSON that vouches for it."""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmkd.errors import DataError, LlmkdError, RunFolderError
from llmkd.files import fsync_folder, read_json, write_json

BATCH_ELEMENTS = 1 << 28  # list offsets are int32: a record batch stays far below 2**31 numbers
FULL = (errno.ENOSPC, errno.EDQUOT)


def shard_path(folder: Path, number: int) -> Path:
    """`data/shard-00000.arrow`; its JSON has the suffix .json."""
    return folder / "data" / f"shard-{number:05d}.arrow"


def row_check(row: int, tokens: str, length: int, columns: Sequence[np.ndarray]) -> int:
    """CRC-32 of a row, its columns in stored order: catches a flipped bit while training."""
    value = zlib.crc32(f"{row} {tokens} {length}".encode())
    for column in columns:
        value = zlib.crc32(np.ascontiguousarray(column).view(np.uint8).data, value)
    return value


def schema_of(columns: Mapping[str, Any]) -> pa.Schema:
    """`row`, `tokens`, `length`, `check`, then lists of numbers (of a numpy type or its name)."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("tokens", pa.string()),
            ("length", pa.int32()),
            ("check", pa.uint32()),
            *(
                (name, pa.list_(pa.from_numpy_dtype(np.dtype(kind))))
                for name, kind in columns.items()
            ),
        ]
    )


@contextmanager
def room_on_disk(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write; on success it takes `path`'s place, else it is gone.

    RunFolderError where the disk (or the quota) is full.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            with aside.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(aside, path)
            fsync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk while writing `path` becomes a RunFolderError; no part of the file stays."""
    try:
        yield
    except Exception as error:
        # safetensors and pyarrow wrap the system's error
        if getattr(error, "errno", None) not in FULL and f"os error {FULL[0]}" not in str(error):
            raise
        for left in path.parent.glob(f".{path.name}.{os.getpid()}.part"):
            left.unlink(missing_ok=True)
        raise RunFolderError.of(
            "label_store",
            str(path),
            "the disk is full; this file was not written, finished shards are whole",
            "make room and run the same command again: it goes on after the last whole shard",
            "copy the folder to a larger disk and name it there; what is done is kept",
            "choose a smaller encoding: --label_encoding sampled needs some 25 to 55 bytes a token",
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    total = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def write_shard_file(
    folder: Path,
    number: int,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, type[np.generic]],
    key: str,
) -> dict[str, Any]:
    """Write one shard, then its JSON; returns the JSON: file, the store's key, rows, tokens,
    bytes, sha256.

    Rows are dicts `row`, `tokens`, `length` and the columns as numpy arrays of the declared types
    (ValueError otherwise). Bytes depend on the rows alone.
    """
    path, schema = shard_path(folder, number), schema_of(columns)
    with room_on_disk(path) as aside:
        with (
            aside.open("wb") as handle,
            pa.PythonFile(handle, mode="w") as sink,
            pa.ipc.new_stream(sink, schema) as stream,
        ):
            for part in _batches(rows, columns):
                stream.write_batch(_record_batch(part, columns, schema))
        size, sha256 = aside.stat().st_size, file_sha256(aside)
    facts = {
        "file": f"data/{path.name}",
        "key": key,
        "rows": len(rows),
        "tokens": sum(int(row["length"]) for row in rows),
        "bytes": size,
        "sha256": sha256,
    }
    with disk_errors(path.with_suffix(".json")):
        write_json(path.with_suffix(".json"), facts)
    return facts


def _batches(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]
) -> Iterator[Sequence[Mapping[str, Any]]]:
    first, elements = 0, 0
    for place, row in enumerate(rows):
        size = max(len(row[name]) for name in columns)
        if place > first and elements + size > BATCH_ELEMENTS:
            yield rows[first:place]
            first, elements = place, 0
        elements += size
    yield rows[first:]


def _record_batch(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, type[np.generic]], schema: pa.Schema
) -> pa.RecordBatch:
    for row in rows:
        for name, kind in columns.items():
            if row[name].dtype != kind or row[name].ndim != 1:
                raise ValueError(f"column {name} must be flat {np.dtype(kind).name}")
    lists = []
    for name in columns:
        ends = np.cumsum([len(row[name]) for row in rows])
        offsets = pa.array(np.concatenate(([0], ends)).astype(np.int32))
        values = pa.array(np.concatenate([row[name] for row in rows]))
        lists.append(pa.ListArray.from_arrays(offsets, values))
    checks = [
        row_check(row["row"], row["tokens"], row["length"], [row[name] for name in columns])
        for row in rows
    ]
    keys = [[row[name] for row in rows] for name in ("row", "tokens", "length")]
    arrays = [
        *(pa.array(values, schema.field(i).type) for i, values in enumerate([*keys, checks])),
        *lists,
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def shard_problem(folder: Path, number: int, key: str, sums: bool) -> str | None:
    """Why shard `number` of the store with `key` does not count as written; None if it does.
    `sums`: its hash too."""
    path = shard_path(folder, number)
    try:
        facts = read_json(path.with_suffix(".json"))
    except ValueError:
        return f"{path.with_suffix('.json')} is damaged"
    if not path.is_file() or not isinstance(facts, dict):
        return f"{path} or its .json is missing"
    if facts.get("key") != key:
        return f"{path} was made with other settings"
    if path.stat().st_size != facts.get("bytes"):
        return f"{path} has {path.stat().st_size:,} bytes, its .json says {facts.get('bytes')}"
    if sums and file_sha256(path) != facts.get("sha256"):
        return f"{path} does not have the SHA-256 its .json says"
    return None


class Shard:
    """A shard on disk, memory-mapped: nothing is read before it is asked for.

    Raises DataError where the file cannot be understood, naming it.
    """

    def __init__(self, path: Path, columns: Mapping[str, Any]) -> None:
        self.path, self.names = path, list(columns)
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                if not stream.schema.equals(schema_of(columns)):
                    raise ValueError("its columns are not those the manifest names")
                batches = list(stream)
            for batch in batches:
                batch.validate(full=True)  # no offset may point outside the file
            whole = pa.Table.from_batches(batches) if batches else None
            if whole is None:
                raise ValueError("no rows")
            self.rows = whole.column("row").to_numpy().astype(np.int64)
            self.lengths = whole.column("length").to_numpy().astype(np.int64)
            self._checks = whole.column("check").to_numpy()
            self._tokens = whole.column("tokens")
            self._firsts = np.cumsum([0, *(batch.num_rows for batch in batches)])
            self._lists = [[_flat(batch.column(name)) for name in self.names] for batch in batches]
        except (pa.ArrowException, ValueError, KeyError, OSError) as error:
            raise damaged(path, str(error)) from error

    def tokens(self, place: int) -> str:
        """Digest of the tokens of the row at `place`."""
        return self._tokens[place].as_py()

    def columns(self, place: int, check: bool = True) -> dict[str, np.ndarray]:
        """The row's columns, views of the file. DataError if its CRC-32 does not fit."""
        batch = int(np.searchsorted(self._firsts, place, side="right")) - 1
        at = place - self._firsts[batch]
        found = {
            name: values[offsets[at] : offsets[at + 1]]
            for name, (offsets, values) in zip(self.names, self._lists[batch], strict=True)
        }
        if check:
            row, length = int(self.rows[place]), int(self.lengths[place])
            try:
                value = row_check(row, self.tokens(place), length, list(found.values()))
            except (UnicodeDecodeError, pa.ArrowException):
                value = None
            if value != self._checks[place]:
                raise damaged(self.path, f"row {row} does not have the checksum stored with it")
        return found

    def column_bytes(self) -> dict[str, int]:
        """Bytes of each column's numbers and of what locates them (`index`)."""
        sizes = {
            name: sum(int(batch[i][1].nbytes) for batch in self._lists)
            for i, name in enumerate(self.names)
        }
        return {**sizes, "index": self.path.stat().st_size - sum(sizes.values())}


def _flat(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    return column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=True)


def damaged(path: Path, why: str) -> LlmkdError:
    """The error for a shard that cannot be trusted."""
    return DataError.of(
        "label_store",
        str(path),
        f"is damaged: {why}",
        "`llmkd label verify` lists every file that is",
        "delete that shard and run the same `llmkd label` command again: only it is made anew",
        "or restore the file from a copy",
    )
