"""Is a name in a recipe a local path or a Hub id, and what did a mistyped path mean?"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from llmkd.errors import RecipeError

SHOWN = 5  # entries of a folder that a message lists


def means_path(name: str) -> bool:
    """Whether `name` can only be a local path. `owner/name` is a Hub id unless there is a folder
    `owner` here: then it is taken for a slip in a path, and the Hub is not asked for it.
    """
    slashes = name.count("/")
    if name.startswith((".", "/", "~")) or slashes > 1:
        return True
    return slashes == 1 and Path(name).parent.is_dir()


def way_to(name: str) -> list[str]:
    """Ways out for a path that leads nowhere: what it may have meant, or what there is."""
    place = Path(name).expanduser().absolute()
    rest: list[str] = []
    while not place.parent.is_dir():
        rest.insert(0, place.name)
        place = place.parent
    try:
        known = sorted(entry for entry in os.listdir(place.parent) if not entry.startswith("."))
    except OSError:
        known = []
    ways = []
    if near := difflib.get_close_matches(place.name, known, n=1):
        found = place.parent / near[0]
        whole = found.joinpath(*rest)
        ways.append(f"did you mean {whole if whole.exists() else found}?")
    holds = ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")
    ways.append(f"the nearest folder there is: {place.parent} (it holds {holds or 'nothing'})")
    return ways


def check_place(key: str, name: str) -> None:
    """RecipeError for a model or tokenizer whose name is a path that leads nowhere."""
    path = Path(name).expanduser()
    if means_path(name) and not path.exists():
        problem = f"cannot be loaded: no such folder (looked at {path.absolute()})"
        raise RecipeError.of(key, name, problem, *way_to(name), "a Hub id is written owner/name")
