"""Stored labels against labels made again."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset

from llmkd.data import TokenRows
from llmkd.errors import DataError
from llmkd.labels import Layout, Store, StorePlan
from llmkd.labels.hidden import Hidden, LowRank
from llmkd.methods.label_run import Labeller, Row
from llmkd.teachers import StoredTeacher

# Another batch, thread count or machine rounds the teacher's products differently; what is larger
# is another teacher, another text or damage.
HIDDEN_TOLERANCE = 0.05  # of the largest magnitude; int8 rounds to 1/127 of a group's largest
MASS_TOLERANCE = 0.05  # mean total variation of a token


Found = tuple[list[tuple[str, str]], list[str]]  # lines of a table, problems


def compare_tokens(store: Store, rows: TokenRows) -> Found:
    """Whether the labels' rows are the recipe's: what can be said without a teacher."""
    stored, made = store.manifest["data"], rows.fingerprint
    if stored != made:
        problem = f"rows (text, tokenizer and packing): the store has {stored}, the recipe {made}"
        return [("rows", "not the recipe's")], [problem]
    try:
        StoredTeacher(store).check_dataset(rows.train)
    except DataError as error:
        return [("rows", "not the recipe's")], [str(error)]
    return [("rows", f"the recipe's ({stored}): same text, tokenizer and packing")], []


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
    count = min(len(starts), max(1, -(-wanted // size)))
    chosen = [starts[i] for i in np.linspace(0, len(starts) - 1, count).astype(int)]
    problems, same, seen, worst = [], 0, 0, 0.0
    for number, at in chosen:
        numbers = plan.shard_rows(number)[at : at + size]
        for made in labeller.rows([rows[int(n)] for n in numbers]):
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
    labels, the largest difference over the largest magnitude for hidden states.
    """
    stored, length = store.columns(made["row"]), made["length"]
    layout = Layout((length,), (0,), length)
    encoding = store.encoding
    if isinstance(encoding, Hidden | LowRank):
        one, other = (encoding.decode([columns], layout).float() for columns in (stored, made))
        return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
    masses = []
    for columns in (stored, made):
        ids_TK, probs_TK = (x[0] for x in encoding.decode([columns], layout))
        dense_TV = torch.zeros(length, encoding.shared)
        masses.append(dense_TV.scatter_add_(-1, ids_TK, probs_TK))
    return float(0.5 * (masses[0] - masses[1]).abs().sum(-1).mean())


def _tolerance(store: Store) -> float:
    hidden = isinstance(store.encoding, Hidden | LowRank)
    return HIDDEN_TOLERANCE if hidden else MASS_TOLERANCE


def _unit(store: Store) -> str:
    if isinstance(store.encoding, Hidden | LowRank):
        return "of the largest magnitude"
    return "mean total variation of a token"


def print_lines(lines: list[tuple[str, str]]) -> None:
    """Two columns on the terminal."""
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
