"""Stored labels against labels made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset

from llmkd.errors import DataError
from llmkd.labels import Dense, Layout, Store, StorePlan
from llmkd.labels.hidden import Hidden, LowRank
from llmkd.labels.manifest import differences
from llmkd.methods.label_run import Labeller, Row
from llmkd.teachers import StoredTeacher
from llmkd.teachers.stored_classes import StoredClasses

# Another batch, thread count or machine rounds the teacher's products differently; what is larger
# is another teacher, another text or damage.
HIDDEN_TOLERANCE = 0.05  # of the largest magnitude; int8 rounds to 1/127 of a group's largest
NUMBERS = (Hidden, LowRank, Dense)  # encodings that are no list of probabilities
MASS_TOLERANCE = 0.05  # mean total variation of a token


Found = tuple[list[tuple[str, str]], list[str]]  # lines of a table, problems
Batch = TypeVar("Batch")


def without_teacher(
    store: Store, reader: StoredTeacher | StoredClasses, data: str, rows: Any, why: object
) -> Found:
    """What can be said of a store whose teacher is gone: whether its rows are the recipe's `rows`
    with the fingerprint `data`; of a stream that alone is compared.
    """
    lines, problems = _compare_tokens(store, reader, data, rows)
    nothing = ("recomputed", "nothing: that needs the teacher")
    return [("teacher", str(why)), *lines, nothing], problems


def _compare_tokens(
    store: Store, reader: StoredTeacher | StoredClasses, data: str, rows: Any
) -> Found:
    stored = store.manifest["data"]
    if stored != data:
        problem = f"rows (text, tokenizer and packing): the store has {stored}, the recipe {data}"
        return [("rows", "not the recipe's")], [problem]
    try:
        reader.check_dataset(rows)
    except DataError as error:
        return [("rows", "not the recipe's")], [str(error)]
    return [("rows", f"the recipe's ({stored}): same text, tokenizer and packing")], []


def check_same(store: Store, plan: StorePlan, recipe: object) -> None:
    """DataError where the recipe would make another store, naming every setting."""
    if plan.key != store.manifest["key"]:
        raise DataError.of(
            "recipe",
            str(recipe),
            "does not make this store:\n    "
            + "\n    ".join(differences(store.manifest, plan.settings)),
            "give the recipe it was made with: --recipe FILE",
        )


def compare_rows(
    store: Store, plan: StorePlan, labeller: Labeller, rows: Dataset, wanted: int
) -> Found:
    """Label about `wanted` rows again, in the batches they were made in; a table and problems."""
    size = labeller.batch_size
    starts = [
        (number, at)
        for number in range(plan.shards)
        for at in range(0, len(plan.shard_rows(number)), size)
    ]

    def label(start: tuple[int, int]) -> list[Row]:
        number, at = start
        numbers = plan.shard_rows(number)[at : at + size]
        return labeller.rows([rows[int(n)] for n in numbers])

    return compare_batches(store, starts, label, -(-wanted // size))


def compare_batches(
    store: Store, batches: Sequence[Batch], label: Callable[[Batch], list[Row]], wanted: int
) -> Found:
    """Label `wanted` batches (at least one), spread over the store, again; a table and problems."""
    count = min(len(batches), max(1, wanted))
    problems, same, seen, worst = [], 0, 0, 0.0
    for place in np.linspace(0, len(batches) - 1, count).astype(int):
        for made in label(batches[place]):
            seen += 1
            stored = store.columns(made["row"])
            if all(np.array_equal(stored[name], made[name]) for name in stored):
                same += 1
                continue
            gap = distance(store, made)
            worst = max(worst, gap)
            if gap > _tolerance(store):
                problems.append(f"row {made['row']}: its labels differ from new ones by {gap:.3g}")
    table = [
        ("recomputed", f"{seen} rows: {same} identical to the last bit"),
        ("largest difference", f"{worst:.2g} (tolerance {_tolerance(store):g}, {_unit(store)})"),
    ]
    return table, problems


def distance(store: Store, made: Row) -> float:
    """How far a row's stored label lies from a new one: mean total variation of a token for sparse
    labels, the largest difference over the largest magnitude for hidden states and logits.
    """
    stored, length = store.columns(made["row"]), made["length"]
    layout = Layout((length,), (0,), length)
    encoding = store.encoding
    if isinstance(encoding, NUMBERS):
        one, other = (encoding.decode([columns], layout).float() for columns in (stored, made))
        return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
    masses = []
    for columns in (stored, made):
        ids_TK, probs_TK = (x[0] for x in encoding.decode([columns], layout))
        dense_TV = torch.zeros(length, encoding.shared)
        masses.append(dense_TV.scatter_add_(-1, ids_TK, probs_TK))
    return float(0.5 * (masses[0] - masses[1]).abs().sum(-1).mean())


def _tolerance(store: Store) -> float:
    numbers = isinstance(store.encoding, NUMBERS)
    return HIDDEN_TOLERANCE if numbers else MASS_TOLERANCE


def _unit(store: Store) -> str:
    if isinstance(store.encoding, NUMBERS):
        return "of the largest magnitude"
    return "mean total variation of a token"


def print_lines(lines: list[tuple[str, str]]) -> None:
    """Two columns on the terminal."""
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
