"""Arms side by side: where each stands at the end, and what it paid to reach the baseline."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkd.files import read_json


@dataclass(frozen=True)
class Curve:
    """Held-out loss (nats/token, temperature 1) against training tokens."""

    tokens: tuple[int, ...]
    losses: tuple[float, ...]

    def first_reaches(self, target: float) -> float | None:
        """Tokens at which the loss first is at most `target`, on straight lines between points."""
        for place, loss in enumerate(self.losses):
            if loss > target:
                continue
            if place == 0:
                return float(self.tokens[0])
            before, after = self.tokens[place - 1], self.tokens[place]
            high = self.losses[place - 1]
            share = (high - target) / (high - loss) if high > loss else 1.0
            return before + share * (after - before)
        return None


@dataclass(frozen=True)
class ArmResult:
    """One row of the table. Ratios are to the baseline's whole cost; None is "never reached" or
    "not known"."""

    name: str
    loss: float
    bits_per_byte: float | None
    accuracy: float
    tokens: int
    kd_tokens: int
    tokens_to_baseline: float | None
    tokens_ratio: float | None
    flops_ratio_free_teacher: float | None
    flops_ratio_with_forwards: float | None
    flops_ratio_with_training: float | None
    wall_seconds: float
    target: float | None = None  # the baseline's final loss, where there is a baseline


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; none where the run logged nothing."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def read_curve(folder: Path) -> Curve:
    """Evaluation points of a run folder in training order."""
    points = [(m["tokens"], m["eval_loss"]) for m in read_metrics(folder) if "eval_loss" in m]
    return Curve(tuple(t for t, _ in points), tuple(loss for _, loss in points))


def compare(folders: dict[str, Path], baseline: str) -> list[ArmResult]:
    """Rows of the table for run folders by arm name.

    The target is the last point of the baseline's own curve. Costs are those of reaching it: (a)
    the
    student alone, (b) with the teacher's forward passes, (c) with the teacher's training and the
    scoring of rows as well. Without an arm called `baseline` the last three columns stay empty.
    """
    target = total = None
    if baseline in folders:
        curve = read_curve(folders[baseline])
        if curve.losses:
            target, total = curve.losses[-1], curve.tokens[-1]
    return [_one(name, folder, target, total) for name, folder in folders.items()]


def _one(name: str, folder: Path, target: float | None, total: int | None) -> ArmResult:
    facts, scores = read_json(folder / "run.json"), read_json(folder / "eval.json")["held_out"]
    steps, kd_steps = facts["schedule"]["max_steps"], facts["schedule"]["kd_steps"]
    kd_tokens = round(facts["tokens"] * kd_steps / max(steps, 1))
    reached = read_curve(folder).first_reaches(target) if target is not None else None
    ratios = _ratios(facts, reached, kd_tokens, total)
    return ArmResult(
        name=name,
        loss=scores["loss"],
        bits_per_byte=scores.get("bits_per_byte"),
        accuracy=scores["accuracy"],
        tokens=facts["tokens"],
        kd_tokens=kd_tokens,
        tokens_to_baseline=reached,
        tokens_ratio=reached / total if reached is not None and total else None,
        flops_ratio_free_teacher=ratios[0],
        flops_ratio_with_forwards=ratios[1],
        flops_ratio_with_training=ratios[2],
        wall_seconds=facts["wall_seconds"],
        target=target,
    )


def _ratios(
    facts: dict[str, Any], reached: float | None, kd_tokens: int, total: int | None
) -> tuple[float | None, float | None, float | None]:
    if reached is None or not total:
        return None, None, None
    student = 3 * facts["student"]["forward_flops_per_token"]
    whole = student * total
    free = student * reached
    teacher = facts.get("teacher")
    if not teacher or not kd_tokens:
        extra = facts.get("selection_flops") or 0.0
        return free / whole, free / whole, (free + extra) / whole
    forwards = teacher["forward_flops_per_token"] * min(reached, kd_tokens)
    trained = teacher.get("training_flops")
    all_in = None
    if trained is not None:
        all_in = (free + forwards + trained + (facts.get("selection_flops") or 0.0)) / whole
    return free / whole, (free + forwards) / whole, all_in


def as_json(rows: list[ArmResult]) -> dict[str, dict[str, Any]]:
    """The table for `eval.json`, by arm."""
    return {row.name: {k: v for k, v in asdict(row).items() if k != "name"} for row in rows}


def print_table(rows: list[ArmResult], baseline: str) -> None:
    """The table on the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="held-out text, temperature 1", title_justify="left", box=SIMPLE_HEAD, padding=(0, 0)
    )
    for heading, _ in HEADINGS:
        justify = "left" if heading == "arm" else "right"
        table.add_column(heading, justify=justify, no_wrap=True, min_width=len(heading))
    for row in rows:
        table.add_row(*(show(row) for _, show in HEADINGS))
    console = Console()
    console.print(table)
    if rows and rows[0].target is None:
        return
    console.print(
        f"tokens and FLOPs are those needed to reach {baseline}'s final loss, as a share of "
        f"{baseline}'s own: (a) teacher free, (b) + teacher forwards, (c) + teacher training and "
        "scoring",
        style="dim",
    )


def _number(value: float | None, form: str, none: str = "-") -> str:
    return none if value is None else format(value, form)


HEADINGS = (
    ("arm", lambda r: r.name),
    ("nats/token", lambda r: f"{r.loss:.4f}"),
    ("bits/byte", lambda r: _number(r.bits_per_byte, ".4f")),
    ("accuracy", lambda r: f"{r.accuracy:.2%}"),
    ("tokens (a)", lambda r: _number(r.tokens_ratio, ".1%", "> 100%" if r.target else "-")),
    ("FLOPs (b)", lambda r: _number(r.flops_ratio_with_forwards, ".1%")),
    ("FLOPs (c)", lambda r: _number(r.flops_ratio_with_training, ".1%")),
    ("minutes", lambda r: f"{r.wall_seconds / 60:.1f}"),
)
