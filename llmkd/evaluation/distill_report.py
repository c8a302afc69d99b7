"""`report.html` of an ERNIE-Tiny run, made again from the run folder at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkd.evaluation.compare import read_metrics
from llmkd.evaluation.distill_arms import (
    DistillArm,
    DistillRun,
    DistillStage,
    arm_seconds,
    headings,
    read_run,
    show_score,
    show_size,
    table_rows,
)
from llmkd.evaluation.distill_plots import COUNTED, PANELS, draw_arms, draw_stages
from llmkd.evaluation.page import count, facts_table, figure, page, table, text, write_picture
from llmkd.files import write_text

STAGES = {
    "gd": "general distillation",
    "ged": "general-enhanced distillation",
    "tad": "task-adaptive distillation",
    "tsd": "task-specific distillation",
}
CAPTION = (
    "Retention is the student's score / the teacher's; smaller is the teacher's parameters / the "
    "student's; speed-up is the teacher's time for a forward pass / the student's, measured in turn"
)
ONE_SEED = (
    "One seed is one draw: a difference smaller than the spread between seeds means nothing, and "
    "one that matters needs several seeds and a paired test."
)
NOT_ON_A_TERMINAL = ("parameters", "ms, batch 1", "ms, batch 32")  # 80 columns


def write_distill_report(folder: Path) -> Path:
    """Write `report.html`, `curves.png` (losses of every stage) and `arms.png` (scores) into a run
    folder; returns the page. What the folder does not hold yet is left out.
    """
    run = read_run(folder)
    pictures = {
        "curves.png": draw_stages([(_title(s), s.folder) for s in run.stages() if s.folder]),
        "arms.png": draw_arms(run, _panels(run)),
    }
    for name, picture in pictures.items():
        if picture:
            write_picture(folder / name, picture)
    body = [_head(run), _table(run), _arms(run), _curves(run)]
    body += ["<h2>How each was made</h2>", *(_made(run, arm) for arm in run.arms), _teacher(run)]
    if not run.arms:
        body = [_head(run), "<p>No arm has begun yet.</p>", _teacher(run)]
    write_text(folder / "report.html", page(f"llmkd: {folder.name}", "".join(body)))
    return folder / "report.html"


def print_arm_table(folder: Path) -> None:
    """The arms of a run folder on the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    run = read_run(folder)
    shown = [head for head in headings(run.metric) if head[0] not in NOT_ON_A_TERMINAL]
    title = "scores on the evaluation set"
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0))
    for heading, _ in shown:
        justify = "left" if heading == "arm" else "right"
        grid.add_column(heading, justify=justify, no_wrap=True, min_width=len(heading))
    for row in table_rows(run):
        grid.add_row(*(Text(show(row)) for _, show in shown))  # a name may hold [brackets]
    console = Console()
    console.print(grid)
    console.print(f"{CAPTION}.", style="dim", highlight=False)


def _head(run: DistillRun) -> str:
    arm = run.arms[0].facts if run.arms else {}
    task = run.facts.get("task") or arm.get("task") or {}
    general = run.facts.get("general") or arm.get("general") or {}
    seconds = sum(stage.facts.get("wall_seconds") or 0 for stage in run.stages())
    seconds = seconds or sum(arm_seconds(arm) or 0 for arm in run.arms)
    peak = max((a.facts.get("peak_memory_bytes") or 0 for a in run.arms), default=0)
    seed = run.facts.get("seed", arm.get("seed"))
    facts = [
        f"task: {task['source']}" + _kind(task) if task.get("source") else "",
        _examples(task),
        f"general text: {general['source']}, {count(general.get('train_tokens'))} tokens"
        if general.get("source")
        else "",
        f"{seconds / 60:.0f} minutes of distillation" if seconds else "",
        f"peak memory {peak / 2**30:.1f} GiB" if peak else "",
        f"seed {seed}" if seed is not None else "",
    ]
    line = " · ".join(text(fact) for fact in facts if fact)
    return f'<h1>ERNIE-Tiny: {text(run.folder.name)}</h1><p class="dim">{line}</p>'


def _kind(task: dict[str, Any]) -> str:
    labels = task.get("labels")
    many = len(labels) if isinstance(labels, list | tuple | dict) else labels
    kind = str(task.get("kind") or "").replace("_", " ")
    words = [kind, f"{many} labels" if many and task.get("kind") != "regression" else ""]
    shown = ", ".join(word for word in words if word)
    return f" ({shown})" if shown else ""


def _examples(task: dict[str, Any]) -> str:
    known = ((task.get("train_examples"), "to train"), (task.get("eval_examples"), "to evaluate"))
    parts = [f"{number:,} {use}" for number, use in known if number is not None]
    return " and ".join(parts) + " on" if parts else ""


def _table(run: DistillRun) -> str:
    columns = headings(run.metric)
    rows = [[show(row) for _, show in columns] for row in table_rows(run)]
    sizes = [arm.latency.get("student") or {} for arm in run.arms]
    how = next((s for s in sizes if s.get("length")), {})
    clock = ""
    if how:
        threads = f"{how['threads']} thread{'s' if how['threads'] > 1 else ''}"
        clock = f" ({how['length']} tokens, {how['device']}, {threads}, median)"
    return (
        f"<h2>Scores on the evaluation set</h2>{table((head for head, _ in columns), rows)}"
        f'<p class="dim">{text(CAPTION + clock)}, for one row and for 32 at once. Minutes are the '
        "training of all stages of an arm, those it shares with others in full, without the "
        f"teacher's. {ONE_SEED}</p>"
    )


def _panels(run: DistillRun) -> tuple[str, ...]:
    scored = [arm for arm in run.arms if arm.task.get(run.metric) is not None]
    return PANELS if len(scored) > 1 else PANELS[:1]


def _arms(run: DistillRun) -> str:
    captions = {
        PANELS[0]: "Scores of the arms; dashed: the teacher.",
        PANELS[1]: "The same close up"
        + (", ± one standard error of the examples." if run.metric in COUNTED else "."),
    }
    pictures = [(draw_arms(run, (panel,)), captions[panel]) for panel in _panels(run)]
    figures = "".join(figure(picture, caption) for picture, caption in pictures if picture)
    return f'<div class="pair">{figures}</div>' if figures else ""


def _curves(run: DistillRun) -> str:
    figures = ""
    for stage in run.stages():
        picture = draw_stages([(_title(stage), stage.folder)]) if stage.folder else None
        if picture:
            figures += figure(picture, _caption(run, stage))
    if not figures:
        return ""
    return (
        f'<h2>Losses of the stages</h2><div class="grid">{figures}</div>'
        '<p class="dim">Total and parts against optimizer steps; rings: held-out examples. Losses '
        "of different stages have different parts and cannot be compared.</p>"
    )


def _title(stage: DistillStage) -> str:
    first, *others = stage.arms
    return f"{stage.name}: {first}" + (f" and {len(others)} more" if others else "")


def _caption(run: DistillRun, stage: DistillStage) -> str:
    name = STAGES.get(stage.name)
    words = [
        f"{stage.name}{f', {name}' if name else ''}: {stage.what()}",
        f"Arm{'s' if len(stage.arms) > 1 else ''}: {', '.join(stage.arms)}",
    ]
    key = f"eval_{run.metric}"
    last = [m[key] for m in read_metrics(stage.folder) if key in m] if stage.folder else []
    if last:
        words.append(
            f"{run.metric.replace('_', ' ')} at its end: {show_score(run.metric, last[-1])}"
        )
    return ". ".join(words) + "."


def _made(run: DistillRun, arm: DistillArm) -> str:
    heads = ("stage", "teacher", "data", "losses", "steps", "tokens", "minutes", "peak GiB")
    stages = [_stage_cells(stage.facts) for stage in arm.stages]
    scores = [(f"score: {name}", _plain(value)) for name, value in arm.task.items()]
    rows = _sections(arm.facts, ("student", "teacher")) + scores
    rows += _sections(arm.facts, ("versions",)) + _last(arm.facts)
    return (
        f"<details><summary>{text(arm.name)}: {text(' → '.join(s.name for s in arm.stages))}"
        f"</summary>{table(heads, stages) if stages else ''}{facts_table(rows)}</details>"
    )


def _stage_cells(facts: dict[str, Any]) -> list[str]:
    seconds, peak = facts.get("wall_seconds"), facts.get("peak_memory_bytes")
    steps, tokens = facts.get("steps"), facts.get("tokens")
    return [
        str(facts.get("name", "stage")),
        str(facts.get("teacher") or "none"),
        str(facts.get("data") or "-"),
        " + ".join(facts.get("losses") or ()) or "-",
        "-" if steps is None else f"{steps:,}",
        "-" if tokens is None else show_size(tokens),
        "-" if seconds is None else f"{seconds / 60:.1f}",
        "-" if peak is None else f"{peak / 2**30:.1f}",
    ]


def _teacher(run: DistillRun) -> str:
    facts = run.teacher_facts
    rows = [(f"score: {name}", _plain(value)) for name, value in run.teacher.items()]
    rows = _sections(facts, ("student", "schedule", "data")) + rows + _last(facts)
    if not rows:
        return ""
    picture = draw_stages([("fine-tuning of the teacher", run.teacher_folder)])
    shown = figure(picture, "Fine-tuning of the teacher.") if picture else ""
    if shown:
        shown = f'<div class="grid">{shown}</div>'
    return f"<details><summary>teacher</summary>{shown}{facts_table(rows)}</details>"


def _sections(facts: dict[str, Any], names: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(f"{n}: {key}", _plain(v)) for n in names for key, v in (facts.get(n) or {}).items()]


def _plain(value: Any) -> Any:
    """Numbers as people read them; everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _last(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    wanted = ("key", "git", "command", "wall_seconds")
    return [(name, facts[name]) for name in wanted if facts.get(name) is not None]
