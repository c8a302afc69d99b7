"""Pictures of an iREPO run: wins against the distance moved, and start against last iterate."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmkd.evaluation.align_run import START, AlignRun, Iterate
from llmkd.evaluation.figures import as_png, new_axis
from llmkd.evaluation.plots import COLOURS

BEFORE, AFTER = COLOURS[0], COLOURS[2]
SIGMAS = 1.96  # standard errors in a 95 % interval, as wide as the win rate's own
BINS = 30


def draw_win_kl(run: AlignRun) -> bytes | None:
    """PNG of the soft win rate against the start as a function of KL to the initial policy (nats a
    response): a point an iterate with 95 % intervals, the start at (0, 1/2) by definition.

    None before the first iterate with both numbers.
    """
    known = [(one, point) for one in run.iterates if one.number and (point := _point(one))]
    if not known:
        return None
    points = [(0.0, 0.5), *(point for _, point in known)]
    figure, axis = new_axis((5.6, 4.2))
    axis.axhline(0.5, color="#999999", ls=":", lw=1)
    axis.plot(*zip(*points, strict=True), color=AFTER, lw=1.2, zorder=1)
    axis.plot(0, 0.5, marker="o", ms=7, mfc="white", color=BEFORE, ls="none", zorder=3)
    for one, (kl, win) in known:
        low, high = (one.value("held_out", "win_rate_start", key) for key in ("low", "high"))
        error = SIGMAS * (one.value("held_out", "kl_initial", "se") or 0.0)
        below = [[win - min(win if low is None else low, win)]]
        above = [[max(win if high is None else high, win) - win]]
        style: dict[str, Any] = {"fmt": "o", "ms": 6, "capsize": 3, "lw": 1.3, "color": AFTER}
        axis.errorbar([kl], [win], xerr=error, yerr=np.concatenate([below, above]), **style)
    for name, (kl, win) in zip([START, *(one.name for one, _ in known)], points, strict=True):
        shift: dict[str, Any] = {"xytext": (7, -13), "textcoords": "offset points", "fontsize": 9}
        axis.annotate(name, (kl, win), **shift)
    axis.set(xlabel="KL to the initial policy (nats per response)", ylabel="win rate against start")
    axis.margins(0.12)
    return as_png(figure)


def draw_spread(run: AlignRun, keys: tuple[str, ...], label: str) -> bytes | None:
    """PNG of two histograms over held-out responses, start filled and last iterate as a line, with
    their means dashed; `keys` lead to the list of numbers in "held_out". None without numbers.
    """
    both = ((START, run.start, BEFORE), ("last", run.last, AFTER))
    found = [(n, one.values("held_out", *keys), c) for n, one, c in both if one is not None]
    found = [(name, values, colour) for name, values, colour in found if values]
    if not found:
        return None
    low = min(min(values) for _, values, _ in found)
    high = max(max(values) for _, values, _ in found)
    edges = np.linspace(low - 0.5, high + 0.5, 2) if low == high else _edges(low, high, found)
    figure, axis = new_axis((5.6, 3.4))
    for name, values, colour in found:
        filled = name == START
        style: dict[str, Any] = {"histtype": "stepfilled" if filled else "step", "lw": 1.8}
        weights = np.full(len(values), 1 / len(values))
        axis.hist(
            values,
            edges,
            weights=weights,
            color=colour,
            alpha=0.35 if filled else 1.0,
            label=f"{name} ({len(values):,})",
            **style,
        )
        axis.axvline(float(np.mean(values)), color=colour, ls="--", lw=1.3)
    axis.set(xlabel=label, ylabel="share of responses")
    axis.legend(frameon=False, fontsize=9)
    return as_png(figure)


def _edges(low: float, high: float, found: list[tuple[str, list[float], str]]) -> np.ndarray:
    """Shared bins; of whole numbers each bin holds equally many."""
    whole = all(float(value).is_integer() for _, values, _ in found for value in values)
    if not whole:
        return np.linspace(low, high, BINS + 1)
    width = max(1, int(np.ceil((high - low + 1) / BINS)))
    return np.arange(low - 0.5, high + width + 0.5, width)


def _point(one: Iterate) -> tuple[float, float] | None:
    """KL and win rate, if both were measured."""
    kl = one.value("held_out", "kl_initial", "mean")
    win = one.value("held_out", "win_rate_start", "soft")
    return None if kl is None or win is None else (kl, win)
