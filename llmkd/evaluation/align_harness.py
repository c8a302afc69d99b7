"""What alignment cost elsewhere: `lm_eval` before and after, from a run folder's `eval.json`.

`llmkd eval RUN --baseline BASE --tasks ...` writes it: BASE is before, RUN is after, both on the
same documents.
"""

from __future__ import annotations

import math
from typing import Any

from llmkd.evaluation.align_run import number, section
from llmkd.evaluation.page import table, text

BEFORE, TEACHER = "baseline", "teacher"
WORDS = (
    "lm_eval on the model this run started from (before) and its last iterate (after), ± standard "
    "error. The error of the change is that of scores on different documents; on the same ones, as "
    "here, it is usually smaller."
)


def harness_rows(scores: dict[str, Any]) -> list[list[str]]:
    """[task, metric, documents, before, after, change] a metric; "-" for what was not measured."""
    lm_eval = section(scores, "lm_eval")
    compared = section(section(lm_eval, "side_by_side"), "tasks")
    rows = [
        _compared(task, metric, section(compared[task], metric))
        for task in compared
        for metric in section(compared, task)
    ]
    for task, record in section(lm_eval, "tasks").items():
        if task in compared or not isinstance(record, dict):
            continue
        for metric, score in section(record, "metrics").items():
            score = score if isinstance(score, dict) else {}
            after = _score(number(score.get("value")), number(score.get("stderr")))
            name = metric + _arrow(score.get("higher_is_better"))
            rows.append([task, name, _count(record.get("n")), "-", after, "-"])
    return rows


def harness_table(scores: dict[str, Any]) -> str:
    """The section of the page; "" where no harness task was run."""
    rows = harness_rows(scores)
    if not rows:
        return ""
    heads = ("task", "metric", "documents", "before", "after", "change")
    return f'<h2>Evaluation harness</h2>{table(heads, rows)}<p class="dim">{text(WORDS)}</p>'


def _compared(task: str, metric: str, row: dict[str, Any]) -> list[str]:
    values, errors = section(row, "values"), section(row, "stderrs")
    mine = next((name for name in values if name not in (BEFORE, TEACHER)), "")
    before, after = number(values.get(BEFORE)), number(values.get(mine))
    old, new = number(errors.get(BEFORE)), number(errors.get(mine))
    change = "-"
    if before is not None and after is not None:
        error = None if old is None or new is None else math.hypot(old, new)
        change = _score(after - before, error, "+.4f")
    name = metric + _arrow(row.get("higher_is_better"))
    return [task, name, _count(row.get("n")), _score(before, old), _score(after, new), change]


def _score(value: float | None, error: float | None, form: str = ".4f") -> str:
    if value is None:
        return "-"
    return format(value, form) + ("" if error is None else f" ± {error:.4f}")


def _count(value: Any) -> str:
    found = number(value)
    return "-" if found is None else f"{found:,.0f}"


def _arrow(higher_is_better: Any) -> str:
    return "" if higher_is_better is None else (" ↑" if higher_is_better else " ↓")
