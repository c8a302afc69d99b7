"""Pictures of a distillation run: losses of every stage, and the arms against the teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkd.evaluation.compare import read_metrics
from llmkd.evaluation.distill_arms import IN_PERCENT, DistillRun, show_score
from llmkd.evaluation.figures import as_png

# Name in metrics.jsonl -> colour (Okabe-Ito) and dashes: told apart without either.
LINES: dict[str, tuple[str, Any]] = {
    "loss": ("#000000", "-"),
    "attn": ("#0072B2", (0, (5, 1.5))),
    "hidden": ("#E69F00", "-"),
    "embedding": ("#009E73", "-."),
    "soft": ("#CC79A7", (0, (3, 1, 1, 1, 1, 1))),
    "hard": ("#D55E00", ":"),
}
BAR, TEACHER = "#0072B2", "#444444"
PANELS = ("whole scale", "close up")
COUNTED = ("accuracy", "exact_match")  # shares of independent examples: their error is known


def draw_stages(stages: Sequence[tuple[str, Path]], columns: int = 4) -> bytes | None:
    """PNG with a panel a stage (title, folder with `metrics.jsonl`): the loss and its parts against
    steps, rings where they were evaluated. None where no stage logged anything.
    """
    logs = [(title, read_metrics(folder)) for title, folder in stages]
    logs = [(title, lines) for title, lines in logs if any("loss" in line for line in lines)]
    if not logs:
        return None

    columns = min(columns, len(logs))
    rows = math.ceil(len(logs) / columns)
    figure, axes = _subplots(rows, columns, (4.6 * columns, 3.3 * rows))
    for axis, (title, lines) in zip(axes, logs, strict=False):
        _draw_stage(axis, title, lines)
    for axis in axes[len(logs) :]:
        axis.set_axis_off()
    _legend(figure, axes)
    return as_png(figure)


def _draw_stage(axis: Any, title: str, lines: list[dict[str, Any]]) -> None:
    heights: list[float] = []
    for name, (colour, dashes) in LINES.items():
        points = [(m["step"], m[name]) for m in lines if m.get(name) is not None]
        rings = [(m["step"], m[f"eval_{name}"]) for m in lines if f"eval_{name}" in m]
        label = "total" if name == "loss" else name
        wide = 2.0 if name == "loss" else 1.4
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, ls=dashes, lw=wide, label=label)
        if rings:
            style = {"marker": "o", "mfc": "white", "ms": 5, "ls": "none", "color": colour}
            axis.plot(*zip(*rings, strict=True), label="held out", **style)
        heights += [y for _, y in points + rings if math.isfinite(y)]
    if heights and min(heights) > 0 and max(heights) > 20 * min(heights):
        axis.set_yscale("log")
    axis.set(title=title, xlabel="step", ylabel="loss")
    axis.grid(alpha=0.25)


def _legend(figure: Any, axes: list[Any]) -> None:
    """One legend below all panels: each line once, and one ring for all held-out points."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if "held out" in found:  # at the end
        found["held out"] = found.pop("held out")
    columns = min(len(found), 4 if len(axes) == 1 else 7)
    style = {"frameon": False, "fontsize": 9, "ncols": columns, "columnspacing": 1.4}
    figure.legend(found.values(), found.keys(), loc="outside lower center", **style)


def draw_arms(run: DistillRun, panels: tuple[str, ...] = PANELS) -> bytes | None:
    """PNG of the arms' main scores beside the teacher's; None before the first score.

    The whole scale as bars from 0, and close up as points, since bars must not be cut. Whiskers are
    one standard error of a share over the evaluation examples, where the score is such a share.
    """
    scores = [(arm.name, arm.task.get(run.metric), _error(run, arm.task)) for arm in run.arms]
    known = [(n, y, e) for n, y, e in scores if y is not None and math.isfinite(y)]
    if not known:
        return None

    size = (5.8 * len(panels), 1.3 + 0.42 * len(known))
    figure, axes = _subplots(1, len(panels), size)
    for axis, panel in zip(axes, panels, strict=True):
        if panel == PANELS[0]:
            _draw_bars(axis, run, known)
        else:
            _draw_points(axis, run, known)
        _finish(axis, run, panel, [name for name, _, _ in known])
    return as_png(figure)


def _draw_bars(axis: Any, run: DistillRun, known: list[tuple[str, float, float]]) -> None:
    ends = [0.0, *(y for _, y, _ in known), run.teacher_score or 0.0]
    reach = max(abs(end) for end in ends) or 1.0
    axis.set_xlim(1.07 * min(ends), 1.07 * max(ends) or 0.2 * reach)
    axis.barh(range(len(known)), [y for _, y, _ in known], color=BAR, height=0.62)
    for place, (_, score, _) in enumerate(known):
        inside = score > 0.35 * reach  # out of the way of the teacher's line
        axis.annotate(
            show_score(run.metric, score),
            (max(score, 0.0), place),
            xytext=(-6 if inside else 4, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=9,
            color="white" if inside else "black",
        )


def _draw_points(axis: Any, run: DistillRun, known: list[tuple[str, float, float]]) -> None:
    places = range(len(known))
    values, errors = [y for _, y, _ in known], [e for _, _, e in known]
    axis.errorbar(values, places, xerr=errors, fmt="o", color=BAR, capsize=3, ms=6, lw=1.4)
    axis.margins(x=0.12)


def _finish(axis: Any, run: DistillRun, panel: str, names: list[str]) -> None:
    if run.teacher_score is not None:
        style = {"color": TEACHER, "ls": "--", "lw": 1.3}
        axis.axvline(run.teacher_score, label="teacher", **style)
        axis.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1))
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)  # the first arm on top
    axis.set_xlabel(run.metric.replace("_", " "))
    axis.set_title(panel, loc="left", fontsize=10)
    if run.metric in IN_PERCENT:
        from matplotlib.ticker import PercentFormatter

        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _error(run: DistillRun, task: dict[str, Any]) -> float:
    """One standard error of a share of `examples`, 0 where the score is not such a share."""
    share, examples = task.get(run.metric), task.get("examples")
    if run.metric not in COUNTED or share is None or not examples or not 0 <= share <= 1:
        return 0.0
    return math.sqrt(share * (1 - share) / examples)


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, list(axes.flat)
