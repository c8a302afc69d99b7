"""What the raters of a row said: read, checked, and put on the scale of the levels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmkd.data.score_config import ScoreDataConfig
from llmkd.errors import DataError, LlmkdError, RecipeError

EDGE = 1e-9  # of the scale: what rounding may put a mean beyond its end
SUM = 1e-3  # how far published probabilities may be from a sum of one


@dataclass(frozen=True, slots=True)
class Said:
    """One row's label in the raters' unit: `ratings`, or `mean` (with `std` and `n` where known),
    or `probs` over the levels.
    """

    ratings: tuple[float, ...] | None = None
    mean: float | None = None
    std: float | None = None
    n: int | None = None
    probs: tuple[float, ...] | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The least and greatest thing said; None for probabilities, which need no scale."""
        if self.ratings is not None:
            return min(self.ratings), max(self.ratings)
        return None if self.mean is None else (self.mean, self.mean)


@dataclass(frozen=True)
class Scale:
    """What becomes the lowest and the highest level: the raters' scale (`known`), or the ends of
    the training rows.
    """

    low: float
    high: float
    known: bool


@dataclass
class Tally:
    """Counts of what is allowed but worth knowing."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, by: int = 1) -> None:
        """Count `by` more."""
        self.counts[name] = self.counts.get(name, 0) + by


class Reader:
    """Reads the label of a row of the table `key` names; DataError with row and column."""

    def __init__(self, config: ScoreDataConfig, levels: int, key: str, name: str) -> None:
        self.config, self.levels, self.key, self.name = config, levels, key, name

    def __call__(self, number: int, row: Mapping[str, Any]) -> Said:
        """The label of row `number`."""
        config = self.config
        if config.ratings_column is not None:
            return Said(ratings=self._ratings(number, config.ratings_column, row))
        if config.probs_column is not None:
            return Said(probs=self._probs(number, config.probs_column, row))
        if config.logits_column is not None:
            return Said(probs=self._logits(number, config.logits_column, row))
        if config.mean_column is None:  # rows to score, which nobody rated
            return Said()
        mean = self._number(number, config.mean_column, row[config.mean_column], "has no rating")
        return Said(mean=mean, std=self._std(number, row), n=self._count(number, row))

    def refuse(self, number: int, column: str, value: Any, problem: str, *ways: str) -> LlmkdError:
        """The DataError about a value of a row."""
        text = repr(value)
        said = value if len(text) < 80 else f"{text[:24]}...{text[-53:]}"
        return DataError.of(
            f"{self.key} ({self.name}), row {number}, {column}", said, problem, *ways
        )

    def _ratings(self, number: int, column: str, row: Mapping[str, Any]) -> tuple[float, ...]:
        given = self._list(number, column, row[column], "has no rating")
        return tuple(self._number(number, column, one, "a rating is missing") for one in given)

    def _std(self, number: int, row: Mapping[str, Any]) -> float | None:
        column = self.config.std_column
        if column is None or row[column] is None:
            return None
        std = self._number(number, column, row[column], "")
        if std < 0:
            problem = "a standard deviation is at least 0"
            raise self.refuse(number, column, std, problem, "drop the row, or leave it null")
        return std

    def _count(self, number: int, row: Mapping[str, Any]) -> int | None:
        column = self.config.n_column
        if column is None or row[column] is None:
            return None
        count = self._number(number, column, row[column], "")
        if count < 1 or count != round(count):
            raise self.refuse(number, column, count, "must be a number of raters, at least 1")
        return int(count)

    def _probs(self, number: int, column: str, row: Mapping[str, Any]) -> tuple[float, ...]:
        probs = self._levels(number, column, row[column])
        if min(probs) < 0 or abs(sum(probs) - 1) > SUM:
            problem = f"must be at least 0 and sum to one, not {sum(probs):g}"
            raise self.refuse(number, column, probs, problem, "logits_column takes logits")
        return tuple(p / sum(probs) for p in probs)

    def _logits(self, number: int, column: str, row: Mapping[str, Any]) -> tuple[float, ...]:
        given = self._list(number, column, row[column], "has no logits")
        several = given if isinstance(given[0], list | tuple) else [given]
        logits_ML = np.array([self._levels(number, column, one) for one in several])
        odds_ML = np.exp(logits_ML - logits_ML.max(axis=1, keepdims=True))
        return tuple((odds_ML / odds_ML.sum(axis=1, keepdims=True)).mean(axis=0).tolist())

    def _levels(self, number: int, column: str, value: Any) -> list[float]:
        found = self._list(number, column, value, "has no numbers")
        if len(found) != self.levels:
            problem = f"holds {len(found)} numbers for {self.levels} levels"
            way = "level_words: one word for each number"
            raise self.refuse(number, column, found, problem, way)
        return [self._number(number, column, one, "a number is missing") for one in found]

    def _list(self, number: int, column: str, value: Any, none: str) -> list[Any]:
        if isinstance(value, str):  # a list in a CSV
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                way = "[3, 4, 2] in JSON, or mean_column for single numbers"
                raise self.refuse(number, column, value, "is no list of numbers", way) from None
        if value is None or (isinstance(value, list | tuple) and not value):
            raise self.refuse(number, column, value, none, "drop the row")
        if not isinstance(value, list | tuple):
            way = "mean_column takes single numbers"
            raise self.refuse(number, column, value, "is no list of numbers", way)
        return list(value)

    def _number(self, number: int, column: str, value: Any, none: str) -> float:
        if value is None:
            raise self.refuse(number, column, value, none, "drop the row")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(number, column, value, "is no number", "drop or mend the row")
        if not math.isfinite(value):
            raise self.refuse(number, column, value, "is NaN or infinite", "drop the row")
        return float(value)


def keep_raters(said: Said, count: int, seed: int, row: int) -> Said:
    """`count` random ratings of a row, in their order; a larger count holds the smaller one's."""
    ratings = said.ratings
    if ratings is None or len(ratings) <= count:
        return said
    kept = sorted(np.random.default_rng([seed, row]).permutation(len(ratings))[:count].tolist())
    return replace(said, ratings=tuple(ratings[place] for place in kept))


def find_scales(
    config: ScoreDataConfig, train: Sequence[tuple[str | None, Said]], groups: set[str | None]
) -> dict[str | None, Scale]:
    """The scale of each of `groups`: named in the recipe, or read off the training rows.

    RecipeError for a group without a training row or a scale, and for a scale without extent.
    """
    found: dict[str | None, Scale] = {}
    everywhere: Scale | None = None
    for group in sorted(groups, key=str):
        if str(group) in config.scales and group is not None:
            found[group] = Scale(
                float(config.scales[group][0]), float(config.scales[group][1]), True
            )
        elif config.score_low is not None and config.score_high is not None:
            found[group] = Scale(float(config.score_low), float(config.score_high), True)
        elif config.scale_per_group or config.scales:
            found[group] = _read_off([said for its, said in train if its == group], group)
        else:
            everywhere = everywhere or _read_off([said for _, said in train], None)
            found[group] = everywhere
    return found


def _read_off(said: Sequence[Said], group: str | None) -> Scale:
    ends = [one.ends for one in said if one.ends is not None]
    where = "" if group is None else f" of group {group!r}"
    ways = ("score_low and score_high: the scale that the raters saw",)
    if not ends:
        problem = f"no training row{where} to read a scale off"
        raise RecipeError.of("score_scales", group, problem, *ways)
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if low == high:
        problem = f"all ratings{where} in the training rows are {low:g}: no scale can be read off"
        raise RecipeError.of("score_low, score_high", [low, high], problem, *ways)
    return Scale(low, high, False)


def on_levels(
    said: Said, scale: Scale | None, values: Sequence[float], ddof: int, tally: Tally, refuse: Any
) -> dict[str, Any]:
    """`mean`, `std`, `n`, `ratings`, `probs` of a row on the scale of the levels.

    Beyond a known scale is an error (`refuse(value, problem)`); beyond one that was read off other
    rows, a rating is set to its end and counted as `clipped`. The std is None where nobody gave
    one, or one rater cannot show it.
    """
    if said.probs is not None:
        mean = float(np.dot(said.probs, values))
        variance = float(np.dot(said.probs, (np.asarray(values) - mean) ** 2))
        moments = {"mean": mean, "std": math.sqrt(max(variance, 0.0)), "n": None}
        return {**moments, "ratings": None, "probs": list(said.probs)}
    assert scale is not None and said.ends is not None
    slack = EDGE * (scale.high - scale.low)
    if said.ends[0] < scale.low - slack or said.ends[1] > scale.high + slack:
        beyond = said.ends[0] if said.ends[0] < scale.low - slack else said.ends[1]
        if scale.known:
            raise refuse(beyond, f"lies outside the scale {scale.low:g} to {scale.high:g}")
        tally.add("clipped")
    low, extent = min(values), max(values) - min(values)
    factor = extent / (scale.high - scale.low)
    widest = (scale.high - scale.low) / math.sqrt(2)  # two raters, one at either end
    if scale.known and said.std is not None and said.std > widest + slack:
        raise refuse(said.std, f"no ratings of this scale have a std above {widest:.3g}")

    def moved(value: float) -> float:
        share = (value - scale.low) / (scale.high - scale.low)
        return low + extent * min(max(share, 0.0), 1.0)

    if said.ratings is None:
        assert said.mean is not None
        std = None if said.std is None or said.n == 1 else said.std * factor
        _count(tally, said.n, std)
        return {"mean": moved(said.mean), "std": std, "n": said.n, "ratings": None, "probs": None}
    ratings = [moved(one) for one in said.ratings]
    same = min(ratings) == max(ratings)
    mean = ratings[0] if same else float(np.mean(ratings))
    std = None if len(ratings) == 1 else 0.0 if same else float(np.std(ratings, ddof=ddof))
    _count(tally, len(ratings), std)
    return {"mean": mean, "std": std, "n": len(ratings), "ratings": ratings, "probs": None}


def _count(tally: Tally, raters: int | None, std: float | None) -> None:
    if raters == 1:
        tally.add("one_rater")
    elif std == 0.0:
        tally.add("all_agree")
    elif std is None:
        tally.add("no_std")
