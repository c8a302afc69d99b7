"""Pictures of a run: held-out loss against tokens, with the stage switch drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from llmkd.evaluation.compare import Curve, read_curve, read_metrics
from llmkd.files import read_json

# Okabe-Ito: told apart by colour-blind readers and in grey print.
COLOURS = ("#555555", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKS = ("o", "s", "D", "^", "v", "P", "X", "*")


PANELS = ("whole run", "second half")


def draw_curves(
    folders: dict[str, Path], teacher: Path | None = None, panels: tuple[str, ...] = PANELS
) -> bytes:
    """PNG of the held-out curves by arm name; a dashed line marks where each teacher left, a dotted
    one the teacher's own final loss. One picture with the `panels` side by side.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (5.5 * len(panels), 4.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        late = panel == PANELS[1]
        for place, (name, folder) in enumerate(folders.items()):
            colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
            curve = read_curve(folder)
            first = curve.tokens[-1] / 2 if late and curve.tokens else 0
            points = [(t, y) for t, y in zip(*_columns(curve), strict=True) if t >= first]
            millions, losses = [t / 1e6 for t, _ in points], [y for _, y in points]
            style: dict[str, Any] = {"marker": mark, "markersize": 3.5, "lw": 1.4}
            axis.plot(millions, losses, label=name, color=colour, **style)
            _draw_switch(axis, folder, colour, late)
        _draw_teacher(axis, teacher, named=not late)
        axis.set(title=panel, xlabel="training tokens (millions)")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("held-out loss (nats/token, temperature 1)")
    axes[0][0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def _columns(curve: Curve) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return curve.tokens, curve.losses


def _draw_switch(axis: Any, folder: Path, colour: str, late: bool) -> None:
    facts = read_json(folder / "run.json") or {}
    schedule, tokens = facts.get("schedule", {}), facts.get("tokens")
    steps, last = schedule.get("kd_steps", 0), schedule.get("max_steps", 0)
    if not tokens or not 0 < steps < last or (late and steps < last / 2):
        return
    at = tokens * steps / last / 1e6
    axis.axvline(at, color=colour, ls="--", lw=1)
    axis.annotate(
        "teacher leaves",
        (at, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="#555555",
    )


def _draw_teacher(axis: Any, teacher: Path | None, *, named: bool) -> None:
    scores = read_json(teacher / "eval.json") if teacher else None
    if not scores or "held_out" not in scores:
        return
    loss = scores["held_out"]["loss"]
    axis.axhline(loss, color="#999999", ls=":", lw=1)
    if named:
        axis.annotate(
            "teacher's final loss",
            (0.99, loss),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="#777777",
        )


def draw_training(folder: Path) -> bytes | None:
    """PNG of one run's training loss, learning rate and gradient norm; None without log lines."""
    lines = [m for m in read_metrics(folder) if "loss" in m]
    if not lines:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
    millions = [line["tokens"] / 1e6 for line in lines]
    for axis, key, title in zip(
        axes,
        ("ce", "grad_norm", "learning_rate"),
        ("training CE (nats/token)", "gradient norm before clipping", "learning rate"),
        strict=True,
    ):
        axis.plot(millions, [line.get(key, float("nan")) for line in lines], lw=1, color="#0072B2")
        axis.set(title=title, xlabel="tokens (millions)")
        axis.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
