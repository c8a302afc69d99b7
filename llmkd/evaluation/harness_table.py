"""The harness's numbers as `rich` tables: one model, or several side by side with gap closed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmkd.evaluation.harness_gap import INVERTED, NO_GAP, UNSURE


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """One row a metric of `run_tasks`' answer; nothing on ranks that got none."""
    if not results:
        return
    table = _table(f"{results['model']}  (lm_eval {results['lm_eval']})")
    for name in ("value ± stderr", "documents", "shots", "seconds"):
        table.add_column(name, justify="right", no_wrap=name.startswith("value"))
    for task, record in results["tasks"].items():
        head = task
        for metric, score in record["metrics"].items():
            count = f"{record['n']:,}" if record["n"] is not None else ""
            if record["n_total"] and record["n_total"] != record["n"]:
                count += f" of {record['n_total']:,}"
            shots = "" if record["num_fewshot"] is None else str(record["num_fewshot"])
            seconds = f"{record['seconds']:.1f}" if head else ""
            value = _with_error(score["value"], score["stderr"])
            cells = [value, count, shots, seconds]
            table.add_row(head, metric + _arrow(score["higher_is_better"]), *cells)
            head = ""
    (console or Console()).print(table)


def print_side_by_side(compared: Mapping[str, Any], console: Console | None = None) -> None:
    """One row a metric of `side_by_side`'s answer: models in their order, then gap closed.

    The lines under the table say why a gap is missing or upside down.
    """
    if not compared:
        return
    names = list(compared["models"])
    students = [name for name in names if name not in ("teacher", "baseline")]
    with_gap = {"teacher", "baseline"} <= set(names) and bool(students)
    table = _table("side by side, ± standard error")
    for name in names:
        table.add_column(name, justify="right")
    if with_gap:
        for name in students:
            label = "gap closed" if len(students) == 1 else f"gap closed by {name}"
            table.add_column(label, justify="right")
    notes: dict[str, None] = {}
    for task, metrics in compared["tasks"].items():
        head = task
        for metric, row in metrics.items():
            cells = [_with_error(row["values"][name], row["stderrs"][name]) for name in names]
            if with_gap:
                cells += [_gap(row, name) for name in students]
                if row["note"]:
                    notes[_explain(task, metric, row)] = None
            table.add_row(head, metric + _arrow(row["higher_is_better"]), *cells)
            head = ""
    out = console or Console()
    out.print(table)
    for note in notes:
        out.print(note, highlight=False, markup=False)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("metric", no_wrap=True)
    return table


def _gap(row: Mapping[str, Any], student: str) -> str:
    closed, error = row["gap_closed"][student], row["gap_closed_stderr"][student]
    if closed is None:
        return "no gap" if row["note"] == NO_GAP else "n/a"
    mark = "*" if row["note"] in (INVERTED, UNSURE) else ""
    return f"{closed:.0%}{f' ± {error:.0%}' if error is not None else ''}{mark}"


def _explain(task: str, metric: str, row: Mapping[str, Any]) -> str:
    """The line under the table for one row that has no plain gap."""
    gap, error = _number(row["gap"]), _number(row["gap_stderr"])
    kind = "over the same documents" if row["gap_paired"] else "of two independent scores"
    text = f"{task} {metric}: {row['note']} (teacher - baseline = {gap} ± {error}, {kind})"
    if row["note"] == INVERTED:
        text = f"* {text}: 100% means as far below the baseline as the teacher"
    return f"* {text}" if row["note"] == UNSURE else text


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value) if error is None else f"{_number(value)} ± {_number(error)}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"


def _arrow(higher_is_better: bool | None) -> str:
    return "" if higher_is_better is None else (" ↑" if higher_is_better else " ↓")
