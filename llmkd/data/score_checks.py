"""What of tokenized score rows can be refused before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from llmkd.data.levels import Levels
from llmkd.data.score_collator import NEEDED
from llmkd.data.score_tokens import ImageRows
from llmkd.errors import DataError


def check_score_rows(
    rows: Dataset, key: str, levels: Levels, *, vocab: int, window: int | None
) -> None:
    """DataError, with the row, for rows nobody can be trained on.

    `key` names the dataset, `window` the tokens a row may have. Missing columns, ids outside the
    vocabulary, labels of another length, a `level_at` where no level token stands, targets that are
    no probabilities of these levels, means that are no numbers, a std below 0, rows too long.
    """
    if missing := [name for name in NEEDED if name not in rows.column_names]:
        held = ", ".join(sorted(rows.column_names)) or "none"
        raise DataError.of(key, missing[0], f"the rows have no such column; they have {held}")
    if not len(rows):
        raise DataError.of(key, "0 rows", "there is no row to train on")
    stds = ["score_std"] if "score_std" in rows.column_names else []
    for start, table in _tables(rows, [*NEEDED, *stds]):
        ids, labels = _lists(table["input_ids"]), _lists(table["labels"])
        _check_tokens(ids, labels, key, start, vocab, window)
        _check_level_at(ids, table["level_at"].to_numpy(), key, start, levels)
        _check_targets(_lists(table["target"]), key, start, len(levels))
        _check_numbers(table["score_mean"].to_pylist(), key, "score_mean", start)
        for name in stds:
            known = [0.0 if std is None else std for std in table[name].to_pylist()]
            _check_numbers(known, key, name, start, least=0.0)


def groups_of(rows: Any, *, need_std: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Group numbers of all rows, int64 [N], and which rows can stand in a pair, bool [N]; None
    where that cannot be known without making the rows.
    """
    if isinstance(rows, ImageRows):
        groups, stds = rows.groups, [row["std"] for row in rows.rows]
    elif isinstance(rows, Dataset):
        columns: dict[str, list[Any]] = {
            name: [] for name in ("group_id", "score_std") if name in rows.column_names
        }
        for _, table in _tables(rows, [*columns]) if columns else ():
            for name, values in columns.items():
                values += table[name].to_pylist()
        groups = columns.get("group_id", [0] * len(rows))
        stds = columns.get("score_std", [None] * len(rows))
    else:
        return None
    known_N = np.isfinite(np.array(stds, float))
    return np.array([one or 0 for one in groups], np.int64), known_N | (not need_std)


def _tables(rows: Dataset, names: list[str]) -> Iterator[tuple[int, Any]]:
    start = 0
    for table in rows.select_columns(names).with_format("arrow").iter(1000):
        yield start, table
        start += len(table)


def _lists(column: Any) -> list[np.ndarray]:
    return [np.asarray([] if row is None else row) for row in column.to_pylist()]


def _check_tokens(
    ids: list[np.ndarray],
    labels: list[np.ndarray],
    key: str,
    start: int,
    vocab: int,
    window: int | None,
) -> None:
    for place, (own, wanted) in enumerate(zip(ids, labels, strict=True)):
        row = f"row {start + place}"
        if not len(own) or len(own) != len(wanted):
            problem = f"{row} has {len(own)} ids and {len(wanted)} labels"
            raise DataError.of(key, "input_ids, labels", problem)
        if window is not None and len(own) > window:
            raise DataError.of(
                key,
                f"{len(own)} tokens",
                f"{row} is longer than {window}",
                "raise max_length, as far as the model's window goes",
                "cut the text, not the question and the answer behind it",
            )
        outside = own[(own < 0) | (own >= vocab)]
        if len(outside):
            problem = f"{row}: the model's vocabulary has {vocab} entries"
            way = "make the ids with the model's own tokenizer"
            raise DataError.of(key, f"input_ids holds id {outside[0]}", problem, way)


def _check_level_at(
    ids: list[np.ndarray], level_at: np.ndarray, key: str, start: int, levels: Levels
) -> None:
    for place, (own, at) in enumerate(zip(ids, level_at, strict=True)):
        row = f"row {start + place}"
        if not 0 < at < len(own):
            problem = f"{row} has {len(own)} tokens, and the first has nothing before it"
            raise DataError.of(key, f"level_at = {at}", problem)
        if own[int(at)] not in levels.ids_L:
            problem = f"{row}: id {own[int(at)]} stands there, which is none of the levels'"
            ways = f"levels: {dict(zip(levels.words, levels.ids_L, strict=True))}"
            raise DataError.of(key, f"level_at = {at}", problem, ways)


def _check_targets(targets: list[np.ndarray], key: str, start: int, count: int) -> None:
    for place, target_L in enumerate(targets):
        if len(target_L) != count:
            problem = f"row {start + place}: there are {count} levels"
            raise DataError.of(key, f"target of {len(target_L)} numbers", problem)
        target_L = target_L.astype(float)
        if not np.isfinite(target_L).all() or (target_L < 0).any() or not target_L.sum() > 0:
            problem = f"row {start + place}: must be >= 0, finite, and not all 0"
            raise DataError.of(key, f"target = {target_L.tolist()}", problem)


def _check_numbers(
    values: list[Any], key: str, name: str, start: int, least: float = -np.inf
) -> None:
    numbers = np.array(values, float)
    wrong = np.flatnonzero(~np.isfinite(numbers) | (numbers < least))
    if len(wrong):
        problem = f"row {start + wrong[0]}: must be a finite number"
        problem += "" if least == -np.inf else f" >= {least:g}"
        raise DataError.of(key, f"{name} = {numbers[wrong[0]]}", problem)
