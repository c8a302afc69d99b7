"""The metrics of a scorer with intervals, by group, its reliability, and two scorers compared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from llmkd.errors import DataError, RecipeError
from llmkd.evaluation.paired import PairedDifference, paired_difference
from llmkd.evaluation.score_metrics import (
    SCORE_METRICS,
    Scored,
    ScoreMetric,
    UndefinedError,
    Weighted,
)
from llmkd.labels.score_stats import LevelValues
from llmkd.objectives.registry import near_names

DRAWS = 1000
BINS = 10
SLOW = 5_000_000  # rows times draws beyond which a slow metric gets no interval
LEAST = 0.5  # share of resamples that must define a metric


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric and the middle 95 % of a bootstrap over rows; None with `words` that say why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    words: str = ""


@dataclass(frozen=True, slots=True)
class Reliability:
    """In bins of about equally many rows by predicted mean: mean prediction, mean of the people,
    rows. `ece` is their mean distance, weighted by rows, in the unit of the values.
    """

    said: tuple[float, ...]
    found: tuple[float, ...]
    count: tuple[int, ...]
    ece: float


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """All metrics of one scorer on `rows` rows, and the same of each group."""

    rows: int
    measures: dict[str, Measured]
    reliability: Reliability
    groups: dict[str, ScoreReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def score_report(
    pred: Scored,
    human: Scored,
    values: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    metrics: Sequence[str] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
    bins: int = BINS,
) -> ScoreReport:
    """Every metric (or those named) of predictions against people, on the scale of `values`.

    Intervals resample rows; the logistic fit is not repeated for each resample. `draws` = 0 leaves
    intervals out. `groups`, one name a row: each is reported on its own too, since a correlation
    over several data sets is mostly that of their means.

    A metric that is not defined (constant answers, no std) is None with the reason. DataError
    where rows do not pair up, RecipeError for a metric there is not.
    """
    values_L = LevelValues.of(values).values_L
    _check_pair(pred, human, values_L)
    if draws < 0 or not 0 < level < 1 or bins < 1:
        problem = "draws must be >= 0, level between 0 and 1, bins >= 1"
        raise RecipeError.of("draws, level, bins", (draws, level, bins), problem)
    chosen = [find_score_metric(name) for name in metrics or SCORE_METRICS]
    settings = {"draws": draws, "seed": seed, "level": level}
    report = {one.name: measured(one, pred, human, values_L, **settings) for one in chosen}
    parts: dict[str, ScoreReport] = {}
    if groups is not None:
        names_N = np.array([str(name) for name in groups])
        if len(names_N) != len(pred.mean_N):
            raise DataError.of("groups", len(names_N), f"needs {len(pred.mean_N)} names")
        for name in dict.fromkeys(names_N.tolist()):
            mine_N = names_N == name
            parts[name] = score_report(
                pred.take(mine_N),
                human.take(mine_N),
                values_L,
                metrics=[one.name for one in chosen],
                bins=bins,
                **settings,
            )
    return ScoreReport(len(pred.mean_N), report, score_reliability(pred, human, bins), parts)


def find_score_metric(name: str) -> ScoreMetric:
    """The metric called `name`; RecipeError with the nearest name where there is none."""
    if name in SCORE_METRICS:
        return SCORE_METRICS[name]
    ways = near_names(name, SCORE_METRICS)
    raise RecipeError.of("metric", name, "there is no such metric of scores", *ways)


def measured(
    metric: ScoreMetric,
    pred: Scored,
    human: Scored,
    values_L: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Measured:
    """One metric with its interval, or None with the reason."""
    rows, words = len(pred.mean_N), ""
    try:
        weighted = _ready(metric, pred, human, values_L)
        value = weighted(np.ones(rows))
    except UndefinedError as why:
        return Measured(None, words=str(why))
    if metric.rows is not None:
        left = int(np.isnan(metric.rows(pred, human, values_L)).sum())
        words = f"{left} of {rows} rows left out: a std of 0" if left else ""
    if not draws or rows < 2:
        return Measured(value, words=words)
    if metric.slow and rows * draws > SLOW:
        return Measured(value, words="no interval: too many rows to resample")
    make, found = np.random.default_rng(seed), []
    for _ in range(draws):
        with suppress(UndefinedError):
            found.append(weighted(_drawn(rows, make)))
    if len(found) < LEAST * draws:
        return Measured(value, words="no interval: undefined in most resamples")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Measured(value, float(low), float(high), words)


def _ready(metric: ScoreMetric, pred: Scored, human: Scored, values_L: np.ndarray) -> Weighted:
    missing = metric.missing(pred, human)
    if missing:
        raise UndefinedError(missing)
    return metric.ready(pred, human, values_L)


def _drawn(rows: int, make: np.random.Generator) -> np.ndarray:
    """How often each row is drawn in as many draws with replacement as there are rows."""
    return np.bincount(make.integers(rows, size=rows), minlength=rows).astype(np.float64)


def score_reliability(pred: Scored, human: Scored, bins: int = BINS) -> Reliability:
    """Does a predicted mean of 3.7 come with people's 3.7? Equal predictions share a bin."""
    if not len(pred.mean_N) or len(pred.mean_N) != len(human.mean_N):
        raise DataError.of("rows", (len(pred.mean_N), len(human.mean_N)), "do not pair up")
    rank_N = rankdata(pred.mean_N, method="min") - 1
    bin_N = (rank_N * bins / len(rank_N)).astype(np.int64)
    count_B = np.bincount(bin_N)
    kept_B = count_B > 0
    count_B = count_B[kept_B]
    said_B = np.bincount(bin_N, weights=pred.mean_N)[kept_B] / count_B
    found_B = np.bincount(bin_N, weights=human.mean_N)[kept_B] / count_B
    ece = float(np.abs(said_B - found_B) @ count_B / count_B.sum())
    said, found = tuple(said_B.tolist()), tuple(found_B.tolist())
    return Reliability(said, found, tuple(count_B.tolist()), ece)


def paired_scores(
    metric: str,
    a: Sequence[Scored],
    b: Sequence[Scored],
    human: Scored,
    values: ArrayLike,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """How much better `a` is than `b` by one metric, one prediction a training seed, all on the
    same rows: positive is better also for errors, which are negated.

    As `paired_difference`: draws take seeds and rows with replacement, the same rows for both arms
    and all seeds. A metric of rows is handed to it; the others are computed anew on each draw.
    DataError where the arms do not pair up, or the metric is not defined for an arm.
    """
    values_L, chosen = LevelValues.of(values).values_L, find_score_metric(metric)
    if len(a) != len(b) or not len(a):
        raise DataError.of("seeds", (len(a), len(b)), "both arms need the same seeds, at least one")
    if draws < 1 or not 0 < level < 1:
        raise RecipeError.of("draws, level", (draws, level), "needs draws >= 1, 0 < level < 1")
    sign = 1.0 if chosen.higher_is_better else -1.0
    settings = {"draws": draws, "seed": seed, "level": level}
    rows = len(human.mean_N)
    arms = [_ready_arm(chosen, arm, human, values_L) for arm in (a, b)]
    if chosen.rows is not None:
        table_ASN = np.array([[chosen.rows(one, human, values_L) for one in arm] for arm in (a, b)])
        kept_N = ~np.isnan(table_ASN).any((0, 1))
        return paired_difference(*(sign * table_ASN[:, :, kept_N]), **settings)
    gap_S = sign * _gaps(arms, np.ones(rows))
    make, found = np.random.default_rng(seed), []
    for times_S in make.multinomial(len(a), np.full(len(a), 1 / len(a)), size=draws):
        with suppress(UndefinedError):
            found.append(sign * _gaps(arms, _drawn(rows, make)) @ times_S / len(a))
    if len(found) < LEAST * draws:
        raise DataError.of("metric", metric, "is not defined in most resamples", "more rows")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return PairedDifference(float(gap_S.mean()), float(low), float(high), tuple(gap_S.tolist()))


def _ready_arm(
    metric: ScoreMetric, arm: Sequence[Scored], human: Scored, values_L: np.ndarray
) -> list[Weighted]:
    """The metric of each seed; DataError where it is not defined for one."""
    ready = []
    for seed, one in enumerate(arm):
        _check_pair(one, human, values_L)
        try:
            ready.append(_ready(metric, one, human, values_L))
            ready[-1](np.ones(len(human.mean_N)))
        except UndefinedError as why:
            raise DataError.of("metric", metric.name, f"seed {seed}: {why}") from None
    return ready


def _gaps(arms: list[list[Weighted]], w_N: np.ndarray) -> np.ndarray:
    """a - b of each seed under the same weights of rows, [S]."""
    a_S, b_S = (np.array([weighted(w_N) for weighted in arm]) for arm in arms)
    return a_S - b_S


def _check_pair(pred: Scored, human: Scored, values_L: np.ndarray) -> None:
    rows = len(pred.mean_N), len(human.mean_N)
    if rows[0] != rows[1] or not rows[0]:
        raise DataError.of(
            "rows", rows, "every prediction needs one answer of people, at least one"
        )
    for one in (pred, human):
        if one.probs_NL is not None and one.probs_NL.shape[1] != len(values_L):
            problem = f"does not fit {len(values_L)} levels"
            raise DataError.of("probs", one.probs_NL.shape, problem)
