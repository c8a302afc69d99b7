"""What a selection must be held against: random rows, and hard labels, in all four combinations.

Random rows with soft labels are hard to beat (PCA, arXiv 2502.06434; Ben-Baruch et al. 2025, arXiv
2403.07854). Rows chosen well may also help without any teacher, and then the soft labels did not
do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmkd.errors import RecipeError
from llmkd.selection.registry import find

CONTROL = "random"
LABELS = ("soft", "hard")


def controls(
    selection: str, *, kd_weight: float | None = None, **shared: Any
) -> dict[str, dict[str, Any]]:
    """The `arms:` of a fair comparison: `selection` and random rows, with soft and hard labels.

    Hard labels are `kd_weight: 0`: the same rows in the same order, plain next-token loss. Soft
    labels keep the recipe's kd_weight unless one is given; `shared` keys go into every arm. Raises
    RecipeError for an unknown selection, for the control itself and for a kd_weight that teaches
    nothing.
    """
    find(selection)
    if selection == CONTROL:
        raise RecipeError.of("selection", selection, "is the control itself", "name another one")
    if kd_weight is not None and not 0 < kd_weight <= 1:
        raise RecipeError.of("kd_weight", kd_weight, "soft labels need a weight in (0, 1]")
    soft = {} if kd_weight is None else {"kd_weight": kd_weight}
    weights = {"soft": soft, "hard": {"kd_weight": 0.0}}
    return {
        f"{rows}_{labels}": {"selection": rows, **weights[labels], **shared}
        for rows in (selection, CONTROL)
        for labels in LABELS
    }


def has_controls(selection: str, results: Mapping[str, Any]) -> bool:
    """Whether all four arms of `controls(selection)` are among the results."""
    return selection != CONTROL and set(controls(selection)) <= set(results)


def four_cells(
    selection: str, results: Mapping[str, float | Sequence[float]], what: str = "nats/token"
) -> str:
    """The four arms of `controls(selection)` as a table, with selected - random per kind of label.

    `results` maps names of arms to a number or to one for each seed, in the same order for every
    arm: then means are shown, and paired differences with their standard error. For a loss a
    difference below 0 speaks for the selection. Raises RecipeError where an arm is missing, the
    seeds do not pair or a number is not finite.
    """
    arms = list(controls(selection))
    values = {arm: _numbers(arm, results) for arm in arms}
    if len({len(numbers) for numbers in values.values()}) > 1:
        counts = {arm: len(numbers) for arm, numbers in values.items()}
        raise RecipeError.of("results", counts, "every arm needs the same seeds")
    rows = [["rows", *(f"{labels} labels" for labels in LABELS)]]
    for who in (selection, CONTROL):
        rows.append([who, *(f"{values[f'{who}_{kind}'].mean():.4f}" for kind in LABELS)])
    gaps = [values[f"{selection}_{kind}"] - values[f"{CONTROL}_{kind}"] for kind in LABELS]
    rows.append([f"{selection} - {CONTROL}", *(_gap(gap) for gap in gaps)])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2])])
        for row in rows
    ]
    seeds = len(gaps[0])
    tail = f"; mean of {seeds} seeds, +- standard error of the paired difference"
    return "\n".join([what + (tail if seeds > 1 else ""), *lines])


def _numbers(arm: str, results: Mapping[str, float | Sequence[float]]) -> np.ndarray:
    if arm not in results:
        raise RecipeError.of(
            "arms", sorted(results), f"{arm} is missing", "the four of controls(selection)"
        )
    numbers = np.atleast_1d(np.asarray(results[arm], dtype=np.float64))
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise RecipeError.of(arm, results[arm], "must be one finite number, or one for each seed")
    return numbers


def _gap(gap: np.ndarray) -> str:
    if len(gap) == 1:
        return f"{gap[0]:+.4f}"
    return f"{gap.mean():+.4f} +- {gap.std(ddof=1) / np.sqrt(len(gap)):.4f}"
