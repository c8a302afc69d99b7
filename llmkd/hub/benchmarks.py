"""The evaluation harness's scores in an `eval.json`, as the card's rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One metric of one task, in the metric's unit; what was not measured is None."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    documents: int | None = None
    documents_total: int | None = None  # more than `documents` if the run was limited
    shots: int | None = None
    others: dict[str, float] = field(default_factory=dict)  # same metric of other models, by name
    gap_closed: float | None = None  # share of the way from baseline to teacher, 1 = all of it

    @property
    def size(self) -> str:
        """How many documents were answered, and of how many where that is not all."""
        if self.documents is None:
            return ""
        limited = self.documents_total not in (None, self.documents)
        return f"{self.documents:,}" + (f" of {self.documents_total:,}" if limited else "")


def read_benchmarks(own: Mapping[str, Any], above: Mapping[str, Any], name: str) -> list[Benchmark]:
    """Rows of `own`, a model's "lm_eval" entry, with what a side-by-side run says of other models.

    `above` is the same entry of the recipe's folder (empty if there is none); there the model goes
    by `name`, in a comparison of its own by `student`.
    """
    compared = mapping(own.get("side_by_side")), mapping(above.get("side_by_side"))
    me = ("student", name)
    rows = []
    for task, record in mapping(own.get("tasks")).items():
        record = mapping(record)
        for metric, score in mapping(record.get("metrics")).items():
            value = finite(mapping(score).get("value"))
            if value is None:
                continue
            others, closed = _beside(compared, me, task, metric)
            rows.append(
                Benchmark(
                    task=str(task),
                    metric=str(metric),
                    value=value,
                    stderr=finite(mapping(score).get("stderr")),
                    documents=_count(record.get("n")),
                    documents_total=_count(record.get("n_total")),
                    shots=_count(record.get("num_fewshot")),
                    others=others,
                    gap_closed=closed,
                )
            )
    return rows


def finite(value: object) -> float | None:
    """`value` if it is a number one can compare (not a bool, not NaN, not infinite), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def mapping(value: object) -> dict[str, Any]:
    """`value` if it is an object of JSON, else an empty one."""
    return value if isinstance(value, dict) else {}


def _beside(
    compared: tuple[dict[str, Any], ...], me: tuple[str, ...], task: str, metric: str
) -> tuple[dict[str, float], float | None]:
    """The other models' values and the gap closed, from the first comparison that holds the row."""
    for mine, comparison in zip(me, compared, strict=True):
        row = mapping(mapping(mapping(comparison.get("tasks")).get(task)).get(metric))
        values = {str(k): finite(v) for k, v in mapping(row.get("values")).items()}
        if mine in values:
            others = {k: v for k, v in values.items() if k != mine and v is not None}
            return others, finite(mapping(row.get("gap_closed")).get(mine))
    return {}, None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
