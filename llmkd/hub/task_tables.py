"""The tables of an ERNIE-Tiny run's card: lists of paragraphs, empty where nothing is known."""

from __future__ import annotations

import re
from typing import Any

from llmkd.hub.benchmarks import finite, mapping
from llmkd.hub.card_parts import (
    benchmark_table,
    duration,
    linked,
    pairs,
    score,
    show,
    table,
    teacher_rows,
)
from llmkd.hub.task_facts import METRICS, TaskFacts, ratio, title_of

LABELS_SHOWN = 20
TASK_DATA = (
    ("source", "source"),
    ("fingerprint", "fingerprint"),
    ("kind", "kind of task"),
    ("labels", "labels"),
    ("metric", "main score"),
    ("train_examples", "training examples"),
    ("eval_examples", "dev examples"),
    ("max_length", "longest text (tokens)"),
)
GENERAL_DATA = (
    ("source", "source"),
    ("fingerprint", "fingerprint"),
    ("train_tokens", "training tokens"),
)
SIZES = (  # key of student and teacher, title, whether a quotient says something
    ("parameters", "parameters", True),
    ("mib", "weights (MiB)", True),
    ("layers", "layers", False),
    ("hidden_size", "width", False),
    ("heads", "attention heads", False),
    ("intermediate_size", "width of the feed-forward layers", False),
)
STAGE_COLUMNS = (
    ("name", "stage"),
    ("teacher", "teacher"),
    ("data", "data"),
    ("losses", "losses"),
    ("steps", "optimizer steps"),
    ("wall_seconds", "wall time (h:mm:ss)"),
)
WORDS = {"finetuned": "fine-tuned on the task", "general": "general text", "task": "task text"}
LOSSES = {
    "latent": "the teacher's attention and hidden states, layer by layer",
    "soft": "the teacher's outputs",
    "hard": "the labels",
}


def score_columns(run: TaskFacts, models: list[dict[str, Any]]) -> list[str]:
    """Scores that one of `models` has, the main one first. Rows of arms hold more than scores."""
    keys = [key for scores in models for key in scores if key in METRICS]
    main = [key for key in (run.metric,) if key and any(key in scores for scores in models)]
    return list(dict.fromkeys(main + keys))


def scores(run: TaskFacts) -> list[str]:
    """Dev scores beside those of the recipe's other arms and of the teacher, then benchmarks."""
    models = {f"**{run.facts.name}** (this model)": run.own, **run.others}
    models["teacher"] = run.teacher_scores
    models = {name: scores for name, scores in models.items() if scores}
    columns = score_columns(run, list(models.values()))
    parts = []
    if columns:
        kept = {name: run.retention(scores) for name, scores in models.items()}
        shares = any(value is not None for value in kept.values())
        rows = [
            [
                name,
                *(score(scores.get(key)) for key in columns),
                *([_percent(kept[name])] if shares else []),
            ]
            for name, scores in models.items()
        ]
        last = [f"of the teacher's {title_of(run.metric or '')}"] if shares else []
        heads = ["model", *map(title_of, columns), *last]
        parts += [_dev_set(run), table(heads, rows)]
    if run.facts.benchmarks:
        parts += ["Benchmarks (`lm_eval`, ± standard error):", benchmark_table(run.facts)]
    return parts


def _dev_set(run: TaskFacts) -> str:
    """The line above the scores: on what they were measured."""
    count = run.own.get("examples") or run.task.get("eval_examples")
    unit = "counted tokens" if run.task.get("kind") == "token" else "examples"
    unit = unit if run.own.get("examples") else "examples"
    size = f" ({show(count)} {unit})" if count else ""
    source = run.task.get("source")
    where = f"Dev part of {_source(run, run.task)}" if source else "Dev set"
    return f"{where}{size}:"


def sizes(run: TaskFacts) -> list[str]:
    """Student beside teacher: parameters, shape, milliseconds a forward pass."""
    mine, theirs = mapping(run.latency.get("student")), mapping(run.latency.get("teacher"))
    cells: list[tuple[str, Any, Any, float | None]] = []
    for key, title, divides in SIZES:
        one, other = run.student.get(key), run.teacher.get(key)
        if one is not None:
            cells.append((title, one, other, ratio(other, one) if divides else None))
    for key in mine:
        found = re.fullmatch(r"batch_(\d+)_ms", key)
        if found:
            one, other = mine[key], theirs.get(key)
            times = finite(mapping(run.latency.get("ratio")).get(f"batch_{found[1]}"))
            title = f"milliseconds a forward pass, batch {found[1]}"
            cells.append((title, one, other, times or ratio(other, one)))
    if not cells:
        return []
    if all(other is None for _, _, other, _ in cells):
        return [table(["", "this model"], [[title, show(one)] for title, one, *_ in cells])]
    rows = [
        [title, show(one), show(other), f"{times:.2f}" if times else "-"]
        for title, one, other, times in cells
    ]
    return [table(["", "this model", "teacher", "teacher / this model"], rows), _clock(mine)]


def _clock(measured: dict[str, Any]) -> str:
    """How the milliseconds were taken."""
    known = {
        "rows of {} tokens": measured.get("length"),
        "{} CPU thread(s)": measured.get("threads"),
        "on `{}`": measured.get("device"),
    }
    told = [form.format(value) for form, value in known.items() if value]
    return f"Latency: {', '.join(told)}." if told else ""


def teacher(run: TaskFacts) -> list[str]:
    """The teacher's model and its score."""
    rows = teacher_rows(run.facts)
    if not rows:
        return []
    top = finite(run.teacher_scores.get(run.metric or ""))
    rows += (
        [[f"{title_of(run.metric or '')} on the dev set", score(top)]] if top is not None else []
    )
    here = run.teacher.get("finetuned_here")
    if run.task and isinstance(here, bool):
        rows.append(["fine-tuned on the task", "in this run" if here else "before this run"])
    return [table(["", ""], rows)]


def stages(run: TaskFacts) -> list[str]:
    """What each stage learned from whom on what, and what the losses' names mean."""
    columns = [(key, name) for key, name in STAGE_COLUMNS if any(key in s for s in run.stages)]
    if not columns:
        return []
    rows = [[_stage_cell(key, stage.get(key)) for key, _ in columns] for stage in run.stages]
    used = {name for stage in run.stages for name in _losses(stage)}
    legend = [f"`{name}`: match {means}" for name, means in LOSSES.items() if name in used]
    every = "All settings are in `recipe.yaml`." if run.facts.recipe else ""
    return [
        table([name for _, name in columns], rows),
        f"Losses: {'; '.join(legend)}." if legend else "",
        every,
    ]


def _stage_cell(key: str, value: Any) -> str:
    if key == "losses":
        return " + ".join(_losses({key: value})) or "-"
    if key == "wall_seconds":
        return "-" if finite(value) is None else duration(value)
    return WORDS.get(str(value), show(value)) if key in ("teacher", "data") else show(value)


def _losses(stage: dict[str, Any]) -> list[str]:
    names = stage.get("losses")
    return [str(name) for name in names] if isinstance(names, list) else []


def data(run: TaskFacts) -> list[str]:
    """The task's text and labels, and the general text."""
    labels = run.task.get("labels")
    shown = _labels(labels) if isinstance(labels, list) else None
    task = pairs(TASK_DATA, {**run.task, "source": _source(run, run.task), "labels": shown})
    text = pairs(GENERAL_DATA, {**run.general, "source": _source(run, run.general)})
    named = (("The task:", task), ("General text, without labels:", text))
    return [part for name, values in named if values for part in (name, values)]


def _labels(labels: list[Any]) -> str:
    more = len(labels) - LABELS_SHOWN
    shown = ", ".join(map(str, labels[:LABELS_SHOWN]))
    return f"{shown} and {more:,} more" if more > 0 else shown


def _source(run: TaskFacts, section: dict[str, Any]) -> str:
    names = [source.name for source in run.sources(section)]
    return linked(run.facts, str(section.get("source") or ""), names)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
