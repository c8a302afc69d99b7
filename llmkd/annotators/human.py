"""Pairs that people rated, in a file; pairs nobody rated are written out for them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from llmkd.annotators.base import Item, Prompt
from llmkd.annotators.checks import KEY
from llmkd.data.places import way_to
from llmkd.errors import AnnotatorError, DataError, LlmkdError, MissingFileError, RecipeError
from llmkd.files import digest, write_text
from llmkd.labels.preference import Annotation, Votes

FORM = (
    '{"prompt": ..., "response_1": ..., "response_2": ..., "wins": 2, "votes": 3}  (wins of '
    'response_1), or "preferred": 1, 2 or "tie" instead of wins and votes'
)
TO_RATE = "to_rate.jsonl"
Rated = tuple[float, float]  # wins of the first, votes


class HumanAnnotator:
    """`file`: JSONL of rated pairs, each line as in FORM; either order of the two responses, and
    several lines on one pair add up. Lines with null for wins and votes are not rated yet.

    Pairs that are not in it are added to `to_rate` (default: to_rate.jsonl in the run's `folder`,
    else beside `file`), and AnnotatorError says so; `prepare` with all items of an iteration asks
    people once. `partial` is content with one rated pair an item; the others are not asked.

    RecipeError and MissingFileError for settings, DataError that names the line for ratings that
    are none. A file that is not there yet holds no ratings, if its folder is there.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        to_rate: str | Path | None = None,
        partial: bool = False,
        folder: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        self.file = Path(file).expanduser()
        self.name = name or self.file.name
        self.partial = partial
        self.to_rate = Path(to_rate or Path(folder or self.file.parent) / TO_RATE).expanduser()
        if self.to_rate.absolute() == self.file.absolute():
            raise RecipeError.of("to_rate", str(to_rate), "is the file of the ratings itself")
        if not self.file.absolute().parent.is_dir():
            problem = f"no such folder (looked at {self.file.absolute().parent})"
            raise MissingFileError.of("file", str(file), problem, *way_to(str(file)))
        self._rated = _read(self.file)

    @property
    def fingerprint(self) -> str:
        """Hash of the settings alone: people add ratings while a run waits for them, and what they
        said before stays.
        """
        return digest(["human", self.partial])

    def load(self, device: Any) -> None:
        """Read the file anew: somebody may have added to it."""
        self._rated = _read(self.file)

    def release(self) -> None:
        """Nothing to give back."""

    def prepare(self, items: Sequence[Item]) -> None:
        """AnnotatorError now for everything that `annotate` of these items would ask people for."""
        self.annotate(items)

    def annotate(self, items: Sequence[Item]) -> list[Annotation]:
        """Votes, one an item; AnnotatorError where pairs are not rated, with what to do."""
        found: list[Annotation] = []
        missing: list[dict[str, Any]] = []
        for item in items:
            votes, unrated = self._votes(item)
            found.append(votes)
            if unrated and not (self.partial and votes.votes_KK.any()):
                missing += unrated
        if missing:
            raise self._ask(missing)
        return found

    def _votes(self, item: Item) -> tuple[Votes, list[dict[str, Any]]]:
        """The votes on an item, and its pairs without any as lines to rate."""
        count = len(item.responses)
        wins_KK, votes_KK = np.zeros((count, count)), np.zeros((count, count))
        unrated = []
        for i, j in combinations(range(count), 2):
            one, two = item.responses[i], item.responses[j]
            key, swapped = _key(item.prompt, one, two)
            wins, votes = self._rated.get(key, (0.0, 0.0))
            if not votes:
                unrated.append(_blank(item.prompt, one, two))
            wins = votes - wins if swapped else wins
            wins_KK[i, j], wins_KK[j, i] = wins, votes - wins
            votes_KK[i, j] = votes_KK[j, i] = votes
        return Votes(wins_KK, votes_KK), unrated

    def _ask(self, missing: list[dict[str, Any]]) -> LlmkdError:
        """Add pairs to the file of those to rate; the error that says so."""
        waiting = [row for _, row in _lines(self.to_rate)] if self.to_rate.is_file() else []
        rows = {_row_key(row)[0]: row for row in [*missing, *waiting]}  # filled-in ones stay
        kept = [row for key, row in rows.items() if not self._rated.get(key, (0.0, 0.0))[1]]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_text(self.to_rate, text)
        return AnnotatorError.of(
            KEY,
            self.name,
            f"{len(missing)} pairs are not rated in {self.file}; {self.to_rate} holds the "
            f"{len(kept)} that wait",
            "fill in wins (of response_1) and votes of its lines",
            f"append them to the ratings: cat {self.to_rate} >> {self.file}",
            "run the same command again: it goes on from here",
        )


def _blank(prompt: Prompt, one: str, two: str) -> dict[str, Any]:
    return {"prompt": prompt, "response_1": one, "response_2": two, "wins": None, "votes": None}


def _key(prompt: Prompt, one: str, two: str) -> tuple[str, bool]:
    """Hash of a prompt with two responses in either order, and whether they were swapped for it."""
    said = prompt if isinstance(prompt, str) else [[t["role"], t["content"]] for t in prompt]
    first, second = sorted((one, two))
    return digest([said, first, second]), first != one


def _row_key(row: dict[str, Any]) -> tuple[str, bool]:
    return _key(row["prompt"], row["response_1"], row["response_2"])


def _read(path: Path) -> dict[str, Rated]:
    """Votes by hash of prompt and responses, for the one that sorts first."""
    found: dict[str, Rated] = {}
    for number, row in _lines(path) if path.is_file() else []:
        rating = _rating(row, f"{path}, line {number}")
        if rating is None:
            continue
        key, swapped = _row_key(row)
        wins, votes = rating
        before = found.get(key, (0.0, 0.0))
        found[key] = (before[0] + (votes - wins if swapped else wins), before[1] + votes)
    return found


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Numbered rows that hold a prompt and two different responses; DataError names the line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError.of(at, line[:80], f"is not JSON: {error}", FORM) from error
        if not isinstance(row, dict):
            raise DataError.of(at, row, "is no mapping", FORM)
        for key in ("response_1", "response_2"):
            if not isinstance(row.get(key), str):
                raise DataError.of(at, row.get(key), f"has no text as {key}", FORM)
        if not _is_prompt(row.get("prompt")):
            problem = "is no prompt: a text, or a list of {role, content}"
            raise DataError.of(at, row.get("prompt"), problem, FORM)
        if row["response_1"] == row["response_2"]:
            raise DataError.of(at, row["response_1"], "is both responses", "drop the line")
        rows.append((number, row))
    return rows


def _is_prompt(given: Any) -> bool:
    if isinstance(given, str):
        return True
    return isinstance(given, list) and all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str)
        for t in given
    )


def _rating(row: dict[str, Any], at: str) -> Rated | None:
    """Wins of response_1 and votes; None for a line that nobody filled in yet."""
    preferred, wins, votes = (row.get(key) for key in ("preferred", "wins", "votes"))
    if preferred is not None:
        share = {"1": 1.0, "2": 0.0, "tie": 0.5}.get(str(preferred).strip().lower())
        if share is None or wins is not None or votes is not None:
            problem = "must be 1, 2 or 'tie', and stand alone"
            raise DataError.of(f"{at}, preferred", preferred, problem, FORM)
        return share, 1.0
    if wins is None and votes is None:
        return None
    won, of = _count(at, "wins", wins), _count(at, "votes", votes)
    if won > of:
        raise DataError.of(f"{at}, wins", wins, f"more wins than the {of:g} votes", FORM)
    return won, of


def _count(at: str, key: str, value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0:
        raise DataError.of(f"{at}, {key}", value, "must be a number, at least 0", FORM)
    return float(value)
