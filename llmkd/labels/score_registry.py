"""The table of builders of score targets: a new one is a function with `@score_builder(...)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmkd.errors import RecipeError
from llmkd.objectives.registry import near_names

Wants = Literal["mean", "std", "ratings"]


@dataclass(frozen=True, slots=True, eq=False)
class LevelTargets:
    """`probs_NL`: probabilities >= 0 in the order of the values given. Rows sum to one except for
    `gauss_deqa`. `counts`: how many rows something befell, by name.
    """

    probs_NL: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)


Builder = Callable[..., LevelTargets]


@dataclass(frozen=True, slots=True)
class ScoreBuilder:
    """A builder `function(rows, values, **options) -> LevelTargets`; `wants` says which rows."""

    name: str
    function: Builder
    wants: Wants
    options: tuple[str, ...]
    about: str


SCORE_BUILDERS: dict[str, ScoreBuilder] = {}


def score_builder(*, wants: Wants, about: str) -> Callable[[Builder], Builder]:
    """Enter a builder in the table under the name of its function."""

    def enter(function: Builder) -> Builder:
        name = function.__name__
        if name in SCORE_BUILDERS:
            raise ValueError(f"a score builder named {name!r} exists already")
        keywords = inspect.signature(function).parameters.values()
        options = tuple(p.name for p in keywords if p.kind is p.KEYWORD_ONLY)
        SCORE_BUILDERS[name] = ScoreBuilder(name, function, wants, options, about)
        return function

    return enter


def find_score_builder(name: str) -> ScoreBuilder:
    """The builder called `name`; RecipeError with the nearest name where there is none."""
    if name in SCORE_BUILDERS:
        return SCORE_BUILDERS[name]
    problem = "there is no such builder of score targets"
    raise RecipeError.of("target", name, problem, *near_names(name, SCORE_BUILDERS))
