"""Targets at the level token: from a mean, a mean and a spread, or ratings, to level probabilities.

A builder takes rows and the levels' values and gives `LevelTargets`; which rows it takes is its
`wants`: `mean` (mean_N), `std` (mean_N, std_N) or `ratings` (one list a row), all on the scale of
the levels (see `labels.score_stats.to_levels`). Nothing depends on the unit: scaling and moving
means, spreads and values together changes no probability.

What each keeps of the rating (DeQA-Score, arXiv 2501.11561, is `gauss_deqa`):
  onehot_*     the nearest level only        two_token    the mean
  gauss_deqa   mean and spread, roughly      gauss_tilt   the mean, and the spread nearly
  pooled_sigma the mean, one spread for all  max_entropy  mean and spread
  ordinal      the mean, roughly             histogram    everything
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import softmax
from scipy.stats import norm

from llmkd.errors import RecipeError
from llmkd.labels.score_registry import (
    SCORE_BUILDERS,
    LevelTargets,
    ScoreBuilder,
    find_score_builder,
    score_builder,
)
from llmkd.labels.score_solve import log_interval, tilt, widest
from llmkd.labels.score_stats import (
    LevelValues,
    Ratings,
    checked_mean,
    checked_std,
    flat_ratings,
    pool_sigma,
    to_levels,
)

Form = Literal["density", "integral"]

__all__ = [
    "SCORE_BUILDERS",
    "LevelTargets",
    "ScoreBuilder",
    "find_score_builder",
    "gauss_adjusted",
    "gauss_deqa",
    "gauss_tilt",
    "histogram",
    "max_entropy",
    "onehot_bin",
    "onehot_round",
    "ordinal",
    "pooled_sigma",
    "two_token",
]

EPS = 1e-8  # of a gap: how far past its end the official code lets a bin reach
NARROW = 0.05  # gaps; below it every third level gets less than e^-400 of the probability
EDGE = 1e-9  # of what there is: a mean or variance nearer to its bound than that is on it


@score_builder(wants="mean", about="one level: that of L equal bins the mean falls into")
def onehot_bin(mean_N: ArrayLike, values: ArrayLike) -> LevelTargets:
    """Q-Align's label: [low, high] cut into L equal bins. A bound belongs to the bin below (the
    official code; so too within 1e-8 gaps above it). Evenly spaced levels only.
    """
    levels = LevelValues.of(values)
    levels.need_even("target", "onehot_bin")
    mean_N = checked_mean(mean_N, levels.low, levels.high)
    count = len(levels.values_L)
    inner = levels.low + np.arange(1, count) / count * (levels.high - levels.low)
    return _one_hot(np.searchsorted(inner + EPS * levels.gap, mean_N), levels)


@score_builder(wants="mean", about="one level: the nearest to the mean")
def onehot_round(mean_N: ArrayLike, values: ArrayLike) -> LevelTargets:
    """The level whose value is nearest; half-way between two it is the lower one."""
    levels = LevelValues.of(values)
    mean_N = checked_mean(mean_N, levels.low, levels.high)
    inner = 0.5 * (levels.ascending_L[:-1] + levels.ascending_L[1:])
    return _one_hot(np.searchsorted(inner, mean_N), levels)


@score_builder(wants="mean", about="the two levels around the mean, which stays exact")
def two_token(mean_N: ArrayLike, values: ArrayLike) -> LevelTargets:
    """1 - frac and frac on the two neighbours of the mean: the least variance with that mean."""
    levels = LevelValues.of(values)
    mean_N = checked_mean(mean_N, levels.low, levels.high)
    return LevelTargets(levels.as_given(_two(mean_N, levels)))


@score_builder(wants="std", about="the official DeQA-Score label, as released")
def gauss_deqa(
    mean_N: ArrayLike,
    std_N: ArrayLike | None,
    values: ArrayLike,
    *,
    form: Form = "density",
    least_std: float = 0.2,
    most_shift: float = 0.1,
    repaired: bool = False,
    renormalise: bool = False,
) -> LevelTargets:
    """max(alpha p + beta, 0) of a Gaussian p on evenly spaced levels (arXiv 2501.11561, official
    code), with alpha and beta such that sum and mean were right before the clipping.

    `form`: `density` of the Gaussian at each level (the release for KonIQ and KADID), or `integral`
    over the gap around it (the paper; the release for SPAQ). Where std < `least_std`, or the mean
    is off by more than `most_shift` (both in gaps), or there is no std at all, the label is
    two-token, 1e-8 beside the exact one as in the release. Clipped rows are NOT renormalised: they
    sum to up to 1.1, and their mean is off by up to `most_shift`.

    `repaired`: the release gives a uniform label where the mean is the scale's middle; with this
    alpha = 1 / A and beta = 0 within 1e-6 of it. `renormalise` divides by the sum, which moves the
    mean further. `counts`: rows `two_token`, rows `clipped` among the others.
    """
    levels, mean_N, std_N = _ready(mean_N, std_N, values)
    levels.need_even("target", "gauss_deqa")
    two_NL = levels.as_given(_two(mean_N, levels, slack=EPS * levels.gap))
    if std_N is None:
        return LevelTargets(two_NL, {"two_token": len(two_NL), "clipped": 0})
    narrow_N = ~(std_N >= least_std * levels.gap) | (std_N == 0)
    adjusted_NL = gauss_adjusted(
        mean_N, np.where(narrow_N, levels.gap, std_N), values, form=form, repaired=repaired
    )
    probs_NL = np.maximum(adjusted_NL, 0.0)
    # What an unnormalised label adds to the mean depends on where 0 is: as for levels 1, 2, ...
    zero = levels.low - levels.gap
    shift_N = np.abs(probs_NL @ (levels.values_L - zero) - (mean_N - zero))
    fallen_N = narrow_N | ~(shift_N <= most_shift * levels.gap)  # so written that NaN falls too
    clipped_N = (adjusted_NL < 0).any(-1) & ~fallen_N
    if renormalise:
        with np.errstate(invalid="ignore"):
            probs_NL = probs_NL / probs_NL.sum(-1, keepdims=True)
    probs_NL = np.where(fallen_N[:, None], two_NL, probs_NL)
    return LevelTargets(probs_NL, _counted(two_token=fallen_N, clipped=clipped_N))


def gauss_adjusted(
    mean_N: ArrayLike,
    std_N: ArrayLike,
    values: ArrayLike,
    *,
    form: Form = "density",
    repaired: bool = False,
) -> np.ndarray:
    """alpha p + beta before clipping, [N, L], some below 0: sums to one with the mean exact, up to
    the official 1e-9 in alpha's denominator (which is why the middle needs `repaired`).
    """
    levels = LevelValues.of(values)
    levels.need_even("target", "gauss_deqa")
    _check_form(form)
    mean_N = checked_mean(mean_N, levels.low, levels.high)
    std_N = checked_std(std_N, rows=len(mean_N))
    gap, count = levels.gap, len(levels.values_L)
    mean_N1, std_N1, values_L = mean_N[:, None], std_N[:, None], levels.values_L
    if form == "density":
        p_NL = norm.pdf(values_L, mean_N1, std_N1) * gap
    else:
        half = 0.5 * gap
        p_NL = norm.cdf(values_L + half, mean_N1, std_N1)
        p_NL = p_NL - norm.cdf(values_L - half, mean_N1, std_N1)
    middle = values_L.sum() / count
    sum_N, first_N = p_NL.sum(-1), p_NL @ values_L
    alpha_N = (mean_N - middle) / (first_N - middle * sum_N + 1e-9 * gap)
    beta_N = (1.0 - alpha_N * sum_N) / count
    if repaired:
        central_N = np.abs(mean_N - middle) <= 1e-6 * gap
        with np.errstate(divide="ignore"):
            alpha_N = np.where(central_N, 1.0 / sum_N, alpha_N)
        beta_N = np.where(central_N, 0.0, beta_N)
    with np.errstate(invalid="ignore"):  # 1 / 0 * 0 for a Gaussian between the levels
        return alpha_N[:, None] * p_NL + beta_N[:, None]


@score_builder(wants="std", about="a Gaussian tilted until its mean is exact")
def gauss_tilt(
    mean_N: ArrayLike, std_N: ArrayLike | None, values: ArrayLike, *, form: Form = "density"
) -> LevelTargets:
    """q_i ∝ p_i e^{lambda v_i}, lambda such that the mean is exact [ours]: no row is negative,
    clipped or unnormalised, and the middle of the scale is a level like any other.

    On evenly spaced levels with `density` this is a Gaussian with the same spread, moved. `form`
    as in `gauss_deqa`; unevenly spaced levels need `integral`, whose bounds lie half-way between
    them. Two-token (`counts`) where the mean is at an end of the scale, the std below 1/20 of the
    least gap (the limit, to 1e-150), or there is no std.
    """
    levels, mean_N, std_N = _ready(mean_N, std_N, values)
    _check_form(form)
    if form == "density":
        levels.need_even("form", form)
    probs_NL = _two(mean_N, levels)
    two_N = _at_an_end(mean_N, levels)
    if std_N is None:
        two_N[:] = True
    else:
        two_N |= std_N <= NARROW * np.diff(levels.ascending_L).min()
        x_NL = (levels.ascending_L - mean_N[:, None])[~two_N]
        std_N1 = std_N[~two_N, None]
        if form == "density":
            log_p_NL = -0.5 * (x_NL / std_N1) ** 2
        else:
            edges_NL = _edges(levels) - mean_N[~two_N, None]
            log_p_NL = log_interval(edges_NL[:, :-1] / std_N1, edges_NL[:, 1:] / std_N1)
        probs_NL[~two_N] = tilt(log_p_NL, x_NL / levels.gap)
    return LevelTargets(levels.as_given(probs_NL), _counted(two_token=two_N))


@score_builder(wants="std", about="gauss_tilt with one spread for all rows")
def pooled_sigma(
    mean_N: ArrayLike,
    std_N: ArrayLike | None,
    values: ArrayLike,
    *,
    sigma: float | None = None,
    form: Form = "density",
) -> LevelTargets:
    """`gauss_tilt` with `sigma` (in the levels' unit) in every row; by default the root of the mean
    variance of these rows. Give it, from `pool_sigma` on the training rows, wherever rows of other
    splits are built.
    """
    if sigma is None:
        if std_N is None:
            raise RecipeError.of("sigma", None, "no std to pool", "sigma: 0.7", "two_token")
        sigma = pool_sigma(std_N)
    elif not (np.isfinite(sigma) and sigma >= 0):
        raise RecipeError.of("sigma", sigma, "must be a number >= 0")
    return gauss_tilt(mean_N, np.full(np.shape(mean_N), sigma), values, form=form)


@score_builder(wants="std", about="the flattest label with that mean and spread")
def max_entropy(mean_N: ArrayLike, std_N: ArrayLike | None, values: ArrayLike) -> LevelTargets:
    """The greatest entropy under mean and variance, q_i ∝ exp(lambda v_i + kappa v_i^2), any
    spacing [ours]. The mean is exact always, the variance where levels can have it:
    between that of two neighbours, frac (1 - frac) gaps^2, and (mean - low)(high - mean), all on
    the two ends. Elsewhere it is the nearest possible, counted as `raised` or `lowered`; without a
    std it is two-token.
    """
    levels, mean_N, std_N = _ready(mean_N, std_N, values)
    two_NL = _two(mean_N, levels)
    if std_N is None:
        return LevelTargets(levels.as_given(two_NL), {"two_token": len(two_NL)})
    x_NL = (levels.ascending_L - mean_N[:, None]) / levels.gap
    asked_N = (std_N / levels.gap) ** 2
    least_N, most_N = (two_NL * x_NL**2).sum(-1), -x_NL[:, 0] * x_NL[:, -1]
    slack_N = EDGE * np.maximum(most_N - least_N, EDGE)
    low_N = (asked_N <= least_N + slack_N) | _at_an_end(mean_N, levels)
    high_N = asked_N >= most_N - slack_N
    probs_NL = two_NL.copy()
    share_N = (mean_N - levels.low) / (levels.high - levels.low)
    ends_N = high_N & ~low_N
    probs_NL[ends_N] = 0.0
    probs_NL[ends_N, 0], probs_NL[ends_N, -1] = 1.0 - share_N[ends_N], share_N[ends_N]
    inner_N = ~low_N & ~high_N
    probs_NL[inner_N] = widest(x_NL[inner_N], asked_N[inner_N])
    raised_N, lowered_N = asked_N < least_N - slack_N, asked_N > most_N + slack_N
    counts = _counted(raised=raised_N, lowered=lowered_N)
    return LevelTargets(levels.as_given(probs_NL), counts)


@score_builder(wants="mean", about="softmax of minus the distance to the mean (SORD)")
def ordinal(
    mean_N: ArrayLike,
    values: ArrayLike,
    *,
    temperature: float = 1.0,
    distance: Literal["absolute", "squared"] = "absolute",
) -> LevelTargets:
    """q_i ∝ exp(-d_i / temperature), d the distance to the mean in gaps, or its square: SORD (Díaz
    and Marathe, CVPR 2019). Its mean is drawn towards the middle of the scale.
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise RecipeError.of("temperature", temperature, "must be a number > 0", "default: 1")
    if distance not in ("absolute", "squared"):
        raise RecipeError.of("distance", distance, "must be absolute or squared")
    levels = LevelValues.of(values)
    mean_N = checked_mean(mean_N, levels.low, levels.high)
    far_NL = np.abs(levels.values_L - mean_N[:, None]) / levels.gap
    power = 1 if distance == "absolute" else 2
    return LevelTargets(softmax(-(far_NL**power) / temperature, axis=-1))


@score_builder(wants="ratings", about="the ratings themselves, smoothed by a Dirichlet prior")
def histogram(
    ratings: Ratings,
    values: ArrayLike,
    *,
    low: float | None = None,
    high: float | None = None,
    dirichlet: float = 0.0,
    base: str | ArrayLike = "uniform",
) -> LevelTargets:
    """(counts + a b) / (n + a) for the n ratings of a row, `dirichlet` = a pseudo-raters spread
    over the levels as `base` says: `uniform`, `pooled` (the mean histogram of these rows) or L
    probabilities, in the order of the values. A rating between two levels counts on both,
    two-token, so that with a = 0 the mean is that of the ratings.

    `low` and `high` are the raters' scale, rescaled to the levels; without them ratings are on the
    levels' own.
    """
    levels = LevelValues.of(values)
    if not (np.isfinite(dirichlet) and dirichlet >= 0):
        raise RecipeError.of("dirichlet", dirichlet, "must be a number of pseudo-raters >= 0")
    low, high = levels.low if low is None else low, levels.high if high is None else high
    rating_M, row_M, count_N = flat_ratings(ratings, low=low, high=high)
    rating_M, _ = to_levels(np.clip(rating_M, low, high), None, low, high, levels.values_L)
    counts_NL = np.zeros((len(count_N), len(levels.values_L)))
    np.add.at(counts_NL, row_M, levels.as_given(_two(rating_M, levels)))
    if dirichlet > 0.0:
        shares_NL = counts_NL / count_N[:, None]
        counts_NL = counts_NL + dirichlet * _base(base, shares_NL)
    return LevelTargets(counts_NL / (count_N + dirichlet)[:, None])


def _base(base: str | ArrayLike, shares_NL: np.ndarray) -> np.ndarray:
    count = shares_NL.shape[1]
    if isinstance(base, str):
        known = {"uniform": np.full(count, 1.0 / count), "pooled": shares_NL.mean(0)}
        if base not in known:
            raise RecipeError.of("base", base, "must be uniform, pooled or one share a level")
        return known[base]
    base_L = np.asarray(base, dtype=np.float64)
    if base_L.shape != (count,) or not np.all(base_L >= 0) or abs(base_L.sum() - 1.0) > 1e-6:
        raise RecipeError.of("base", base_L.tolist(), f"must be {count} shares that sum to one")
    return base_L


def _ready(
    mean_N: ArrayLike, std_N: ArrayLike | None, values: ArrayLike
) -> tuple[LevelValues, np.ndarray, np.ndarray | None]:
    levels = LevelValues.of(values)
    mean_N = checked_mean(mean_N, levels.low, levels.high)
    return levels, mean_N, None if std_N is None else checked_std(std_N, rows=len(mean_N))


def _check_form(form: str) -> None:
    if form not in ("density", "integral"):
        raise RecipeError.of("form", form, "must be density or integral")


def _one_hot(level_N: np.ndarray, levels: LevelValues) -> LevelTargets:
    return LevelTargets(levels.as_given(np.eye(len(levels.values_L))[level_N]))


def _two(mean_N: np.ndarray, levels: LevelValues, *, slack: float = 0.0) -> np.ndarray:
    """Two-token over ascending levels; with `slack` each gap reaches that far past both ends, as
    in the official code.
    """
    v_L, rows = levels.ascending_L, np.arange(len(mean_N))
    lower_N = np.searchsorted(v_L[1:-1] + slack, mean_N)
    left_N, right_N = v_L[lower_N] - slack, v_L[lower_N + 1] + slack
    probs_NL = np.zeros((len(mean_N), len(v_L)))
    probs_NL[rows, lower_N] = (right_N - mean_N) / (right_N - left_N)
    probs_NL[rows, lower_N + 1] = (mean_N - left_N) / (right_N - left_N)
    return probs_NL


def _edges(levels: LevelValues) -> np.ndarray:
    """Bounds of the L intervals around ascending levels; the outer ones reach as far as inwards."""
    v_L = levels.ascending_L
    inner = 0.5 * (v_L[:-1] + v_L[1:])
    return np.concatenate(([2 * v_L[0] - inner[0]], inner, [2 * v_L[-1] - inner[-1]]))


def _at_an_end(mean_N: np.ndarray, levels: LevelValues) -> np.ndarray:
    slack = EDGE * levels.gap
    return (mean_N <= levels.low + slack) | (mean_N >= levels.high - slack)


def _counted(**rows: np.ndarray) -> dict[str, int]:
    return {name: int(each_N.sum()) for name, each_N in rows.items()}
