"""What a store of soft labels says of itself: all that decides its contents, and its key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from llmkd import __version__
from llmkd.errors import DataError, RecipeError
from llmkd.files import digest, read_json
from llmkd.labels.encodings import DEFAULT_TAIL, AnyEncoding
from llmkd.labels.sampled import Sampled
from llmkd.types import Tail

FORMAT = "llmkd-labels"
VERSION = 1  # raise it when older readers would misread a store
NAME = "manifest.json"
PACKAGES = "torch numpy pyarrow datasets transformers safetensors".split()


@dataclass(frozen=True, eq=False)
class StorePlan:
    """Everything that decides what a store will hold, known before the first row is labelled.

    `rows` are the numbers of the rows to label, in the order they are stored, out of `total_rows`
    train rows; shard n holds `rows[n * rows_per_shard : (n + 1) * rows_per_shard]`. `teacher` is
    a flat dict (id, revision, fingerprint, dtype, autocast, ...), `tokenizer` and `data` are
    `tokenizer_digest` and the rows' fingerprint, `packing` the strategy or None, `vocab` the
    entries of the teacher's head. Raises DataError for no rows, or one named twice.
    """

    encoding: AnyEncoding
    teacher: Mapping[str, Any]
    tokenizer: str
    data: str
    packing: str | None
    max_length: int
    vocab: int
    rows: np.ndarray
    total_rows: int
    rows_per_shard: int = 512
    seed: int = 0
    tail: Tail | None = None
    _settings: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = np.asarray(self.rows, dtype=np.int64)
        object.__setattr__(self, "rows", rows)
        if not len(rows) or len(np.unique(rows)) != len(rows):
            raise DataError.of(
                "rows", len(rows), "rows to label: none at all, or one is named twice"
            )
        if self.rows_per_shard < 1:
            raise RecipeError.of("label_rows_per_shard", self.rows_per_shard, "must be at least 1")
        if isinstance(self.encoding, Sampled) and self.encoding.seed != self.seed:
            raise ValueError(f"draws with seed {self.encoding.seed}, a plan with {self.seed}")
        object.__setattr__(self, "_settings", self._all_settings())

    def _all_settings(self) -> dict[str, Any]:
        name = self.encoding.name
        settings = {
            "encoding": self.encoding.settings(),
            "temperature": self.encoding.temperature,
            "tail": self.tail or DEFAULT_TAIL[name],
            "shared": self.encoding.shared,
            "vocab": self.vocab,
            "teacher": dict(self.teacher),
            "tokenizer": self.tokenizer,
            "data": self.data,
            "packing": self.packing,
            "max_length": self.max_length,
            "rows": {
                "count": len(self.rows),
                "of": self.total_rows,
                "which": which_rows(self.rows, self.total_rows),
            },
            "seed": self.seed,
            "rows_per_shard": self.rows_per_shard,
        }
        return json.loads(json.dumps(settings, default=str))  # as they are read back

    @property
    def settings(self) -> dict[str, Any]:
        """The plan as it stands in the manifest."""
        return self._settings

    @property
    def key(self) -> str:
        """16 hex digits: stores with the same key hold the same labels."""
        return settings_key(self._settings)

    @property
    def shards(self) -> int:
        """How many shards there will be."""
        return -(-len(self.rows) // self.rows_per_shard)

    def shard_rows(self, number: int) -> np.ndarray:
        """Row numbers of one shard, in order."""
        first = number * self.rows_per_shard
        return self.rows[first : first + self.rows_per_shard]


def which_rows(rows: np.ndarray, total: int) -> str:
    """`all`, or a digest of the list."""
    if len(rows) == total and np.array_equal(rows, np.arange(total)):
        return "all"
    return hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=8).hexdigest()


def settings_key(settings: Mapping[str, Any]) -> str:
    """The key. A teacher with a fingerprint counts by that, not by where it was loaded from."""
    teacher = dict(settings["teacher"])
    if teacher.get("fingerprint"):
        teacher = {k: v for k, v in teacher.items() if k not in ("id", "revision")}
    return digest([VERSION, {**settings, "teacher": teacher}])


def begun(plan: StorePlan) -> dict[str, Any]:
    """The manifest of a store that is being written."""
    return _signed({**_opening(plan, "writing"), "shard_count": plan.shards})


def finished(
    plan: StorePlan, shards: Sequence[Mapping[str, Any]], head: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The manifest of a whole store. No times in it: the same plan gives the same bytes."""
    return _signed(
        {
            **_opening(plan, "done"),
            "tokens": sum(shard["tokens"] for shard in shards),
            "bytes": sum(shard["bytes"] for shard in shards),
            "columns": {n: np.dtype(kind).name for n, kind in plan.encoding.columns.items()},
            "head": head,
            "versions": {"llmkd": __version__, **{name: _version(name) for name in PACKAGES}},
            "shard_count": plan.shards,
            "shards": list(shards),
        }
    )


def _opening(plan: StorePlan, status: str) -> dict[str, Any]:
    head = {"format": FORMAT, "version": VERSION, "status": status, "key": plan.key}
    return {**head, **plan.settings}


def _signed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "digest": digest(manifest)}


def is_intact(manifest: Mapping[str, Any]) -> bool:
    """Whether nothing in it changed since it was written."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return manifest.get("digest") == digest(rest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none. DataError for one that cannot be read, is not
    of this format, or of a later version of it."""
    path = folder / NAME
    try:
        found = read_json(path)
    except ValueError as error:
        raise DataError.of(
            "label_store", str(path), f"is damaged: {error}", "restore it from a copy", _ANEW
        ) from error
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError.of(
            "label_store",
            str(path),
            "is not the manifest of a label store",
            "name the folder that `llmkd label` wrote",
        )
    if found["version"] > VERSION:
        raise DataError.of(
            "label_store",
            str(folder),
            f"has format {found['version']}, this llmkd reads up to {VERSION}",
            "pip install --upgrade llmkd",
        )
    if not is_intact(found):
        raise DataError.of(
            "label_store",
            str(path),
            "was changed after it was written: it does not match its own digest",
            "restore it from a copy",
            _ANEW,
        )
    return found


_ANEW = "or delete it and run the same `llmkd label` again: whole shards are kept"


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """`name: the store has A, this run B` for every plan setting that differs, nested ones too."""
    lines: list[str] = []
    for name in wanted:
        mine, theirs = wanted[name], stored.get(name)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            both = {**dict.fromkeys(theirs), **mine}  # a setting only one side has differs too
            lines += differences(theirs, both, f"{prefix}{name}.")
        elif mine != theirs:
            lines.append(f"{prefix}{name}: the store has {theirs!r}, this run {mine!r}")
    return lines


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
