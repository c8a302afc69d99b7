"""A teacher that was asked before: soft labels read from a store, no model in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmkd.data.places import means_path, way_to
from llmkd.data.tokenizer import tokenizer_digest
from llmkd.errors import DataError, MissingFileError, TeacherError
from llmkd.labels import Dense, Store, positions_of
from llmkd.types import DenseLogits, Head, HiddenTarget, SparseTarget, Tail

logger = logging.getLogger(__name__)
Stored: TypeAlias = SparseTarget | HiddenTarget | DenseLogits
CHECKED_AHEAD = 256  # rows of a dataset compared before step one; every batch is compared anyway


class StoredTeacher:
    """Answers a batch from a label store, by the row numbers in it.

    `source` is a folder that `llmkd label` wrote, a Hub dataset id, or an open `Store`. Every
    batch's tokens are compared with those the labels were made for. `tail` replaces the store's
    reading of the unlisted mass (bucket, renorm, smooth).
    """

    def __init__(
        self,
        source: str | Path | Store,
        *,
        revision: str | None = None,
        tail: Tail | None = None,
    ) -> None:
        self.source, self.revision = source, revision
        self.tail: Tail | None = tail
        self.store: Store | None = source if isinstance(source, Store) else None
        self.shared: int | None = None
        self.forwards = 0  # batches answered
        self._head: Head | None = None

    @property
    def name(self) -> str:
        """Folder or Hub id."""
        return str(self.source.folder if isinstance(self.source, Store) else self.source)

    @property
    def loaded(self) -> bool:
        """Whether it holds memory that `release` would free."""
        return self.store is not None

    def open(self) -> Store:
        """The store, opened once."""
        if self.store is None:
            self.store = Store.open(store_folder(str(self.source), self.revision))
        return self.store

    def check(self, student_vocab: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """TeacherError where the labels speak of tokens that the student does not have or that
        another tokenizer made.
        """
        manifest, encoding = self.open().manifest, self.open().encoding
        if isinstance(encoding, Dense) and encoding.per == "row":
            raise TeacherError.of(
                "label_store",
                self.name,
                "holds one answer a row, of a classifier; a language model learns from one a token",
                "name a store that a language model's teacher filled",
            )
        if manifest["shared"] > student_vocab:
            raise TeacherError.of(
                "label_store",
                self.name,
                f"speaks of {manifest['shared']:,} tokens, the student of {student_vocab:,}",
                "label with the student's tokenizer",
            )
        if tokenizer is not None and tokenizer_digest(tokenizer) != manifest["tokenizer"]:
            raise TeacherError.of(
                "label_store",
                self.name,
                f"was made with tokenizer {manifest['tokenizer']}, this is "
                f"{tokenizer_digest(tokenizer)}",
                "train with the tokenizer the labels were made with",
                "or label anew: `llmkd label RECIPE --label_store ANOTHER_FOLDER`",
            )
        self.shared = manifest["shared"]

    def check_dataset(self, rows: Any) -> None:
        """DataError where the rows to train on are not the rows that were labelled.

        Up to 256 rows across the dataset are compared; a stream is compared batch by batch alone.
        """
        if not isinstance(rows, Dataset):
            return
        if "row" not in rows.column_names:
            raise DataError.of(
                "train_dataset",
                rows.column_names,
                "has no column `row`: labels are found by the row's number",
                "take `prepare_rows`' rows, or add_column('row', range(len(dataset)))",
            )
        step = max(1, len(rows) // CHECKED_AHEAD)
        labelled = set(self.open().rows.tolist())
        for place in range(0, len(rows), step):
            row = rows[place]
            if row["row"] not in labelled:  # it may come after the KD stage; a batch will tell
                continue
            ids = row["input_ids"]
            positions = positions_of(row.get("seq_lengths") or [len(ids)])
            self.open().check([row["row"]], [ids], [positions])

    def load(self, accelerator: Any) -> None:
        """Open the store and bring its head, where it has one, to the device."""
        head = self.open().head
        if head is not None:
            bias = None if head.bias is None else head.bias.to(accelerator.device)
            self._head = replace(head, weight=head.weight.to(accelerator.device), bias=bias)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Stored:
        """The stored labels of a batch with `input_ids` [B, T] and `rows` [B], on its device."""
        ids_BT, rows_B = inputs["input_ids"], inputs.get("rows")
        if rows_B is None:
            raise DataError.of(
                "data_collator",
                sorted(inputs),
                "its batches do not say which rows they hold",
                "keep the column `row` and use PackedCollator, which hands on `rows`",
            )
        store, mask_BT = self.open(), inputs.get("attention_mask")
        starts = None if mask_BT is None else mask_BT.argmax(-1).tolist()
        numbers = rows_B.tolist()
        if mask_BT is not None:
            self._check_lengths(numbers, mask_BT.sum(-1).tolist())
        positions = inputs.get("position_ids")
        store.check(
            numbers,
            ids_BT.cpu(),
            None if positions is None or starts is not None else positions.cpu(),
            starts=starts,
        )
        target = store.target(
            numbers, ids_BT.shape[1], starts=starts, tail=self.tail, head=self._head
        )
        self.forwards += 1
        return _to(target, ids_BT.device)

    def _check_lengths(self, rows: list[int], lengths: list[int]) -> None:
        for row, length in zip(rows, lengths, strict=True):
            if self.open().length(row) != length:
                raise DataError.of(
                    "label_store",
                    self.name,
                    f"row {row} was labelled with {self.open().length(row)} tokens, "
                    f"the batch has {length}",
                    "train with the recipe the labels were made with",
                )

    def release(self) -> None:
        """Let go of maps and head."""
        self.source = self.name
        self.store = self._head = None


def store_folder(source: str, revision: str | None = None) -> Path:
    """A local folder, or the snapshot of a Hub dataset; MissingFileError where there is neither."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    write = "write one with `llmkd label RECIPE --label_store FOLDER`"
    looked = f"no such folder (looked at {path.absolute()})"
    if "/" not in source or means_path(source):
        ways = [*way_to(source), write]
        if source.count("/") == 1 and source[0] not in "./~":
            fetch = f"`hf download {source} --repo-type dataset --local-dir FOLDER`"
            ways.append(f"if it is a Hub dataset: {fetch}, and name that folder")
        raise MissingFileError.of("label_store", source, looked, *ways)
    from huggingface_hub import snapshot_download

    try:
        endpoint = os.environ.get("HF_ENDPOINT") or None
        found = snapshot_download(source, repo_type="dataset", revision=revision, endpoint=endpoint)
        return Path(found)
    except Exception as error:
        raise MissingFileError.of(
            "label_store",
            source,
            f"neither a folder nor a Hub dataset that can be read: {looked}; the Hub: "
            f"{str(error).splitlines()[0][:200]}",
            f"if it is a folder: {way_to(source)[0]}",
            "if it is a Hub dataset: check the id and the network; a private one needs "
            "`hf auth login`",
            write,
        ) from error


def _to(target: Stored, device: torch.device) -> Stored:
    if isinstance(target, DenseLogits):
        return replace(target, logits_BTV=target.logits_BTV.to(device, non_blocking=True))
    if isinstance(target, HiddenTarget):
        return replace(target, hidden_BTH=target.hidden_BTH.to(device, non_blocking=True))
    ids = target.ids_BTK.to(device, non_blocking=True)
    return replace(target, ids_BTK=ids, probs_BTK=target.probs_BTK.to(device, non_blocking=True))
