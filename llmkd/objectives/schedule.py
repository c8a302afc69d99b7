"""How much the teacher counts: at a given step, and for a given share of the data."""

from __future__ import annotations

import math

from llmkd.errors import RecipeError

TRANSITIONS = ("step", "constant", "linear", "linear_ratio", "cosine")
SMALLEST_FRACTION = 0.05  # below it nobody has measured what the teacher is worth


def kd_steps(kd_ratio: float, max_steps: int) -> int:
    """Optimizer steps of the KD stage: `kd_ratio` of `max_steps`, rounded to the nearest step."""
    return math.floor(kd_ratio * max_steps + 0.5)


def kd_weight_at(
    step: int, *, stage_steps: int, weight: float, transition: str = "step", hold: float = 0.0
) -> float:
    """Weight of the KD term at optimizer step `step` (the first is 0); SALT, arXiv 2410.18779.

    `step`, also called `constant`: `weight` while `step < stage_steps`, then 0. `linear`: the
    weight falls on a line from `weight` to 0. `linear_ratio`: the ratio weight / (1 - weight) falls
    on a line to 0. `cosine`: the weight falls on half a cosine, slowly at both ends, half of it
    halfway. The three begin after `hold` (a share of the stage) and reach 0 at `stage_steps`.
    Raises RecipeError for another transition.
    """
    if transition not in TRANSITIONS:
        raise RecipeError.of(
            "transition", transition, "unknown", f"known: {', '.join(TRANSITIONS)}"
        )
    if step >= stage_steps:
        return 0.0
    if transition in ("step", "constant"):
        return weight
    start = hold * stage_steps
    left = 1.0 if step <= start else (stage_steps - step) / (stage_steps - start)
    if transition == "linear":
        return weight * left
    if transition == "cosine":
        return weight * 0.5 * (1.0 - math.cos(math.pi * left))
    ratio = weight / (1.0 - weight) * left
    return ratio / (1.0 + ratio)


def kd_weight_of_fraction(fraction: float, *, alpha_full: float, alpha_small: float) -> float:
    """KD weight for a run on the share `fraction` of the data [ours].

    `alpha_full` at 1, `alpha_small` at 0.05 and below, linear in log(fraction) between: each
    halving of the data moves the weight as far. That the teacher should count more where less data
    is kept is a finding (Ben-Baruch et al. 2025, arXiv 2403.07854; CIFAR-100 only); this curve is
    not theirs, their table of weights is unknown to us, and it was not tuned. Sweep both ends.
    Raises RecipeError for a fraction outside (0, 1] or a weight outside [0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise RecipeError.of("fraction", fraction, "must lie in (0, 1]", "1 keeps everything")
    for key, value in (("alpha_full", alpha_full), ("alpha_small", alpha_small)):
        if not 0.0 <= value <= 1.0:
            raise RecipeError.of(key, value, "must lie in [0, 1]")
    small = min(1.0, math.log(fraction) / math.log(SMALLEST_FRACTION))
    return alpha_full + small * (alpha_small - alpha_full)
