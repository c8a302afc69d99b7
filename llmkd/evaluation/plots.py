"""Pictures of a run: held-out loss against tokens, with the stage switch drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from llmkd.evaluation.compare import read_curve, read_metrics
from llmkd.files import read_json

# Okabe-Ito: told apart by colour-blind readers and in grey print.
COLOURS = ("#555555", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKS = ("o", "s", "D", "^", "v", "P", "X", "*")


def draw_curves(folders: dict[str, Path], teacher: Path | None = None) -> bytes:
    """PNG of the held-out curves by arm name; a dashed line marks where each teacher left, a dotted
    one the teacher's own final loss. Left the whole run, right its second half."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for place, (name, folder) in enumerate(folders.items()):
        style: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKS[place % len(MARKS)],
        }
        curve = read_curve(folder)
        millions = [tokens / 1e6 for tokens in curve.tokens]
        half = curve.tokens[-1] / 2 if curve.tokens else 0
        late = [i for i, tokens in enumerate(curve.tokens) if tokens >= half]
        axes[0].plot(millions, curve.losses, label=name, markersize=3.5, lw=1.4, **style)
        axes[1].plot(
            [millions[i] for i in late],
            [curve.losses[i] for i in late],
            label=name,
            markersize=3.5,
            lw=1.4,
            **style,
        )
        _draw_switch(axes, folder, style["color"])
    _draw_teacher(axes, teacher)
    for axis, title in zip(axes, ("whole run", "second half"), strict=True):
        axis.set(title=title, xlabel="training tokens (millions)")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("held-out loss (nats/token, temperature 1)")
    axes[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def _draw_switch(axes: Any, folder: Path, colour: str) -> None:
    facts = read_json(folder / "run.json") or {}
    schedule, tokens = facts.get("schedule", {}), facts.get("tokens")
    steps, last = schedule.get("kd_steps", 0), schedule.get("max_steps", 0)
    if not tokens or not 0 < steps < last:
        return
    at = tokens * steps / last / 1e6
    axes[0].axvline(at, color=colour, ls="--", lw=1)
    axes[0].annotate(
        "teacher leaves",
        (at, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=colour,
    )
    if steps >= last / 2:
        axes[1].axvline(at, color=colour, ls="--", lw=1)


def _draw_teacher(axes: Any, teacher: Path | None) -> None:
    scores = read_json(teacher / "eval.json") if teacher else None
    if not scores or "held_out" not in scores:
        return
    for axis in axes:
        axis.axhline(scores["held_out"]["loss"], color="#999999", ls=":", lw=1)
    axes[0].annotate(
        "teacher's final loss",
        (0.99, scores["held_out"]["loss"]),
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
