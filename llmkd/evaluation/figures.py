"""How every single picture begins and ends: a plain axis without a display, and its PNG."""

from __future__ import annotations

import io
from typing import Any


def new_axis(size: tuple[float, float]) -> tuple[Any, Any]:
    """Figure of `size` inches and its one axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def as_png(figure: Any) -> bytes:
    """The figure's PNG; closes it."""
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()
