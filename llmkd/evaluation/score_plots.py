"""Pictures of a scorer: is a predicted 3.7 people's 3.7, and is it unsure where they disagree?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkd.evaluation.figures import as_png, new_axis
from llmkd.evaluation.plots import COLOURS, MARKS

Points = tuple[Sequence[float], Sequence[float]]


def draw_reliability(arms: Mapping[str, Points], values: Sequence[float]) -> bytes:
    """PNG of people's mean against the predicted mean in bins of about equally many rows, an arm a
    line; the diagonal is a scorer that is right on average everywhere.
    """
    figure, axis = new_axis((5.2, 4.4))
    low, high = min(values), max(values)
    axis.plot([low, high], [low, high], color="#999999", ls=":", lw=1)
    for place, (name, (said, found)) in enumerate(arms.items()):
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        style: dict[str, Any] = {"marker": mark, "ms": 4.5, "lw": 1.3, "color": colour}
        axis.plot(said, found, label=name or None, **style)
    axis.set(xlabel="predicted mean", ylabel="people's mean")
    if any(arms):
        axis.legend(frameon=False, fontsize=9)
    return as_png(figure)


def draw_scatter(said: Sequence[float], found: Sequence[float], what: str) -> bytes:
    """PNG of one point a row: `what` (mean or std) predicted, and of people."""
    figure, axis = new_axis((4.4, 4.2))
    low, high = min(*said, *found), max(*said, *found)
    axis.plot([low, high], [low, high], color="#999999", ls=":", lw=1)
    alpha = min(0.8, max(0.08, 150 / max(len(said), 1)))
    axis.plot(said, found, ls="none", marker="o", ms=3.5, mew=0, color=COLOURS[2], alpha=alpha)
    axis.set(xlabel=f"predicted {what}", ylabel=f"people's {what}")
    return as_png(figure)


def draw_histogram(said: Sequence[float], what: str) -> bytes:
    """PNG of how often each predicted `what` occurs, for rows that nobody rated."""
    figure, axis = new_axis((5.2, 3.2))
    axis.hist(said, 30, color=COLOURS[2], alpha=0.7)
    axis.set(xlabel=f"predicted {what}", ylabel="rows")
    return as_png(figure)
