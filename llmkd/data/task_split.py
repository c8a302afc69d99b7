"""Which rows of a task are held out, and which are kept for training."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmkd.data.task_config import MULTI, REGRESSION, SINGLE
from llmkd.objectives.token import IGNORE


def some(rows: int, count: int | None, seed: int) -> list[int]:
    """`count` random row numbers in ascending order; all where None or not fewer. With one seed a
    larger count holds the smaller one's rows.
    """
    if count is None or count >= rows:
        return list(range(rows))
    return sorted(np.random.default_rng(seed).permutation(rows)[:count].tolist())


def of_each_class(labels: list[int], count: int, seed: int) -> tuple[list[int], dict[int, int]]:
    """`count` random rows of each class, ascending, and how many rows the classes have that have
    fewer (all are kept). A larger count holds the smaller one's rows.
    """
    places: list[int] = []
    short: dict[int, int] = {}
    for label, members in _by_class(labels).items():
        # a generator of its own: the rows of a class do not depend on the other classes
        order = np.random.default_rng([seed, label]).permutation(members)
        places += order[:count].tolist()
        if len(members) < count:
            short[label] = len(members)
    return sorted(places), short


def held_out_places(labels: list[Any], kind: str, fraction: float, seed: int) -> list[int]:
    """Row numbers that are held out, ascending: `fraction` of the rows, at least one.

    Single labels keep their shares, to the row. No label is held out that training does not keep:
    a class of one row stays. Empty where nothing can be held out.
    """
    count = max(1, round(len(labels) * fraction))
    rng = np.random.default_rng(seed)
    if kind == SINGLE:
        return _stratified(labels, count, fraction, rng)
    order = rng.permutation(len(labels)).tolist()
    held_out, train = order[: min(count, len(labels) - 1)], order[count:]
    if kind == REGRESSION:
        return sorted(held_out)
    seen = {value for place in train for value in _values(labels[place], kind)}
    kept = []
    for place in held_out:
        found = _values(labels[place], kind)
        if found <= seen:
            kept.append(place)
        seen |= found
    return sorted(kept)


def _stratified(
    labels: list[int], count: int, fraction: float, rng: np.random.Generator
) -> list[int]:
    """Shares by largest remainder: every class gets the whole part of its quota, the classes with
    the largest rest one row more until `count` are found.
    """
    classes = _by_class(labels)
    quotas = {label: len(members) * fraction for label, members in classes.items()}
    takes = {label: min(int(quota), len(classes[label]) - 1) for label, quota in quotas.items()}
    by_rest = sorted(quotas, key=lambda label: (takes[label] - quotas[label], label))
    for label in by_rest:
        if sum(takes.values()) < count and takes[label] < len(classes[label]) - 1:
            takes[label] += 1
    places: list[int] = []
    for label, members in classes.items():
        places += rng.permutation(members)[: takes[label]].tolist()
    return sorted(places)


def _by_class(labels: list[int]) -> dict[int, list[int]]:
    """Row numbers of each class, classes ascending."""
    found: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        found.setdefault(label, []).append(place)
    return dict(sorted(found.items()))


def _values(label: list[Any], kind: str) -> set[int]:
    if kind == MULTI:
        return {place for place, on in enumerate(label) if on}
    return set(label) - {IGNORE}
