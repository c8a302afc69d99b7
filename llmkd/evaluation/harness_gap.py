"""How much of the distance from a baseline to its teacher a student covers, and how sure that is.

Every standard error here comes from one number a document, its *influence*: how far that document
moves the metric. Models that answered the same documents are compared document by document, because
two scores over shared documents move together: the error of their difference is much smaller than
the errors of the scores suggest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from llmkd.files import digest

NO_GAP = "teacher and baseline differ by less than the standard error"
INVERTED = "teacher scores below baseline"
UNSURE = "no standard error"

# d(metric) / d(log-likelihood per unit), by the value of the metric; lm_eval gives these no error
_ROLLING = {
    "bits_per_byte": lambda value: -1 / math.log(2),
    "byte_perplexity": lambda value: -value,
    "word_perplexity": lambda value: -value,
}


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one model: `value` and `stderr` in the metric's unit.

    `influence` has one entry a document, in the order of the task, or is None where the metric is
    not a mean or a ratio of sums. `documents` names what was answered (lm_eval's document hashes).
    """

    value: float | None
    stderr: float | None
    influence: tuple[float, ...] | None = None
    documents: str = ""


Scores = dict[str, dict[str, Score]]  # task -> metric -> score


@dataclass(frozen=True, slots=True)
class Gap:
    """`closed` = (student - baseline) / (teacher - baseline) and its error have no unit.

    `note` says why `closed` is None or what to beware of. `gap` = teacher - baseline and its
    `stderr` are in the metric's unit. `paired`: the errors come from documents both answered.
    """

    closed: float | None
    closed_stderr: float | None
    gap: float | None
    stderr: float | None
    paired: bool
    note: str | None


def influences(metric: str, value: float, answers: Sequence[object]) -> tuple[float, ...] | None:
    """One entry a document, in the metric's unit, with sum 0; None for other kinds of metric.

    `answers` is what lm_eval keeps a document: a number (the metric is their mean) or, for rolling
    tasks, (log-likelihood in nats, bytes or words).
    """
    if metric in _ROLLING and all(isinstance(one, (tuple, list)) for one in answers):
        pairs = [(float(one[0]), float(one[1])) for one in answers]  # type: ignore[index]
        units = sum(unit for _, unit in pairs)
        if not units:
            return None
        rate = sum(nats for nats, _ in pairs) / units
        slope = _ROLLING[metric](value) * len(pairs) / units
        return tuple(slope * (nats - rate * unit) for nats, unit in pairs)
    if not all(isinstance(one, Real) for one in answers):
        return None
    numbers = [float(one) for one in answers]  # type: ignore[arg-type]
    if not math.isclose(sum(numbers) / len(numbers), value, rel_tol=1e-9, abs_tol=1e-12):
        return None  # aggregated otherwise (median, maximum): this error would be another metric's
    return tuple(number - value for number in numbers)


def standard_error(influence: Sequence[float] | None) -> float | None:
    """Standard error of the metric, in its unit: over documents, with n - 1; None below two."""
    if influence is None or len(influence) < 2:
        return None
    count = len(influence)
    return math.sqrt(sum(one * one for one in influence) / (count * (count - 1)))


def gap_closed(
    student: Score, teacher: Score, baseline: Score, *, higher_is_better: bool | None = True
) -> Gap:
    """Judge one metric. `closed` is None, with a note, where teacher and baseline differ by less
    than the standard error of that difference: dividing by noise gives any number.

    Turning the metric round changes no quotient; `higher_is_better` tells which end is the better
    one, and a teacher below the baseline gets a note.
    """
    if student.value is None or teacher.value is None or baseline.value is None:
        return Gap(None, None, None, None, False, "a score is missing or not finite")
    gap = teacher.value - baseline.value
    moved = _difference(teacher, baseline)
    stderr = standard_error(moved) if moved is not None else _combined(teacher, baseline)
    paired = moved is not None
    if gap == 0 or (stderr is not None and abs(gap) < stderr):
        return Gap(None, None, gap, stderr, paired, NO_GAP)
    closed = (student.value - baseline.value) / gap
    gained = _difference(student, baseline)
    closed_stderr = None
    if moved is not None and gained is not None:
        # the delta method: how each document moves the quotient
        closed_stderr = standard_error(
            [(a - closed * b) / gap for a, b in zip(gained, moved, strict=True)]
        )
    inverted = higher_is_better is not None and (gap > 0) != higher_is_better
    note = INVERTED if inverted else (UNSURE if stderr is None else None)
    return Gap(closed, closed_stderr, gap, stderr, paired, note)


def compare(
    results: Mapping[str, Mapping[str, Any]], scores: Mapping[str, Scores]
) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {metric: row}} over what `run_tasks` returned for each name.

    row = {"higher_is_better", "n", "values": {name: value}, "stderrs": {name: stderr}} and, where
    both ends of the gap were measured, "gap_closed" and "gap_closed_stderr" ({student: number or
    None}), "gap" (teacher - baseline), "gap_stderr", "gap_paired", "note".
    """
    names = list(results)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for task, record in results[names[0]]["tasks"].items():
        rows[task] = {}
        for metric, first in record["metrics"].items():
            score = {name: scores[name][task][metric] for name in names}
            row: dict[str, Any] = {
                "higher_is_better": first["higher_is_better"],
                "n": record["n"],
                "values": {name: score[name].value for name in names},
                "stderrs": {name: score[name].stderr for name in names},
            }
            rows[task][metric] = row | _gap_keys(score, first["higher_is_better"])
    return rows


def _gap_keys(score: Mapping[str, Score], higher_is_better: bool | None) -> dict[str, Any]:
    students = [name for name in score if name not in ("teacher", "baseline")]
    if "teacher" not in score or "baseline" not in score or not students:
        return {}
    ends = (score["teacher"], score["baseline"])
    gaps = {s: gap_closed(score[s], *ends, higher_is_better=higher_is_better) for s in students}
    # the two ends are the same for every student, so any row tells about them
    one = gaps[students[0]]
    return {
        "gap_closed": {name: gap.closed for name, gap in gaps.items()},
        "gap_closed_stderr": {name: gap.closed_stderr for name, gap in gaps.items()},
        "gap": one.gap,
        "gap_stderr": one.stderr,
        "gap_paired": one.paired,
        "note": one.note,
    }


def scores_of(task: str, raw: Mapping[str, Any]) -> dict[str, Score]:
    """Metric -> score, from lm_eval's "metric,filter" keys (the filter "none" is left out)."""
    samples = raw.get("samples", {}).get(task, [])
    scores: dict[str, Score] = {}
    for key, value in raw["results"][task].items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        mine = [one for one in samples if one["filter"] == kind]
        influence = None
        if _finite(value) is not None and mine and all(metric in one for one in mine):
            influence = influences(metric, value, [one[metric] for one in mine])
        stderr = _finite(raw["results"][task].get(f"{metric}_stderr,{kind}"))
        scores[metric if kind == "none" else key] = Score(
            _finite(value),
            standard_error(influence) if stderr is None else stderr,
            influence,
            digest([one["doc_hash"] for one in mine]) if mine else "",
        )
    return scores


def _difference(one: Score, other: Score) -> list[float] | None:
    """Influences of `one.value - other.value`, or None where the documents are not the same."""
    if one.influence is None or other.influence is None or one.documents != other.documents:
        return None
    return [a - b for a, b in zip(one.influence, other.influence, strict=True)]


def _combined(one: Score, other: Score) -> float | None:
    """Error of a difference of independent scores: the root of the summed squares."""
    if one.stderr is None or other.stderr is None:
        return None
    return math.hypot(one.stderr, other.stderr)


def _finite(value: Any) -> float | None:
    """lm_eval's number, or None for its "N/A" and for what JSON cannot hold."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
