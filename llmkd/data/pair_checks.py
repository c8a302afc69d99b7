"""What of a pair dataset can be refused before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from llmkd.data.pair_collator import NEEDED, REFERENCE_COLUMNS, REFERENCES
from llmkd.errors import DataError

LISTS = ("prompt_ids", "ids_1", "ids_2")


def check_pairs(rows: Dataset, key: str, *, vocab: int, window: int | None) -> None:
    """DataError, with the row, for pairs nobody can be trained on.

    `key` names the dataset, `window` the tokens a row may have, prompt and completion together.
    Missing columns, half a reference, NaN or infinite numbers, empty prompts and completions, ids
    outside the vocabulary, rows that are too long.
    """
    columns = rows.column_names
    if missing := [name for name in NEEDED if name not in columns]:
        raise DataError.of(
            key,
            missing[0],
            f"the pairs have no such column; they have {', '.join(sorted(columns)) or 'none'}",
            "load_preferences makes such rows of a preference file",
        )
    for name in REFERENCES:
        if (f"{name}_1" in columns) != (f"{name}_2" in columns):
            raise DataError.of(key, f"{name}_1, {name}_2", "one of the two columns is missing")
    if not len(rows):
        raise DataError.of(key, "0 rows", "there is no pair to train on")
    numbers = [name for name in ("pref_logit", *REFERENCE_COLUMNS) if name in columns]
    for start, table in _tables(rows, [*LISTS, *numbers]):
        for name in numbers:
            _check_numbers(np.asarray(table[name].to_pylist(), float), key, name, start)
        lengths = {name: _check_ids(table[name], key, name, start, vocab) for name in LISTS}
        for name in LISTS[1:]:
            _check_window(lengths["prompt_ids"] + lengths[name], key, name, start, window)


def pair_lengths(rows: Dataset) -> list[int]:
    """Tokens of the longer of a pair's two rows, prompt included."""
    found: list[int] = []
    for _, table in _tables(rows, list(LISTS)):
        prompt, one, two = (_lengths(table[name]) for name in LISTS)
        found += (prompt + np.maximum(one, two)).tolist()
    return found


def pairs_digest(rows: Dataset) -> str:
    """Hash of the ids of prompts and responses, in order."""
    total = hashlib.sha256()
    for _, table in _tables(rows, list(LISTS)):
        for name in LISTS:
            total.update(_lengths(table[name]).astype(np.int64).tobytes())
            total.update(_flat(table[name]).astype(np.int64).tobytes())
    return total.hexdigest()[:16]


def _tables(rows: Dataset, names: list[str]) -> Iterator[tuple[int, Any]]:
    start = 0
    for table in rows.select_columns(names).with_format("arrow").iter(1000):
        yield start, table
        start += len(table)


def _lengths(column: Any) -> np.ndarray:
    parts = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts)


def _flat(column: Any) -> np.ndarray:
    return np.concatenate([np.asarray(chunk.flatten()) for chunk in column.chunks])


def _check_numbers(values: np.ndarray, key: str, name: str, start: int) -> None:
    if len(wrong := np.flatnonzero(~np.isfinite(values))):
        raise DataError.of(
            key,
            f"{name} = {values[wrong[0]]}",
            f"row {start + wrong[0]} holds no finite number there",
            "votes that all agree: a smoothed logit, log((w + 1/2) / (h - w + 1/2))",
        )


def _check_ids(column: Any, key: str, name: str, start: int, vocab: int) -> np.ndarray:
    lengths = _lengths(column)
    if not np.all(lengths > 0):  # also where a row is null
        place = int(np.flatnonzero(~(lengths > 0))[0])
        raise DataError.of(key, name, f"row {start + place} has no tokens there")
    ids = _flat(column)
    if len(wrong := np.flatnonzero(~((ids >= 0) & (ids < vocab)))):
        place = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
        raise DataError.of(
            key,
            f"{name} holds id {ids[wrong[0]]}",
            f"row {start + place}: the model's vocabulary has {vocab} entries",
            "make the ids with the model's own tokenizer",
        )
    return lengths.astype(np.int64)


def _check_window(lengths: np.ndarray, key: str, name: str, start: int, window: int | None) -> None:
    if window is not None and len(wrong := np.flatnonzero(lengths > window)):
        raise DataError.of(
            key,
            f"{lengths[wrong[0]]} tokens",
            f"row {start + wrong[0]}: prompt_ids and {name} are longer than {window}",
            "raise max_length, as far as the model's window goes",
            "leave such rows out: a cut response has another log-probability",
        )
