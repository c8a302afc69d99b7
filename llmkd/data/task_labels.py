"""Labels of a task: from what a column holds to numbers of outputs, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from llmkd.data.task_config import MULTI, REGRESSION, SINGLE, TOKEN, TaskConfig
from llmkd.data.task_source import Table, class_names, values
from llmkd.errors import DataError
from llmkd.objectives.token import IGNORE

UNLABELLED = -1  # as GLUE writes the labels of its test splits
SHOWN = 8  # labels a message lists
FEW = 20  # distinct whole numbers, up to which regression targets may have been meant as classes


@dataclass(frozen=True)
class LabelSet:
    """The outputs of a task: `names`, and the place of each value a column may hold."""

    kind: str
    names: tuple[str, ...]
    places: dict[Hashable, int]

    def encode(self, label: Any) -> Any:
        """A label as rows carry it: an int, a float, C floats (multi_label) or ints (token)."""
        if self.kind == SINGLE:
            return self.places[label]
        if self.kind == MULTI:
            hot = {self.places[value] for value in label}
            return [float(place in hot) for place in range(len(self.names))]
        if self.kind == TOKEN:
            return [IGNORE if value == IGNORE else self.places[value] for value in label]
        return label

    def decode(self, label: Any) -> Any:
        """The inverse of `encode`: what a column would hold (of multi_label the list of labels)."""
        values = list(self.places)
        if self.kind == SINGLE:
            return values[label]
        if self.kind == MULTI:
            return [value for value, on in zip(values, label, strict=True) if on]
        if self.kind == TOKEN:
            return [IGNORE if place == IGNORE else values[place] for place in label]
        return label

    def knows(self, value: Any) -> bool:
        """Whether `value` is one of the labels, or marks a word that has none (token)."""
        if self.kind == TOKEN and value == IGNORE:
            return True
        return isinstance(value, Hashable) and value in self.places


def read_task_labels(
    config: TaskConfig,
    kind: str,
    train: Table,
    held_out: Table | None,
    say: Callable[[str], None],
) -> tuple[LabelSet, list[Any], list[Any] | None]:
    """The outputs of the task, and the encoded labels of both splits.

    Raises DataError for a row without a (finite) label, for a split without labels, for a task
    of one class and for held-out labels that the training split does not have.
    """
    read = _Reader(config, kind, _indicator_width(train) if kind == MULTI else None)
    train_labels = read(train)
    seen = label_values(train_labels, kind)
    held_labels = None if held_out is None else read(held_out, seen)
    if kind == REGRESSION:
        if set(train_labels) <= set(range(FEW)) and config.task_type != kind:
            say("task: targets are whole numbers; if they are classes: --task_type single_label")
        return LabelSet(kind, (), {}), train_labels, held_labels
    if len(seen) < (2 if read.width is None else 1):  # a vector declares its C outputs
        raise train.refuse(config, "label", f"a task of one class ({_shown(seen)}) teaches nothing")
    if held_labels is not None and (unknown := label_values(held_labels, kind) - seen):
        assert held_out is not None
        raise DataError.of(
            held_out.key,
            held_out.value,
            f"label sets differ: it has labels that no training row has: {_shown(unknown)}",
            f"the training labels are {_shown(seen)}",
            "correct or remove these rows, or train on rows that have the labels",
        )
    found = _label_set(kind, train, seen, read.width, say)
    encoded = [found.encode(label) for label in train_labels]
    return found, encoded, held_labels and [found.encode(label) for label in held_labels]


def label_values(labels: list[Any], kind: str) -> set[Any]:
    """The distinct labels of rows; none for regression, and not the -100 of ignored words."""
    if kind == REGRESSION:
        return set()
    if kind == SINGLE:
        return set(labels)
    return {value for row in labels for value in row} - {IGNORE}


def _label_set(
    kind: str, train: Table, seen: set[Any], width: int | None, say: Callable[[str], None]
) -> LabelSet:
    if (declared := class_names(train)) is not None:
        ordered: list[Any] = declared
    elif width is not None:
        ordered = list(range(width))
    else:
        ordered = sorted(seen)
        if isinstance(ordered[0], int) and ordered != list(range(len(ordered))):
            say(f"task: labels {_shown(seen)} become the classes 0 to {len(ordered) - 1}")
    names = tuple(str(value) for value in ordered)
    return LabelSet(kind, names, {value: place for place, value in enumerate(ordered)})


def _shown(labels: set[Any]) -> str:
    names = sorted(map(repr, labels))
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)})" if len(names) > SHOWN else "")


def _indicator_width(table: Table) -> int | None:
    """C where each row is a vector of C zeros and ones; None where it lists its labels."""
    # Listed labels do not repeat, so more than two zeros and ones in a row are a vector.
    if class_names(table) is not None:
        return None
    width = None
    for row in values(table.rows, "label"):
        if row is None:
            continue  # refused later, by number
        width = width or len(row)
        if len(row) != width or width < 2 or any(value not in (0, 1) for value in row):
            return None
    return width


class _Reader:
    """Reads the labels of a split into plain values: names of a ClassLabel, else what is there."""

    def __init__(self, config: TaskConfig, kind: str, width: int | None) -> None:
        self.config, self.kind, self.width = config, kind, width

    def __call__(self, table: Table, seen: set[Any] | None = None) -> list[Any]:
        names = class_names(table)
        raw = list(values(table.rows, "label"))
        self._check_labelled(table, raw, names is not None, seen)
        words = values(table.rows, "text") if self.kind == TOKEN else [None] * len(raw)
        return [
            self._label(table, names, row, label, its_words)
            for row, (label, its_words) in enumerate(zip(raw, words, strict=True))
        ]

    def _label(self, table: Table, names: Any, row: int, label: Any, words: Any) -> Any:
        if self.kind in (SINGLE, REGRESSION):
            return self._value(table, names, row, label)
        if label is None:
            raise table.refuse(self.config, "label", f"row {row} has no label (None)")
        found = [self._value(table, names, row, value) for value in label]
        if self.kind == TOKEN and len(found) != len(words):
            raise table.refuse(
                self.config, "label", f"row {row} has {len(words)} words but {len(found)} labels"
            )
        if self.width is None:
            if self.kind == MULTI and len(set(found)) < len(found) and isinstance(found[0], int):
                problem = f"row {row} repeats a label, and is no vector of zeros and ones: {label}"
                raise table.refuse(self.config, "label", problem)
            return found
        if len(found) != self.width or any(value not in (0, 1) for value in found):
            problem = f"row {row} is no vector of {self.width} zeros and ones, as the first row is"
            raise table.refuse(self.config, "label", problem)
        return [place for place, value in enumerate(found) if value == 1]

    def _value(self, table: Table, names: list[str] | None, row: int, value: Any) -> Any:
        if value is None:
            raise table.refuse(self.config, "label", f"row {row} has no label (None)")
        if self.kind == REGRESSION:
            if not math.isfinite(value):
                raise table.refuse(self.config, "label", f"row {row} is {value}, not finite")
            return float(value)
        if isinstance(value, str):
            return value
        if not float(value).is_integer():
            raise table.refuse(
                self.config,
                "label",
                f"row {row} is {value}, which is no class number",
                "--task_type regression learns numbers",
            )
        if names is None or (value == IGNORE and self.kind == TOKEN):
            return int(value)
        if not 0 <= value < len(names):
            problem = f"row {row} is class {value}, but there are {len(names)}: {_shown({*names})}"
            raise table.refuse(self.config, "label", problem)
        return names[value]

    def _check_labelled(self, table: Table, raw: list[Any], named: bool, seen: Any) -> None:
        """DataError for a split whose labels are withheld.

        -1 is no label of a ClassLabel, nor of a held-out split where no training row has it; a
        split that is -1 all through has none of any type.
        """
        if self.kind in (SINGLE, REGRESSION):
            without = sum(value == UNLABELLED for value in raw)
        else:
            without = sum(UNLABELLED in (value or ()) for value in raw)
        never = self.kind != REGRESSION and (named or (seen is not None and UNLABELLED not in seen))
        if without and (never or without == len(raw)):
            way = (
                "train on a labelled split: --task_train_split train"
                if table.key == "task_train_split"
                else "score on a labelled split, as GLUE's: --task_eval_split validation"
            )
            raise DataError.of(
                table.key,
                table.value,
                f"{without} of {len(raw)} rows have no label ({UNLABELLED}, as GLUE's test rows)",
                way,
                "or leave the split out: task_eval_fraction of the training rows is held out",
            )
