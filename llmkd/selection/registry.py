"""The table of selections. A selection is a score for every row; the highest are kept."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import numpy as np

from llmkd.errors import DataError, RecipeError

Scorer = Callable[..., np.ndarray]
SCORERS: dict[str, Scorer] = {}


def scorer(name: str) -> Callable[[Scorer], Scorer]:
    """Enter a function `(rows, seed=, model=, config=, pad_token_id=) -> scores [rows]`."""

    def enter(function: Scorer) -> Scorer:
        if name in SCORERS:
            raise ValueError(f"a selection named {name!r} exists already")
        SCORERS[name] = function
        return function

    return enter


def find(name: str) -> Scorer:
    """The scorer called `name`; RecipeError with the nearest name where there is none."""
    if name in SCORERS:
        return SCORERS[name]
    near = difflib.get_close_matches(name, SCORERS, n=1)
    raise RecipeError.of(
        "selection",
        name,
        "there is no such selection",
        *(f"did you mean {match!r}?" for match in near),
        f"known: {', '.join(sorted(SCORERS))}",
    )


@scorer("random")
def random_scores(rows: Any, *, seed: int, **_: Any) -> np.ndarray:
    """The control: every row is as good as any other."""
    return np.random.default_rng([seed, 0x5E1EC7]).random(len(rows))


def top_rows(scores: np.ndarray, keep: int) -> np.ndarray:
    """Numbers of the `keep` highest finite scores; equal scores go to the lower row number.

    Raises DataError where fewer rows have a finite score.
    """
    usable = int(np.isfinite(scores).sum())
    if usable < keep:
        raise DataError.of(
            "selection",
            f"{keep} rows",
            f"only {usable} of {len(scores)} rows have a score",
            "lower kd_ratio, so that stage 1 needs fewer rows",
            "lower selection_min_kept or raise selection_top_k",
        )
    return np.argsort(-scores, kind="stable")[:keep].astype(np.int64)
