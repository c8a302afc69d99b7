"""Distributions on a few levels with a mean, or a mean and a variance, that is exact.

x_NL are the levels' values as seen from each row's mean, in mean gaps between levels, ascending;
the mean to reach is therefore 0, and must lie strictly inside: x has both signs in every row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import log_ndtr, softmax

ROUNDS = 300
FREE = 10.0  # what a step may add beyond doubling, nats a gap

# points [M] and the numbers of their rows [M] -> values, slopes
Rise = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def tilt(log_p_NL: np.ndarray, x_NL: np.ndarray) -> np.ndarray:
    """q_i ∝ p_i e^{lambda x_i} with sum q x = 0: of all distributions with that mean the one with
    the least KL(q || p). Positive where p is.
    """

    def mean(point_M: np.ndarray, rows_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x_ML = x_NL[rows_M]
        q_ML = softmax(log_p_NL[rows_M] + point_M[:, None] * x_ML, axis=-1)
        mean_M = (q_ML * x_ML).sum(-1)
        return mean_M, (q_ML * (x_ML - mean_M[:, None]) ** 2).sum(-1)

    close_N = 2e-15 * np.abs(x_NL).max(-1)
    point_N = rising_root(mean, np.zeros(len(x_NL)), close_N)
    return softmax(log_p_NL + point_N[:, None] * x_NL, axis=-1)


def widest(x_NL: np.ndarray, variance_N: np.ndarray) -> np.ndarray:
    """q_i ∝ exp(lambda x_i + kappa x_i^2) with sum q x = 0 and sum q x^2 = variance: the greatest
    entropy under both. `variance_N`, in gaps squared, must lie strictly between the least and the
    greatest that the levels allow around that mean.

    kappa is sought, and for each kappa the lambda that keeps the mean: along that path the variance
    rises with slope Var(x^2) - Cov(x, x^2)^2 / Var(x).
    """
    square_NL = x_NL**2

    def variance(point_M: np.ndarray, rows_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x_ML, square_ML = x_NL[rows_M], square_NL[rows_M]
        q_ML = tilt(point_M[:, None] * square_ML, x_ML)
        found_M = (q_ML * square_ML).sum(-1)
        away_ML = square_ML - found_M[:, None]
        both_M = (q_ML * x_ML * away_ML).sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope_M = (q_ML * away_ML**2).sum(-1) - both_M**2 / found_M
        return found_M - variance_N[rows_M], slope_M

    close_N = 1e-13 * square_NL.max(-1)
    point_N = rising_root(variance, -0.5 / variance_N, close_N)
    return tilt(point_N[:, None] * square_NL, x_NL)


def rising_root(rise: Rise, start_N: np.ndarray, close_N: np.ndarray) -> np.ndarray:
    """Where N rising functions cross 0: Newton's steps inside a bracket that only shrinks.

    A step that leaves the bracket is replaced by its middle, or, where it is still open, kept from
    more than doubling the point. A row is done once its value lies within `close_N` or its point no
    longer moves; the others go on without it.
    """
    point_N = start_N.astype(np.float64)
    low_N, high_N = np.full(len(point_N), -np.inf), np.full(len(point_N), np.inf)
    rows_M = np.arange(len(point_N))
    for _ in range(ROUNDS):
        if not len(rows_M):
            break
        point_M = point_N[rows_M]
        value_M, slope_M = rise(point_M, rows_M)
        low_N[rows_M[value_M < 0]] = point_M[value_M < 0]
        high_N[rows_M[value_M > 0]] = point_M[value_M > 0]
        next_M = _next(point_M, value_M, slope_M, low_N[rows_M], high_N[rows_M])
        on_M = (np.abs(value_M) > close_N[rows_M]) & (next_M != point_M)
        rows_M = rows_M[on_M]
        point_N[rows_M] = next_M[on_M]
    return point_N


def _next(
    point_M: np.ndarray,
    value_M: np.ndarray,
    slope_M: np.ndarray,
    low_M: np.ndarray,
    high_M: np.ndarray,
) -> np.ndarray:
    most_M = FREE + np.abs(point_M)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        step_M = np.where(slope_M > 0, -value_M / slope_M, -np.sign(value_M) * np.inf)
        newton_M = point_M + np.clip(step_M, -most_M, most_M)
        middle_M = 0.5 * (low_M + high_M)
    inside_M = (newton_M > low_M) & (newton_M < high_M)
    return np.where(inside_M | ~np.isfinite(middle_M), newton_M, middle_M)


def log_interval(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """log(Phi(high) - Phi(low)) for low < high, to full precision in both tails."""
    flip = low > 0  # there Phi is 1 on both sides, while Phi(-z) keeps its digits
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    top = log_ndtr(high)
    with np.errstate(divide="ignore"):
        return top + np.log(-np.expm1(log_ndtr(low) - top))
