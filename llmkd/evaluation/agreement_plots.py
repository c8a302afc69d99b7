"""Reliability of judges: how sure they said they were against how often people agreed."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmkd.evaluation.agreement import BINS, reliability
from llmkd.evaluation.plots import COLOURS

# name -> logits_N (nats), share_N of votes for response 1, temperature that fits (or None)
Curves = Mapping[str, tuple[np.ndarray, np.ndarray, float | None]]


def draw_reliability(curves: Curves, bins: int = BINS, columns: int = 3) -> bytes | None:
    """PNG with a panel a judge: share of votes for the response it prefers against sigma(|logit|),
    in bins of equal numbers of pairs, with and without the fitted temperature. On the diagonal a
    judge is as sure as it should be, below it too sure. None where there is no pair.
    """
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(columns, len(curves))
    rows = math.ceil(len(curves) / columns)
    size = (4.4 * columns, 4.1 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, (name, (logits_N, share_N, temperature)) in zip(
        axes.flat, curves.items(), strict=False
    ):
        _draw(axis, logits_N, share_N, bins, "as it is", "#0072B2", "o")
        if temperature is not None:
            label = f"logits / {temperature:.2g}"
            _draw(axis, logits_N / temperature, share_N, bins, label, "#D55E00", "s")
        _finish(axis, name, len(logits_N))
    for axis in list(axes.flat)[len(curves) :]:
        axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()


def _draw(
    axis: Any,
    logits_N: np.ndarray,
    share_N: np.ndarray,
    bins: int,
    label: str,
    colour: str,
    mark: str,
) -> None:
    said_B, found_B, count_B = reliability(logits_N, share_N, bins)
    error_B = np.sqrt(np.maximum(found_B * (1 - found_B), 0) / count_B)  # of one vote a pair
    style = {"color": colour, "marker": mark, "ms": 5, "lw": 1.2, "capsize": 2}
    axis.errorbar(said_B, found_B, yerr=error_B, label=label, **style)


def _finish(axis: Any, name: str, pairs: int) -> None:
    axis.plot([0.5, 1], [0.5, 1], color=COLOURS[0], ls=":", lw=1)
    axis.set(xlim=(0.49, 1.01), ylim=(-0.02, 1.02))
    axis.set_title(f"{name} ({pairs} pairs)", fontsize=10)
    axis.set(xlabel="said: sigma(|logit|)", ylabel="found: share of votes")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
