"""A classifier that was asked before: its logits read from a store, no model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from llmkd.errors import DataError
from llmkd.labels import Dense, Store, check_matches
from llmkd.teachers.stored import CHECKED_AHEAD, store_folder
from llmkd.types import DenseLogits

MANY_NAMES = 12  # of more classes only the first that differs is shown


class StoredClasses:
    """Answers a batch with class logits from a store, by the row numbers in it.

    `source` is a folder that `write_class_store` filled, a Hub dataset id, or an open `Store`.
    Every batch's tokens are compared with those that were labelled.
    """

    def __init__(self, source: str | Path | Store, *, revision: str | None = None) -> None:
        self.source, self.revision = source, revision
        self.store: Store | None = source if isinstance(source, Store) else None
        self.forwards = 0  # batches answered

    @property
    def name(self) -> str:
        """Folder or Hub id."""
        return str(self.source.folder if isinstance(self.source, Store) else self.source)

    @property
    def loaded(self) -> bool:
        """Whether it holds memory that `release` would free."""
        return self.store is not None

    def open(self) -> Store:
        """The store, opened once. DataError for one that holds no logits of classes."""
        if self.store is None:
            self.store = Store.open(store_folder(str(self.source), self.revision))
        if not isinstance(self.store.encoding, Dense):
            raise DataError.of(
                "label_store",
                self.name,
                f"holds {self.store.encoding.name} labels of a language model, not class logits",
                "name a store that a classifier filled",
            )
        return self.store

    @property
    def per_row(self) -> bool:
        """Whether a row has one answer (sequence tasks), not one a token."""
        encoding = self.open().encoding
        return isinstance(encoding, Dense) and encoding.per == "row"

    @property
    def label_names(self) -> list[str] | None:
        """The classes in the order of the logits; None where the store does not name them."""
        return self.open().manifest["teacher"].get("label_names")

    def check(
        self,
        *,
        rows_fingerprint: str,
        tokenizer_digest: str,
        max_length: int,
        label_names: Sequence[str],
        rows_needed: Sequence[int] | np.ndarray,
        teacher: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise one DataError listing everything in which the store is not made for this run.

        `label_names` are the student's classes in the order of its logits; `teacher` what the run
        says of its teacher, see `check_matches`. Call it before step one.
        """
        check_matches(
            self.open(),
            tokenizer_digest=tokenizer_digest,
            rows_fingerprint=rows_fingerprint,
            rows_needed=rows_needed,
            max_length=max_length,
            packing=None,
            teacher_temperature=1.0,  # logits serve every temperature
            teacher=teacher,
            also=_differing(self.label_names, [str(name) for name in label_names]),
        )

    def check_dataset(self, rows: Any) -> None:
        """DataError where rows have other tokens than were labelled; up to 256 rows across the
        dataset are compared. Rows that are not stored are left to `check`.
        """
        if not isinstance(rows, Dataset):
            return
        store = self.open()
        labelled = set(store.rows.tolist())
        for place in range(0, len(rows), max(1, len(rows) // CHECKED_AHEAD)):
            row = rows[place]
            if (number := int(row.get("row", place))) in labelled:
                ids = row["input_ids"]
                store.check([number], [ids], lengths=[len(ids)])

    def load(self, accelerator: Any) -> None:
        """Open the store; answers follow each batch to its device."""
        self.open()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Float32 logits of a batch with `input_ids` [B, T], `rows` [B] and, where it is padded on
        either side, `attention_mask` [B, T], on the batch's device.

        [B, C] where a row has one answer, else [B, T, C] with 0 on padding. DataError for a row
        that is not stored, has other tokens than were labelled, or is damaged.
        """
        rows_B = inputs.get("rows")
        if rows_B is None:
            raise DataError.of(
                "data_collator",
                sorted(inputs),
                "its batches do not say which rows they hold",
                "keep the column `row` and use a collator that hands on `rows`",
            )
        store, ids_BT, numbers = self.open(), inputs["input_ids"], rows_B.tolist()
        starts, lengths = _real_tokens(ids_BT, inputs.get("attention_mask"))
        store.check(numbers, ids_BT.cpu(), starts=starts, lengths=lengths)
        if self.per_row:
            target = store.target(numbers, 1)
        else:
            target = store.target(numbers, ids_BT.shape[1], starts=starts)
        assert isinstance(target, DenseLogits)
        logits_BTC = target.logits_BTV.to(ids_BT.device, non_blocking=True)
        self.forwards += 1
        return logits_BTC[:, 0] if self.per_row else logits_BTC

    def release(self) -> None:
        """Let go of the maps."""
        self.source = self.name
        self.store = None


def _real_tokens(ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[list[int], list[int]]:
    """Where each row's tokens start and how many they are."""
    batch, width = ids_BT.shape
    if mask_BT is None:
        return [0] * batch, [width] * batch
    mask_BT = (mask_BT != 0).long().cpu()
    return mask_BT.argmax(-1).tolist(), mask_BT.sum(-1).tolist()


def _differing(stored: Sequence[str] | None, run: Sequence[str]) -> list[str]:
    """A line where the classes are not the same, in the same order."""
    if stored is None:
        return ["label names: the store names none; it was not made by a classifier"]
    if list(stored) == list(run):
        return []
    order = " (the same, in another order)" if sorted(stored) == sorted(run) else ""
    if max(len(stored), len(run)) <= MANY_NAMES:
        return [f"label names: the store has {list(stored)!r}, this run {list(run)!r}{order}"]
    place = next((i for i, (a, b) in enumerate(zip(stored, run, strict=False)) if a != b), None)
    first = (
        "one begins like the other"
        if place is None
        else f"class {place} is {stored[place]!r} there, {run[place]!r} here"
    )
    return [f"label names: the store has {len(stored)}, this run {len(run)}; {first}{order}"]
