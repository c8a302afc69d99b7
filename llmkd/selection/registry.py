"""The table of selections: from rows (and a model, or nothing) to scores and the rows kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkd.errors import DataError, RecipeError
from llmkd.objectives.registry import near_names
from llmkd.selection.config import SelectionConfig

Scorer = Callable[..., np.ndarray]
Picker = Callable[..., np.ndarray]


def top_rows(scores: np.ndarray, keep: int) -> np.ndarray:
    """Numbers of the `keep` highest scores, best first; ties go to the lower row number.

    A score of -inf means that a row has none. Raises DataError where fewer rows have one, and for
    NaN and +inf.
    """
    check_scores(scores, keep)
    return np.argsort(-scores, kind="stable")[:keep].astype(np.int64)


def check_scores(scores: np.ndarray, keep: int) -> None:
    """DataError for NaN, for +inf, and where fewer than `keep` rows have a score."""
    if keep < 0:
        raise DataError.of("selection", f"{keep} rows", "must be at least 0")
    odd = np.flatnonzero(np.isnan(scores) | (scores == np.inf))
    if len(odd):
        raise DataError.of(
            "selection",
            float(scores[odd[0]]),
            f"is the score of row {odd[0]}; {len(odd)} of {len(scores)} rows have such a score",
            "check the weights of the model that scores",
            "make selection_scores anew with `llmkd select RECIPE`",
        )
    usable = int(np.isfinite(scores).sum())
    if usable < keep:
        raise DataError.of(
            "selection",
            f"{keep} rows",
            f"only {usable} of {len(scores)} rows have a score",
            "lower kd_ratio, so that stage 1 needs fewer rows",
            "salt_ds: lower selection_min_kept or raise selection_top_k",
            "selection_scores: make them anew for this kd_ratio (kcenter scores what it chose)",
        )


def pick_top(scores: np.ndarray, keep: int, **_: Any) -> np.ndarray:
    """`top_rows` as a picker: neither the seed nor the settings matter."""
    return top_rows(scores, keep)


@dataclass(frozen=True)
class Selection:
    """One way to choose rows: a score for every row, and the rows kept given the scores.

    `score(rows, *, seed, keep, model, config, pad_token_id)` gives scores [rows], -inf for a row
    that has none; `pick(scores, keep, *, seed, config)` gives `keep` different row numbers, the
    same ones for the same seed. `about` says what a score is, for the histogram. `reads` names the
    config keys that the scores (not the picking) depend on. Scores that are `for_keep` belong to
    one seed and to `keep` rows at most.
    """

    name: str
    score: Scorer
    about: str
    pick: Picker = pick_top
    needs_model: bool = True
    reads: tuple[str, ...] = ()
    for_keep: bool = False

    def __call__(
        self,
        rows: Any,
        keep: int,
        *,
        seed: int,
        model: Any = None,
        config: SelectionConfig | None = None,
        pad_token_id: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`(scores [rows], kept [keep])`. DataError where there are not so many rows to keep,
        RecipeError without the model it needs.
        """
        config = config or SelectionConfig(selection=self.name)
        if self.needs_model and model is None:
            raise RecipeError.of("selection", self.name, "needs a model to score with")
        if keep > len(rows):
            raise DataError.of("selection", f"{keep} rows", f"there are only {len(rows)}")
        scores = self.score(
            rows, seed=seed, keep=keep, model=model, config=config, pad_token_id=pad_token_id
        )
        return scores, self.pick(scores, keep, seed=seed, config=config)


SELECTIONS: dict[str, Selection] = {}


def selection(name: str, **facts: Any) -> Callable[[Scorer], Scorer]:
    """Enter a scorer into the table under `name`; `facts` are the other fields of `Selection`."""

    def enter(function: Scorer) -> Scorer:
        if name in SELECTIONS:
            raise ValueError(f"a selection named {name!r} exists already")
        SELECTIONS[name] = Selection(name, function, **facts)
        return function

    return enter


def find(name: str) -> Selection:
    """The selection called `name`; RecipeError with the nearest name where there is none."""
    if name in SELECTIONS:
        return SELECTIONS[name]
    raise RecipeError.of(
        "selection", name, "there is no such selection", *near_names(name, SELECTIONS)
    )


@selection("random", needs_model=False, about="a random number in [0, 1)")
def random_scores(rows: Any, *, seed: int, **_: Any) -> np.ndarray:
    """The control: every row is as good as any other."""
    return np.random.default_rng([seed, 0x5E1EC7]).random(len(rows))
