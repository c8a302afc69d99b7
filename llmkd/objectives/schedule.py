"""How much the teacher counts at a given step."""

from __future__ import annotations

import math

TRANSITIONS = ("step", "linear", "linear_ratio")


def kd_steps(kd_ratio: float, max_steps: int) -> int:
    """Optimizer steps of the KD stage: `kd_ratio` of `max_steps`, rounded to the nearest step."""
    return math.floor(kd_ratio * max_steps + 0.5)


def kd_weight_at(
    step: int, *, stage_steps: int, weight: float, transition: str = "step", hold: float = 0.0
) -> float:
    """Weight of the KD term at optimizer step `step` (the first is 0); SALT, arXiv 2410.18779.

    `step`: `weight` while `step < stage_steps`, then 0. `linear`: the weight falls on a line from
    `weight` to 0. `linear_ratio`: the ratio weight / (1 - weight) falls on a line to 0. The two
    lines begin after `hold` (a share of the stage) and reach 0 at `stage_steps`.
    """
    if step >= stage_steps:
        return 0.0
    if transition == "step":
        return weight
    start = hold * stage_steps
    left = 1.0 if step <= start else (stage_steps - step) / (stage_steps - start)
    if transition == "linear":
        return weight * left
    ratio = weight / (1.0 - weight) * left
    return ratio / (1.0 + ratio)
