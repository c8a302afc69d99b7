"""An ERNIE-Tiny run folder as data: its arms, their stages, the teacher, and the rows of the table.

A part that is missing (an arm that did not finish, a latency nobody measured) is None here and "-"
in the table; nothing in this file raises for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd.evaluation.task_metrics import SCORES
from llmkd.files import read_json

IN_PERCENT = ("accuracy", "macro_f1", "f1", "micro_f1", "exact_match", "token_accuracy")
ORDER = ("gd", "ged", "tad", "tsd")  # as the paper goes through them


@dataclass(frozen=True)
class DistillStage:
    """One stage as `run.json` tells of it; `folder` is None where it cannot be found any more."""

    facts: dict[str, Any]
    folder: Path | None
    arms: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its short name: gd, ged, tad, tsd."""
        return str(self.facts.get("name", "stage"))

    def what(self) -> str:
        """In words who teaches, on what, by which losses."""
        teacher, words = self.facts.get("teacher"), {"finetuned": "fine-tuned"}
        parts = [
            "no teacher" if teacher in (None, "none") else f"{words.get(teacher, teacher)} teacher",
            f"{self.facts['data']} text" if self.facts.get("data") else "",
            " + ".join(self.facts.get("losses") or ()),
            f"{self.facts['steps']:,} steps" if self.facts.get("steps") is not None else "",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class DistillArm:
    """One arm: `task` holds its scores by name, `latency` what `compare_latency` gave."""

    name: str
    folder: Path
    facts: dict[str, Any]
    task: dict[str, Any]
    latency: dict[str, Any]
    stages: tuple[DistillStage, ...]


@dataclass(frozen=True)
class DistillRun:
    """The whole folder. `metric` is the main score; `teacher` has the teacher's scores by name."""

    folder: Path
    facts: dict[str, Any]
    metric: str
    arms: tuple[DistillArm, ...]
    teacher: dict[str, Any]
    teacher_facts: dict[str, Any]

    @property
    def teacher_folder(self) -> Path:
        """Where the fine-tuned teacher lies, if this run made it."""
        return self.folder / "teacher"

    @property
    def teacher_score(self) -> float | None:
        """The teacher's main score on the same examples."""
        return self.teacher.get(self.metric)

    def stages(self) -> list[DistillStage]:
        """Every stage once, with all the arms that share it; in the paper's order, then the
        arms'.
        """
        found: dict[Any, DistillStage] = {}
        for arm in self.arms:
            for place, stage in enumerate(arm.stages):
                same = stage.folder or stage.facts.get("key") or (arm.name, place)
                arms = (*found[same].arms, arm.name) if same in found else (arm.name,)
                found[same] = DistillStage(stage.facts, stage.folder, arms)
        return sorted(found.values(), key=lambda s: (*ORDER, s.name).index(s.name))


@dataclass(frozen=True)
class ArmRow:
    """A row of the table. Ratios are teacher / student, `retention` is student / teacher."""

    name: str
    score: float | None
    retention: float | None
    parameters: int | None
    smaller: float | None
    batch_1_ms: float | None
    speed_up_1: float | None
    batch_32_ms: float | None
    speed_up_32: float | None
    minutes: float | None


def read_run(folder: Path) -> DistillRun:
    """Everything `run.json` and `eval.json` of the folder, its arms and its teacher say."""
    facts, scores = read_json(folder / "run.json") or {}, read_json(folder / "eval.json") or {}
    names = facts.get("arms")
    places = {n: folder / n for n in names} if names else {facts.get("name", "student"): folder}
    told = (scores.get("arms") or {}) if names else {}
    arms = [_arm(name, path, folder, told.get(name)) for name, path in places.items()]
    arms = [arm for arm in arms if arm.facts or arm.task]
    made = read_json(folder / "teacher" / "eval.json") or scores.get("teacher") or {}
    metric = _metric(facts, arms)
    teacher = dict(made.get("task", made))
    if metric not in teacher:
        known = [(arm.facts.get("teacher") or {}).get("score") for arm in arms]
        teacher[metric] = next((score for score in known if score is not None), None)
    return DistillRun(
        folder,
        facts,
        metric,
        tuple(arms),
        teacher,
        read_json(folder / "teacher" / "run.json") or {},
    )


def table_rows(run: DistillRun) -> list[ArmRow]:
    """One row an arm, and the teacher's last where anything is known of it."""
    rows = [_row(run, arm) for arm in run.arms]
    own = [arm.latency.get("teacher") or {} for arm in run.arms]
    sizes = [(arm.facts.get("teacher") or {}).get("parameters") for arm in run.arms]
    sizes += [(run.teacher_facts.get("student") or {}).get("parameters")]
    size = next((size for size in sizes if size), None)
    score, seconds = run.teacher_score, run.teacher_facts.get("wall_seconds")
    times = [_median([one.get(f"batch_{n}_ms") for one in own]) for n in (1, 32)]
    if score is not None or size is not None:
        even = [None if t is None else 1.0 for t in times]
        rows.append(
            ArmRow(
                name="teacher",
                score=score,
                retention=None if score is None else 1.0,
                parameters=size,
                smaller=None if size is None else 1.0,
                batch_1_ms=times[0],
                speed_up_1=even[0],
                batch_32_ms=times[1],
                speed_up_32=even[1],
                minutes=None if seconds is None else seconds / 60,
            )
        )
    return rows


def headings(metric: str) -> tuple[tuple[str, Callable[[ArmRow], str]], ...]:
    """Head and content of every column."""
    return (
        ("arm", lambda r: r.name),
        (metric.replace("_", " "), lambda r: show_score(metric, r.score)),
        ("retention", lambda r: _number(r.retention, ".1%")),
        ("parameters", lambda r: show_size(r.parameters)),
        ("smaller", lambda r: _number(r.smaller, ".1f", "x")),
        ("ms, batch 1", lambda r: _number(r.batch_1_ms, ".3g")),
        ("speed-up", lambda r: _number(r.speed_up_1, ".1f", "x")),
        ("ms, batch 32", lambda r: _number(r.batch_32_ms, ".4g")),
        ("speed-up, 32", lambda r: _number(r.speed_up_32, ".1f", "x")),
        ("minutes", lambda r: _number(r.minutes, ".1f")),
    )


def show_score(metric: str, value: float | None) -> str:
    """Shares in percent, correlations as they are."""
    return _number(value, ".2%" if metric in IN_PERCENT else ".4f")


def show_size(number: int | None) -> str:
    """A number of parameters, in thousands or millions from there on."""
    if number is None or number < 1000:
        return _number(number, ",")
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} K"


def arm_seconds(arm: DistillArm) -> float | None:
    """Seconds of training all of the arm's stages, those it shares with others in full."""
    known = [s.facts["wall_seconds"] for s in arm.stages if s.facts.get("wall_seconds") is not None]
    return sum(known) if known else arm.facts.get("wall_seconds")


def _arm(name: str, folder: Path, out: Path, told: dict[str, Any] | None) -> DistillArm:
    facts, scores = read_json(folder / "run.json") or {}, read_json(folder / "eval.json")
    scores = scores or told or {}
    flat = {k: v for k, v in scores.items() if isinstance(v, int | float)}
    stages = tuple(
        DistillStage(stage, _find(stage.get("folder"), (out, folder, out.parent)), (name,))
        for stage in facts.get("stages") or ()
    )
    latency = scores.get("latency") or {}
    return DistillArm(name, folder, facts, scores.get("task") or flat, latency, stages)


def _find(told: str | None, roots: tuple[Path, ...]) -> Path | None:
    """The stage's folder, also after the whole run folder moved to another place or machine."""
    if not told:
        return None
    path = Path(told)
    ends = [path]
    if path.is_absolute():
        ends = [Path(*path.parts[start:]) for start in range(1, len(path.parts))]
    tried = [*([path] if path.is_absolute() else []), *(r / end for end in ends for r in roots)]
    return next((p.resolve() for p in tried if (p / "metrics.jsonl").is_file()), None)


def _metric(facts: dict[str, Any], arms: list[DistillArm]) -> str:
    task = facts.get("task") or next((a.facts["task"] for a in arms if a.facts.get("task")), {})
    if task.get("metric"):
        return task["metric"]
    if task.get("kind") in SCORES:
        return SCORES[task["kind"]][0]
    usual = [name for names in SCORES.values() for name in names]
    return next((n for arm in arms for n in arm.task if n in usual), "accuracy")


def _row(run: DistillRun, arm: DistillArm) -> ArmRow:
    score, best = arm.task.get(run.metric), run.teacher_score
    size = (arm.facts.get("student") or {}).get("parameters")
    whole = (arm.facts.get("teacher") or {}).get("parameters")
    whole = whole or (run.teacher_facts.get("student") or {}).get("parameters")
    own, seconds = arm.latency.get("student") or {}, arm_seconds(arm)
    unfinished = arm.facts.get("status", "done") != "done"
    return ArmRow(
        name=f"{arm.name} ({arm.facts['status']})" if unfinished else arm.name,
        score=score,
        retention=score / best if score is not None and best and best > 0 else None,
        parameters=size,
        smaller=whole / size if whole and size else None,
        batch_1_ms=own.get("batch_1_ms"),
        speed_up_1=_speed_up(arm.latency, 1),
        batch_32_ms=own.get("batch_32_ms"),
        speed_up_32=_speed_up(arm.latency, 32),
        minutes=None if seconds is None else seconds / 60,
    )


def _speed_up(latency: dict[str, Any], batch: int) -> float | None:
    """Teacher time / student time: round by round where that is known, else of the medians."""
    known = (latency.get("ratio") or {}).get(f"batch_{batch}")
    if known is not None:
        return known
    times = [(latency.get(who) or {}).get(f"batch_{batch}_ms") for who in ("teacher", "student")]
    return times[0] / times[1] if times[0] and times[1] else None


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit
