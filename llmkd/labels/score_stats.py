"""What raters said, as numbers on the scale of the levels: checks, means, spreads; numpy, float64.

A *level* is one answer a scorer can give ("good"), its *value* what that answer counts (4). Values
may ascend or descend and need not be evenly spaced; probabilities stand in the order given.
N rows, L levels, M ratings of all rows together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from llmkd.errors import DataError, RecipeError

EDGE = 1e-9  # of the scale: what rounding may put a mean beyond its end

Ratings = Sequence[ArrayLike] | np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class LevelValues:
    """Checked values of levels: as given, and ascending with the way back.

    `gap` is the mean distance of neighbours, the unit of thresholds that the official code states
    for levels 1 to 5.
    """

    values_L: np.ndarray
    ascending_L: np.ndarray
    descending: bool

    @classmethod
    def of(cls, values: ArrayLike) -> LevelValues:
        """RecipeError unless there are at least two finite values, all ascending or descending."""
        values_L = np.asarray(values, dtype=np.float64)
        said = values_L.tolist()
        if values_L.ndim != 1 or values_L.size < 2:
            raise RecipeError.of("values", said, "needs at least two levels", "[5, 4, 3, 2, 1]")
        if not np.isfinite(values_L).all():
            raise RecipeError.of("values", said, "must be finite numbers")
        steps = np.diff(values_L)
        if not (np.all(steps > 0) or np.all(steps < 0)):
            problem = "must ascend or descend all the way: a word order is no level order"
            raise RecipeError.of("values", said, problem, "sort words and values together")
        descending = bool(steps[0] < 0)
        return cls(values_L, values_L[::-1] if descending else values_L, descending)

    @property
    def low(self) -> float:
        """The least value."""
        return float(self.ascending_L[0])

    @property
    def high(self) -> float:
        """The greatest value."""
        return float(self.ascending_L[-1])

    @property
    def gap(self) -> float:
        """Mean distance of neighbouring values."""
        return (self.high - self.low) / (len(self.values_L) - 1)

    @property
    def even(self) -> bool:
        """Whether neighbours are equally far apart, to rounding."""
        return bool(np.allclose(np.diff(self.ascending_L), self.gap, rtol=1e-9, atol=0.0))

    def need_even(self, key: str, value: str) -> None:
        """RecipeError for something that only makes sense on evenly spaced levels."""
        if not self.even:
            problem = f"is not defined for unevenly spaced levels {self.values_L.tolist()}"
            raise RecipeError.of(key, value, problem, "gauss_tilt with form: integral", "two_token")

    def as_given(self, ascending_NL: np.ndarray) -> np.ndarray:
        """Columns of ascending levels in the order of `values_L`."""
        return ascending_NL[:, ::-1].copy() if self.descending else ascending_NL


@dataclass(frozen=True, slots=True, eq=False)
class RaterStats:
    """Mean, standard deviation and number of the ratings of each row, [N], in the raters' unit.

    A std of 0 says that all agreed, or, for `count_N` = 1 without shrinking, that nobody knows.
    """

    mean_N: np.ndarray
    std_N: np.ndarray
    count_N: np.ndarray


def mean_std(
    ratings: Ratings,
    *,
    ddof: int = 1,
    shrink: float = 0.0,
    low: float | None = None,
    high: float | None = None,
) -> RaterStats:
    """Statistics of ratings, one list a row.

    `ddof`: 1 is unbiased in the variance, which matters for few raters; 0 is what most published
    MOS files hold. `shrink`: k pseudo-raters with the variance s0^2 pooled over all rows,
    (k s0^2 + S) / (k + n - ddof) for a row's sum of squares S, so that three raters who agree by
    chance are not certain. One rater gives a std of s0 with shrinking, else 0.

    DataError naming the row for no ratings, NaN, a rating outside [low, high] where those are
    given, and with `shrink` where no row has two ratings; RecipeError for ddof and shrink.
    """
    if ddof not in (0, 1):
        raise RecipeError.of("ddof", ddof, "must be 0 or 1", "default: 1")
    if not (shrink >= 0.0 and np.isfinite(shrink)):
        raise RecipeError.of("shrink", shrink, "must be a number of pseudo-raters >= 0")
    rating_M, row_M, count_N = flat_ratings(ratings, low=low, high=high)
    starts_N = np.cumsum(count_N) - count_N
    least_N = np.minimum.reduceat(rating_M, starts_N)
    most_N = np.maximum.reduceat(rating_M, starts_N)
    # Rounding must not put a mean outside its ratings, nor give raters who agree a spread.
    mean_N = np.clip(np.add.reduceat(rating_M, starts_N) / count_N, least_N, most_N)
    squares_N = np.add.reduceat((rating_M - mean_N[row_M]) ** 2, starts_N)
    free_N = (count_N - ddof).astype(np.float64)
    if shrink > 0.0 and free_N.sum() == 0.0:
        problem = "cannot shrink to a pooled spread: no row has two ratings"
        raise DataError.of("shrink", shrink, problem, "shrink: 0")
    pooled = squares_N.sum() / free_N.sum() if shrink > 0.0 else 0.0
    variance_N = (shrink * pooled + squares_N) / np.where(shrink + free_N > 0, shrink + free_N, 1.0)
    return RaterStats(mean_N, np.sqrt(variance_N), count_N)


def pool_sigma(std_N: ArrayLike, count_N: ArrayLike | None = None) -> float:
    """One standard deviation for all rows: the root of the mean variance, weighted by n - 1 where
    the numbers of raters are given. DataError where nothing has a weight.
    """
    std_N = checked_std(std_N)
    weight_N = np.ones(len(std_N)) if count_N is None else np.asarray(count_N, np.float64) - 1.0
    if not len(std_N) or not weight_N.sum() > 0.0:
        raise DataError.of("std", len(std_N), "no row with two ratings to pool a spread from")
    return float(np.sqrt((weight_N * std_N**2).sum() / weight_N.sum()))


def to_levels(
    mean_N: ArrayLike, std_N: ArrayLike | None, low: float, high: float, values: ArrayLike
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean and std on a scale from `low` to `high` as mean and std on that of the levels.

    Both are rescaled, and the mean moved as well. `low` and `high` belong to the scale the raters
    saw, or to all rows together: taken from each split they would make its labels incomparable.
    DataError naming the row for a mean outside the scale, NaN, or a std < 0; RecipeError for a
    scale without extent, as when all ratings are equal and the scale was read off them.
    """
    levels = LevelValues.of(values)
    check_scale(low, high)
    mean_N = checked_mean(mean_N, low, high)
    extent = levels.high - levels.low
    mu_N = np.clip(extent * (mean_N - low) / (high - low) + levels.low, levels.low, levels.high)
    if std_N is None:
        return mu_N, None
    return mu_N, extent * checked_std(std_N, rows=len(mean_N)) / (high - low)


def check_scale(low: float, high: float) -> None:
    """RecipeError unless low < high, both finite."""
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        problem = "is no scale to rate on: its end must lie above its start"
        way = "give the scale the raters saw, since all ratings may be equal"
        raise RecipeError.of("scale", [low, high], problem, way)


def flat_ratings(
    ratings: Ratings, *, low: float | None = None, high: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(rating_M, row_M, count_N)`: all ratings in one array, whose row each is, how many a row.

    DataError naming the row for none, NaN, no number, or a rating outside [low, high].
    """
    rows = [_one_row(row, place) for place, row in enumerate(ratings)]
    if not rows:
        raise DataError.of("ratings", 0, "there are no rows")
    count_N = np.array([len(row) for row in rows])
    row_M = np.repeat(np.arange(len(rows)), count_N)
    rating_M = np.concatenate(rows)
    _refuse(~np.isfinite(rating_M), "ratings", rating_M, "is not a number", row_M)
    if low is not None and high is not None:
        check_scale(low, high)
        slack = EDGE * (high - low)
        outside_M = (rating_M < low - slack) | (rating_M > high + slack)
        _refuse(
            outside_M, "ratings", rating_M, f"lies outside the scale {low:g} to {high:g}", row_M
        )
    return rating_M, row_M, count_N


def checked_mean(mean_N: ArrayLike, low: float, high: float) -> np.ndarray:
    """Means as float64 [N], within [low, high]; DataError naming the row for any that is not."""
    mean_N = _one_axis("mean", mean_N)
    _refuse(~np.isfinite(mean_N), "mean", mean_N, "is not a number")
    slack = EDGE * (high - low)
    outside_N = (mean_N < low - slack) | (mean_N > high + slack)
    _refuse(outside_N, "mean", mean_N, f"lies outside the scale {low:g} to {high:g}")
    return np.clip(mean_N, low, high)


def checked_std(std_N: ArrayLike, *, rows: int | None = None) -> np.ndarray:
    """Standard deviations as float64 [N]; DataError naming the row for NaN and below 0."""
    std_N = _one_axis("std", std_N)
    if rows is not None and len(std_N) != rows:
        raise DataError.of("std", len(std_N), f"there are {rows} means: one each is needed")
    _refuse(~np.isfinite(std_N), "std", std_N, "is not a number")
    _refuse(std_N < 0, "std", std_N, "must be >= 0")
    return std_N


def check_probs(probs_NL: np.ndarray, *, sum_within: float | None = 1e-6) -> None:
    """DataError naming the row for a label that is NaN or negative or does not sum to one within
    `sum_within` (None: may be unnormalised); for probabilities that come from elsewhere.
    """
    if probs_NL.ndim != 2:
        raise DataError.of("probs", probs_NL.shape, "must be one row of level probabilities each")
    bad_N = ~np.isfinite(probs_NL).all(-1) | (probs_NL < 0).any(-1)
    if sum_within is not None:
        bad_N |= ~(np.abs(probs_NL.sum(-1) - 1.0) <= sum_within)
    if bad_N.any():
        row = int(bad_N.argmax())
        wanted = "be >= 0" if sum_within is None else "be >= 0 and sum to one"
        raise DataError.of("probs", probs_NL[row].tolist(), f"row {row}: must {wanted}")


def _one_row(row: ArrayLike | None, place: int) -> np.ndarray:
    try:
        values = np.asarray(row, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError.of("ratings", row, f"row {place}: must be a list of numbers") from None
    if values.ndim != 1:
        raise DataError.of("ratings", row, f"row {place}: must be a list of numbers")
    if not values.size:
        way = "drop the row, or give its mean and std"
        raise DataError.of("ratings", [], f"row {place}: has no ratings", way)
    return values


def _one_axis(key: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise DataError.of(key, values.shape, "must be one number a row")
    return values


def _refuse(
    wrong: np.ndarray, key: str, values: np.ndarray, problem: str, rows: Iterable[int] | None = None
) -> None:
    """DataError for the first wrong value, naming its row and how many more there are."""
    places = np.flatnonzero(wrong)
    if len(places):
        first = int(places[0])
        row = first if rows is None else int(np.asarray(rows)[first])
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        raise DataError.of(key, float(values[first]), f"row {row}: {problem}{more}")
