"""Pairs of responses that people rated: what judges are checked on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkd.data.sources import read_table
from llmkd.errors import DataError, LlmkdError

KEY = "rated_pairs"
FORM = (
    '{"prompt": ..., "response_1": ..., "response_2": ..., "wins": 2, "votes": 3} (wins of '
    'response_1), or "preferred": 1, 2 or "tie"; or chosen and rejected'
)
COLUMNS = "prompt response_1 response_2 chosen rejected wins votes preferred group".split()
SHARES = {"1": 1.0, "2": 0.0, "tie": 0.5}


@dataclass(frozen=True, slots=True)
class RatedPair:
    """Two responses to a prompt (text or messages); `wins` of `votes` people preferred the first,
    ties half. `row` is the number of its row.
    """

    row: int
    prompt: Any
    response_1: str
    response_2: str
    wins: float
    votes: float
    group: str | None = None


@dataclass(frozen=True, slots=True)
class RatedPairs:
    """The pairs, and how many rows were left out because both responses are the same text or
    nobody voted.
    """

    pairs: list[RatedPair]
    identical: int
    unrated: int

    @property
    def wins_N(self) -> np.ndarray:
        """Wins of the first response."""
        return np.array([pair.wins for pair in self.pairs], dtype=np.float64)

    @property
    def votes_N(self) -> np.ndarray:
        """Votes."""
        return np.array([pair.votes for pair in self.pairs], dtype=np.float64)


def load_rated(
    name: str,
    split: str = "train",
    *,
    subset: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    most: int | None = None,
    seed: int = 0,
) -> RatedPairs:
    """Pairs of a local file (.jsonl, .json, .parquet, ...) or Hub dataset; FORM says what a row is.

    `columns` maps names of FORM to those of the file; `most` pairs are kept, drawn by `seed`.
    Raises MissingFileError for a path that leads nowhere, DataError that names row and column.
    """
    names = {column: column for column in COLUMNS}
    for column, other in (columns or {}).items():
        if column not in names:
            known = f"known: {', '.join(COLUMNS)}"
            raise DataError.of(f"rated_columns.{column}", other, "no such column", known)
        names[column] = other
    pairs, identical, unrated = [], 0, 0
    for number, row in enumerate(_rows(name, split, subset, revision)):
        pair = _pair(number, {own: row.get(theirs) for own, theirs in names.items()}, names)
        same = pair.response_1.strip() == pair.response_2.strip()
        identical += same
        unrated += not same and not pair.votes
        if not same and pair.votes:
            pairs.append(pair)
    if not pairs:
        problem = f"holds no rated pair ({identical} identical, {unrated} without votes)"
        raise DataError.of(KEY, name, problem, FORM)
    if most is not None and most < len(pairs):
        kept = np.random.default_rng(seed).permutation(len(pairs))[:most]
        pairs = [pairs[place] for place in sorted(kept)]
    return RatedPairs(pairs, identical, unrated)


def _rows(
    name: str, split: str, subset: str | None, revision: str | None
) -> Iterable[Mapping[str, Any]]:
    path = Path(name).expanduser()
    if not path.is_file() or path.suffix not in (".json", ".jsonl"):
        options: Any = {"subset": subset, "revision": revision}
        table: Any = read_table(name, split, key=KEY, split_key="rated_split", **options)
        return table
    # Read here and not by `datasets`, to which a column of 1, 2 and "tie" is a broken file.
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else _lines(text)
    except ValueError as error:
        raise DataError.of(KEY, name, f"cannot be read: {error}", FORM) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError.of(KEY, name, "is no list of mappings", FORM)
    return rows


def _lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _pair(number: int, row: Mapping[str, Any], names: Mapping[str, str]) -> RatedPair:
    chosen = row["chosen"] is not None or row["rejected"] is not None
    sides = ("chosen", "rejected") if chosen else ("response_1", "response_2")
    texts = []
    for side in sides:
        text = _text(row[side])
        if text is None:
            raise _wrong(number, names[side], row[side], "is no response (text or messages)")
        texts.append(text)
    prompt = row["prompt"]
    both: Any = (row["chosen"], row["rejected"])
    if prompt is None and chosen and all(isinstance(side, list) for side in both):
        prompt = both[0][:-1]
        if prompt != both[1][:-1] or not prompt:
            raise _wrong(number, names["rejected"], texts[1][:60], "has another prompt than chosen")
    if not _is_prompt(prompt):
        problem = "is no prompt: a text, or a list of {role, content}"
        raise _wrong(number, names["prompt"], prompt, problem)
    wins, votes = _votes(number, row, names, chosen)
    group = None if row["group"] is None else str(row["group"])
    return RatedPair(number, prompt, texts[0], texts[1], wins, votes, group)


def _text(given: Any) -> str | None:
    if isinstance(given, list) and given and isinstance(given[-1], dict):
        given = given[-1].get("content")
    return given if isinstance(given, str) else None


def _is_prompt(given: Any) -> bool:
    if isinstance(given, str):
        return bool(given.strip())
    return (
        isinstance(given, list)
        and bool(given)
        and all(
            isinstance(t, dict)
            and isinstance(t.get("role"), str)
            and isinstance(t.get("content"), str)
            for t in given
        )
    )


def _votes(
    number: int, row: Mapping[str, Any], names: Mapping[str, str], chosen: bool
) -> tuple[float, float]:
    """Wins of the first response (or of the chosen one) and votes."""
    preferred: Any = row["preferred"]
    wins, votes = row["wins"], row["votes"]
    if preferred is not None:
        share = SHARES.get(str(preferred).strip().lower().removesuffix(".0"))
        if share is None or isinstance(preferred, bool):
            raise _wrong(number, names["preferred"], preferred, 'must be 1, 2 or "tie"')
        if wins is not None or votes is not None:
            raise _wrong(number, names["preferred"], preferred, "stands beside wins and votes")
        return share, 1.0
    if wins is None and votes is None:
        return (1.0, 1.0) if chosen else (0.0, 0.0)
    won, of = _count(number, names["wins"], wins), _count(number, names["votes"], votes)
    if won > of:
        raise _wrong(number, names["wins"], wins, f"more wins than the {of:g} votes")
    return won, of


def _count(number: int, column: str, value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0:
        raise _wrong(number, column, value, "must be a number, at least 0")
    return float(value)


def _wrong(number: int, column: str, value: Any, problem: str) -> LlmkdError:
    shown = value if len(repr(value)) < 80 else repr(value)[:77] + "..."
    return DataError.of(f"{KEY}, row {number}, {column}", shown, problem, FORM)
