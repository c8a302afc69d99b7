"""`report.html`: one file, no network, made again from the run folder at any time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from llmkd.evaluation.compare import HEADINGS, ArmResult, compare
from llmkd.evaluation.page import count, facts_table, figure, page, table, text, write_picture
from llmkd.evaluation.plots import PANELS, draw_curves, draw_training
from llmkd.files import read_json, write_text

BASELINE = "baseline"


def write_report(folder: Path) -> Path:
    """Write `report.html` and `curves.png` for a run folder or a parent of several; returns the
    page.
    """
    facts = read_json(folder / "run.json") or {}
    arms = facts.get("arms")
    folders = {n: folder / n for n in arms} if arms else {facts.get("name", "run"): folder}
    folders = {n: p for n, p in folders.items() if (p / "eval.json").is_file()}
    teacher = folder / "teacher" if (folder / "teacher" / "run.json").is_file() else None
    write_picture(folder / "curves.png", draw_curves(folders, teacher))
    body = [
        _head(folder, folders),
        _table(compare(folders, BASELINE)),
        _curves(folders, teacher),
        _harness(read_json(folder / "eval.json") or {}),
        *(_arm(name, path) for name, path in folders.items()),
        *([_arm("teacher", teacher)] if teacher else []),
    ]
    write_text(folder / "report.html", page(f"llmkd: {folder.name}", "".join(body)))
    return folder / "report.html"


def _head(folder: Path, folders: dict[str, Path]) -> str:
    facts = [read_json(path / "run.json") for path in folders.values()]
    if not facts:
        return f"<h1>{text(folder.name)}</h1><p>No arm has finished yet.</p>"
    data = facts[0]["data"]
    minutes = sum(f["wall_seconds"] for f in facts) / 60
    peak = max(f["peak_memory_bytes"] for f in facts) / 2**30
    return (
        f"<h1>SALT: {text(folder.name)}</h1>"
        f'<p class="dim">{text(data["source"])} · {count(data["train_tokens"])} training tokens '
        f"available, {count(data['eval_tokens'])} held out · {minutes:.0f} minutes of training · "
        f"peak memory {peak:.1f} GiB · seed {facts[0]['seed']}</p>"
    )


def _table(rows: list[ArmResult]) -> str:
    return (
        "<h2>Held-out text</h2>"
        + table((head for head, _ in HEADINGS), ((show(r) for _, show in HEADINGS) for r in rows))
        + '<p class="dim">Cross-entropy at temperature 1 and next-token accuracy on documents no '
        "model trained on. Tokens and FLOPs are what an arm needed to reach the baseline's final "
        "loss, as a share of what it spent: (a) the student alone, (b) with the teacher's forward "
        "passes, (c) with the teacher's training and the scoring of rows as well. One seed is one "
        "draw: differences smaller than the spread between seeds mean nothing.</p>"
    )


def _curves(folders: dict[str, Path], teacher: Path | None) -> str:
    # One picture a panel: side by side on a desk, one below the other on a phone.
    captions = ("Held-out loss against training tokens; dashed: the teacher leaves.", "Its end.")
    figures = (
        figure(draw_curves(folders, teacher, (panel,)), caption)
        for panel, caption in zip(PANELS, captions, strict=True)
    )
    return f'<div class="pair">{"".join(figures)}</div>'


def _harness(scores: dict[str, Any]) -> str:
    """The harness results of `llmkd eval`, where there are any: the terminal's own table."""
    from rich.console import Console

    from llmkd.evaluation.harness_table import print_results, print_side_by_side

    results = scores.get("lm_eval")
    if not results:
        return ""
    console = Console(record=True, file=io.StringIO(), width=120)
    if results.get("side_by_side"):
        print_side_by_side(results["side_by_side"], console)
    elif results.get("tasks"):
        first = next(iter(results["tasks"].values()))
        print_results({"model": "", "lm_eval": first.get("lm_eval", ""), **results}, console)
    printed = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    return f'<h2>Evaluation harness</h2><div class="wide">{printed}</div>'


def _arm(name: str, folder: Path) -> str:
    facts = read_json(folder / "run.json") or {}
    rows = []
    for section in ("student", "teacher", "schedule", "data", "versions"):
        for key, value in (facts.get(section) or {}).items():
            rows.append((f"{section}: {key}", value))
    rows += [(key, facts[key]) for key in ("key", "git", "command", "wall_seconds") if key in facts]
    training = draw_training(folder)
    picture = figure(training, f"Training of {name}") if training else ""
    return (
        f"<details><summary>{text(name)}: how it was made</summary>{picture}"
        f"{facts_table(rows)}</details>"
    )
