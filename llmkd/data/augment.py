"""Extra training rows that a function of the user's own makes of a task's: called, and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from numbers import Real
from typing import Any, cast

from llmkd.data.task_config import MULTI, REGRESSION, TOKEN
from llmkd.data.task_labels import LabelSet
from llmkd.errors import DataError, RecipeError

Row = dict[str, Any]
Augment = Callable[[list[Row], int], list[Row]]
FORM = '{"text": ..., "label": ...}, and "text_pair" where the task has pairs'


def find_augment(name: str) -> Augment:
    """The function that `module:function` names, of code that is installed here; it is imported,
    never downloaded. RecipeError where there is none.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise RecipeError.of("augment", name, "names no function", "--augment my_module:function")
    try:
        found = getattr(import_module(module), function, None)
    except ImportError as error:
        raise RecipeError.of(
            "augment",
            name,
            f"the module {module} cannot be imported: {error}",
            "install it (pip install -e FOLDER), or PYTHONPATH=FOLDER",
        ) from error
    if not callable(found):
        problem = "is no function" if found is not None else "is not there"
        raise RecipeError.of("augment", name, f"{function} {problem} in the module {module}")
    return cast(Augment, found)


def augmented_rows(
    name: str, rows: list[Row], seed: int, labels: LabelSet, *, pairs: bool
) -> list[Row]:
    """What the function `name` makes of a task's training rows, checked; labels encoded.

    Rows are `{"text", "text_pair" (of pairs), "label"}`, labels as the dataset names them; of token
    tasks text is a list of words. DataError that numbers the first row it returns which is not of
    that form or has a label the task does not know.
    """
    made = find_augment(name)(rows, seed)
    if not isinstance(made, list):
        raise _refuse(name, f"returned {type(made).__name__}, not a list of rows")
    wanted = {"text", "label"} | ({"text_pair"} if pairs else set())
    for number, row in enumerate(made):
        if not isinstance(row, dict) or set(row) != wanted:
            has = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise _refuse(name, f"row {number} it returned has {has}, not {sorted(wanted)}")
        for key in sorted(wanted - {"label"}):
            if not _is_text(row[key], labels.kind):
                raise _refuse(name, f"row {number} it returned has no {key}: {row[key]!r}")
        if problem := _label_problem(row, labels):
            raise _refuse(name, f"row {number} it returned {problem}")
    return [{**row, "label": _encoded(row["label"], labels)} for row in made]


def _refuse(name: str, problem: str) -> DataError:
    found = DataError.of("augment", name, problem, f"a list of rows {FORM}, as it was given")
    assert isinstance(found, DataError)
    return found


def _is_text(value: Any, kind: str) -> bool:
    if kind == TOKEN:
        return isinstance(value, list) and bool(value) and all(isinstance(w, str) for w in value)
    return isinstance(value, str) and bool(value.strip())


def _label_problem(row: Row, labels: LabelSet) -> str | None:
    """What is wrong with a row's label; None where nothing is."""
    label = row["label"]
    if labels.kind == REGRESSION:
        number = isinstance(label, Real) and not isinstance(label, bool) and math.isfinite(label)
        return None if number else f"has the label {label!r}, which is no finite number"
    if labels.kind not in (MULTI, TOKEN):
        return _unknown([label], labels)
    if not isinstance(label, list):
        return f"has the label {label!r}; a {labels.kind} task has a list"
    if labels.kind == TOKEN and len(label) != len(row["text"]):
        return f"has {len(row['text'])} words but {len(label)} labels"
    return _unknown(label, labels)


def _unknown(values: list[Any], labels: LabelSet) -> str | None:
    for value in values:
        if not labels.knows(value):
            names = ", ".join(labels.names[:8]) + (", ..." if len(labels.names) > 8 else "")
            return f"has the label {value!r}; the task knows {names}"
    return None


def _encoded(label: Any, labels: LabelSet) -> Any:
    return float(label) if labels.kind == REGRESSION else labels.encode(label)
