"""The table of objectives. A new one is a function with `@objective(name)` and one test."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from llmkd.errors import RecipeError
from llmkd.types import LossTerm

Objective = Callable[..., LossTerm]
OBJECTIVES: dict[str, Objective] = {}


def objective(name: str) -> Callable[[Objective], Objective]:
    """Enter a function `(student, target, mask, **settings) -> LossTerm` under `name`."""

    def enter(function: Objective) -> Objective:
        if name in OBJECTIVES:
            raise ValueError(f"an objective named {name!r} exists already")
        OBJECTIVES[name] = function
        return function

    return enter


def find(name: str) -> Objective:
    """The objective called `name`; RecipeError with the nearest name where there is none."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    near = difflib.get_close_matches(name, OBJECTIVES, n=1)
    raise RecipeError.of(
        "objective",
        name,
        "there is no such objective",
        *(f"did you mean {match!r}?" for match in near),
        f"known: {', '.join(sorted(OBJECTIVES))}",
    )
