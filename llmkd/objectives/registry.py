"""The table of objectives. A new one is a function with `@objective(name)` and one test."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

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
    raise RecipeError.of(
        "objective", name, "there is no such objective", *near_names(name, OBJECTIVES)
    )


def near_names(name: str, known: Mapping[str, object]) -> list[str]:
    """Ways out of a name that is not in a table: the nearest one, and all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    listed = f"known: {', '.join(sorted(known))}"
    return [*(f"did you mean {match!r}?" for match in near), listed]
