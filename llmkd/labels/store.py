"""Reading a store: rows of soft labels by number, memory-mapped, each with its checksum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from llmkd.errors import DataError, LlmkdError, MissingFileError
from llmkd.labels.base import Columns, Layout
from llmkd.labels.dense import Dense
from llmkd.labels.digests import row_digest
from llmkd.labels.encodings import AnyEncoding, encoding_from
from llmkd.labels.heads import read_head
from llmkd.labels.hidden import Hidden, LowRank, wider_head
from llmkd.labels.manifest import NAME, read_manifest
from llmkd.labels.shards import Shard, damaged
from llmkd.types import DenseLogits, Head, HiddenTarget, SparseTarget, Tail


class Store:
    """A finished store of soft labels; `Store.open` makes one. Cheap to pickle (it is opened
    again) and safe to share with forked workers.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: Sequence[Shard]) -> None:
        self.folder, self.manifest, self.shards = folder, manifest, list(shards)
        self.encoding: AnyEncoding = encoding_from(
            manifest["encoding"],
            shared=manifest["shared"],
            temperature=manifest["temperature"],
            seed=manifest["seed"],
        )
        numbers = np.concatenate([shard.rows for shard in self.shards])
        sizes = [len(shard.rows) for shard in self.shards]
        self._order = np.argsort(numbers, kind="stable")
        self._numbers = numbers[self._order]
        self._shard = np.repeat(np.arange(len(sizes)), sizes)[self._order]
        self._place = np.concatenate([np.arange(size) for size in sizes])[self._order]

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """Map the shards; sizes are checked, hashes are not (`verify_checksums`).

        Raises MissingFileError where there is no store, DataError for one that is unfinished, of
        a later format, or has a missing, truncated or damaged shard, naming the file.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise MissingFileError.of(
                "label_store",
                str(folder),
                f"holds no {NAME}: this is not a label store",
                "write one with `llmkd label RECIPE`",
            )
        if manifest["status"] != "done":
            written, wanted = len(list(folder.glob("data/*.json"))), manifest["shard_count"]
            raise DataError.of(
                "label_store",
                str(folder),
                f"is not finished: {written} of {wanted} shards are written",
                "run the same `llmkd label` command again: it goes on from there",
            )
        kinds = manifest["columns"]
        return cls(folder, manifest, [_shard(folder, facts, kinds) for facts in manifest["shards"]])

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.folder,)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def rows(self) -> np.ndarray:
        """Numbers of the labelled rows, ascending."""
        return self._numbers

    @cached_property
    def head(self) -> Head | None:
        """The head of `hidden` and `lowrank` on the CPU, read when first asked for; else None."""
        if not isinstance(self.encoding, Hidden | LowRank):
            return None
        head = read_head(self.folder, self.manifest["head"])
        return wider_head(head, self.encoding.dtype)

    def target(
        self,
        rows: Sequence[int] | np.ndarray,
        width: int,
        *,
        starts: Sequence[int] | None = None,
        tail: Tail | None = None,
        head: Head | None = None,
    ) -> SparseTarget | HiddenTarget | DenseLogits:
        """The labels of a batch of rows, on the CPU, padded to [B, width].

        Row b's first token stands at place `starts[b]` (0: padded on the right). What stands at
        place t is the teacher's distribution of the token *after* t, as the logits of a causal
        model there: nothing is shifted. Padding has probability (hidden state, logit) 0 throughout.
        Where a row has one label for all of its tokens (`dense` with per="row") width 1 fits.
        `tail` replaces the store's way of reading the unlisted mass; `head` its head (the same
        one, moved to a device). DataError for a row that is not stored, does not fit or is damaged.
        """
        numbers = [int(row) for row in rows]
        layout = self._layout(numbers, width, starts)
        found = [self.columns(row) for row in numbers]
        try:
            if isinstance(self.encoding, Hidden | LowRank):
                head = head or self.head
                assert head is not None
                hidden_BTH = self.encoding.decode(found, layout).to(head.weight.dtype)
                return HiddenTarget(hidden_BTH, head, self.encoding.shared)
            if isinstance(self.encoding, Dense):
                logits_BTC = self.encoding.decode(found, layout)
                return DenseLogits(logits_BTC, self.encoding.shared)
            ids_BTK, probs_BTK = self.encoding.decode(found, layout)
        except ValueError as error:
            raise damaged(self.folder / "data", f"rows {numbers}: {error}") from error
        return SparseTarget(
            ids_BTK,
            probs_BTK,
            self.encoding.shared,
            tail or self.manifest["tail"],
            self.encoding.temperature,
        )

    def columns(self, row: int) -> Columns:
        """The stored columns of one row, checked against its checksum."""
        shard, place = self._find(row)
        return shard.columns(place)

    def length(self, row: int) -> int:
        """Labels of row number `row`: its tokens, or 1 where a row has one label."""
        shard, place = self._find(row)
        return int(shard.lengths[place])

    def check(
        self,
        rows: Sequence[int] | np.ndarray,
        input_ids: Any,
        position_ids: Any = None,
        *,
        starts: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Compare a batch's tokens [B, T] with those the labels were made for.

        `position_ids` [B, T] say where documents begin (without: one document a row). `lengths`
        are the rows' real tokens: without, as many as there are labels, or, where a row has one
        label, all from its start on. Raises DataError naming the first row that differs and both
        digests.
        """
        per_row = isinstance(self.encoding, Dense) and self.encoding.per == "row"
        ids_BT = np.asarray(input_ids)
        positions_BT = None if position_ids is None else np.asarray(position_ids)
        for b, row in enumerate(rows):
            shard, place = self._find(int(row))
            first = 0 if starts is None else int(starts[b])
            labels = ids_BT.shape[1] - first if per_row else int(shard.lengths[place])
            tokens = labels if lengths is None else int(lengths[b])
            at = slice(first, first + tokens)
            positions = None if positions_BT is None else positions_BT[b, at]
            wanted = tokens if per_row else labels
            self._compare(int(row), shard.tokens(place), wanted, ids_BT[b, at], positions)
            # right behind the row padding begins, a document of its own
            behind = None if positions_BT is None or starts else positions_BT[b, at.stop :]
            if behind is not None and len(behind) and behind[0] != 0:
                raise _other_tokens(self.folder, int(row), "a shorter row", "a longer one")

    def _compare(self, row: int, stored: str, length: int, ids: Any, positions: Any) -> None:
        found = row_digest(ids, positions)
        if len(ids) != length:
            raise _other_tokens(self.folder, row, f"{length} tokens", f"{len(ids)}")
        if found != stored:
            raise _other_tokens(self.folder, row, stored, found)

    def as_dataset(self) -> Dataset:
        """The raw columns of all shards, memory-mapped, in stored order."""
        return concatenate_datasets([Dataset.from_file(str(shard.path)) for shard in self.shards])

    def _layout(self, rows: list[int], width: int, starts: Sequence[int] | None) -> Layout:
        lengths = tuple(self.length(row) for row in rows)
        places = (0,) * len(rows) if starts is None else tuple(int(start) for start in starts)
        for row, length, start in zip(rows, lengths, places, strict=True):
            if start < 0 or start + length > width:
                raise DataError.of(
                    "label_store",
                    str(self.folder),
                    f"row {row} has {length} labels, which do not fit a batch {width} tokens wide "
                    f"from place {start} on",
                    "use the max_length and packing the labels were made with",
                )
        return Layout(lengths, places, width)

    def _find(self, row: int) -> tuple[Shard, int]:
        at = int(np.searchsorted(self._numbers, row))
        if at == len(self._numbers) or self._numbers[at] != row:
            raise DataError.of(
                "label_store",
                str(self.folder),
                f"has no labels for row {row}; it holds {len(self):,} rows",
                "label all rows, or train on those that were labelled",
            )
        return self.shards[self._shard[at]], int(self._place[at])


def _shard(folder: Path, facts: dict[str, Any], columns: dict[str, str]) -> Shard:
    path = folder / facts["file"]
    if not path.is_file():
        raise damaged(path, "the file is missing")
    if path.stat().st_size != facts["bytes"]:
        raise damaged(
            path, f"it has {path.stat().st_size:,} bytes, the manifest says {facts['bytes']:,}"
        )
    shard = Shard(path, columns)
    if len(shard.rows) != facts["rows"]:
        raise damaged(path, f"it has {len(shard.rows)} rows, the manifest says {facts['rows']}")
    return shard


def _other_tokens(folder: Path, row: int, stored: str, found: str) -> LlmkdError:
    return DataError.of(
        "label_store",
        str(folder),
        f"row {row} has other tokens than its labels: labelled {stored}, in the batch {found}; "
        "the tokenizer, the text, the packing or max_length changed",
        "train with the recipe the labels were made with",
        "or label these rows: `llmkd label RECIPE`",
    )
