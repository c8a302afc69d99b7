"""How good are a scorer's means, spreads and distributions, against those of people?

A metric of the table takes a prediction, the people's answer and the levels' values, and gives one
number. Those with `rows` are the mean of a number for each row; the others (correlations, QWK, a
root) are not. All maths in float64; distributions in nats, means in the unit of the values.

PLCC after a logistic fit is what image-quality papers print. A fit may turn a scorer that orders
everything backwards into a good one, so the raw PLCC always stands beside it, and rank correlations
are taken on raw predictions only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.special import expit, rel_entr
from scipy.stats import kendalltau

from llmkd.errors import DataError
from llmkd.labels.score_stats import LevelValues, check_probs

FLOOR = 1e-12  # least probability a prediction is given under KL: one row then costs 28 nats
SAME = 1e-12  # spread, of the size of the numbers, below which they are one number
SUMS = 1e-3  # how far probabilities may be from summing to one: bfloat16 softmaxes are

Part = Literal["std", "probs"]


class UndefinedError(Exception):
    """A metric that these numbers do not define; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Means of N rows, and their stds and level probabilities where known."""

    mean_N: np.ndarray
    std_N: np.ndarray | None = None
    probs_NL: np.ndarray | None = None

    @classmethod
    def of(
        cls, mean: ArrayLike, std: ArrayLike | None = None, probs: ArrayLike | None = None
    ) -> Scored:
        """Checked: DataError for NaN, std < 0, other lengths, and probabilities that do not sum to
        one within 1e-3 (then divided by their sum).
        """
        mean_N = np.asarray(mean, dtype=np.float64)
        std_N = None if std is None else np.asarray(std, dtype=np.float64)
        for key, values_N in (("mean", mean_N), ("std", std_N)):
            if values_N is None:
                continue
            if values_N.shape != (mean_N.size,):
                raise DataError.of(key, values_N.shape, f"needs {mean_N.size} numbers, one a row")
            bad_N = ~np.isfinite(values_N) | ((values_N < 0) & (key == "std"))
            if bad_N.any():
                row = int(bad_N.argmax())
                raise DataError.of(key, float(values_N[row]), f"row {row}: is no {key}")
        if probs is None:
            return cls(mean_N, std_N)
        probs_NL = np.asarray(probs, dtype=np.float64)
        check_probs(probs_NL, sum_within=SUMS)
        if len(probs_NL) != len(mean_N):
            raise DataError.of("probs", probs_NL.shape, f"needs {len(mean_N)} rows")
        return cls(mean_N, std_N, probs_NL / probs_NL.sum(-1, keepdims=True))

    @classmethod
    def from_probs(cls, probs: ArrayLike, values: ArrayLike) -> Scored:
        """With the mean and std that the probabilities give the values."""
        values_L = LevelValues.of(values).values_L
        probs_NL = np.asarray(probs, dtype=np.float64)
        check_probs(probs_NL, sum_within=SUMS)
        probs_NL = probs_NL / probs_NL.sum(-1, keepdims=True)
        mean_N = probs_NL @ values_L
        std_N = np.sqrt((probs_NL * (values_L - mean_N[:, None]) ** 2).sum(-1))
        return cls(mean_N, std_N, probs_NL)

    def take(self, rows: np.ndarray) -> Scored:
        """Some rows, by number or by a mask."""
        parts = (self.mean_N, self.std_N, self.probs_NL)
        mean_N, std_N, probs_NL = (None if one is None else one[rows] for one in parts)
        assert mean_N is not None
        return Scored(mean_N, std_N, probs_NL)


# How often each row counts, [N] -> the metric; UndefinedError where those rows do not define it.
Weighted = Callable[[np.ndarray], float]
Ready = Callable[[Scored, Scored, np.ndarray], Weighted]
Rows = Callable[[Scored, Scored, np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class ScoreMetric:
    """`ready(pred, human, values_L)` does once what all resamples share and gives the metric as a
    function of how often each row counts. `rows` is of metrics that are a mean of rows: [N], NaN
    for rows left out.

    `needs` beside means; `slow` are those of which a thousand resamples of many rows take minutes.
    """

    name: str
    higher_is_better: bool
    ready: Ready
    rows: Rows | None = None
    needs: tuple[Part, ...] = ()
    slow: bool = False

    def missing(self, pred: Scored, human: Scored) -> str:
        """What the inputs lack for this metric, in words; empty where nothing."""
        for part in self.needs:
            for who, one in (("predictions", pred), ("people", human)):
                if (one.std_N if part == "std" else one.probs_NL) is None:
                    return f"the {who} have no {part}"
        return ""

    def value(self, pred: Scored, human: Scored, values_L: np.ndarray) -> float:
        """On all rows, each once."""
        return self.ready(pred, human, values_L)(np.ones(len(pred.mean_N)))


def pearson(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Pearson's correlation; UndefinedError for fewer than three rows or a constant side."""
    return _pearson(x_N, y_N)(np.ones(len(x_N)))


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Pearson's of the ranks, ties at their mean rank."""
    return _spearman(x_N, y_N)(np.ones(len(x_N)))


def kendall(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Kendall's tau-b."""
    return _kendall(x_N, y_N)(np.ones(len(x_N)))


def quadratic_kappa(pred_N: np.ndarray, human_N: np.ndarray, values_L: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights of the nearest levels, weights by the levels' order:
    1 - E(i - j)^2 / (what independent answers with the same shares would have).
    """
    return _kappa(pred_N, human_N, values_L)(np.ones(len(pred_N)))


def _pearson(x_N: np.ndarray, y_N: np.ndarray) -> Weighted:
    _varies(x_N, y_N)
    x_N, y_N = ((side_N - side_N.mean()) / np.ptp(side_N) for side_N in (x_N, y_N))
    return lambda w_N: _weighted_pearson(x_N, y_N, w_N)


def _weighted_pearson(x_N: np.ndarray, y_N: np.ndarray, w_N: np.ndarray) -> float:
    """Of sides with a spread near one."""
    x_N, y_N = (side_N - w_N @ side_N / w_N.sum() for side_N in (x_N, y_N))
    spread_x, spread_y = w_N @ x_N**2, w_N @ y_N**2
    if min(spread_x, spread_y) <= SAME**2 * w_N.sum():
        raise UndefinedError("one side is constant on these rows")
    return float(np.clip((w_N * x_N) @ y_N / np.sqrt(spread_x * spread_y), -1.0, 1.0))


def _spearman(x_N: np.ndarray, y_N: np.ndarray) -> Weighted:
    _varies(x_N, y_N)
    code_x_N, code_y_N = (np.unique(side_N, return_inverse=True)[1] for side_N in (x_N, y_N))

    def ranks(code_N: np.ndarray, w_N: np.ndarray) -> np.ndarray:
        times_G = np.bincount(code_N, weights=w_N)  # groups of ties, ascending
        return ((np.cumsum(times_G) - 0.5 * times_G) / w_N.sum())[code_N]

    return lambda w_N: _weighted_pearson(ranks(code_x_N, w_N), ranks(code_y_N, w_N), w_N)


def _kendall(x_N: np.ndarray, y_N: np.ndarray) -> Weighted:
    _varies(x_N, y_N)

    def weighted(w_N: np.ndarray) -> float:
        rows = np.repeat(np.arange(len(w_N)), w_N.astype(np.int64))
        tau = float(np.asarray(kendalltau(x_N[rows], y_N[rows])[0]))
        if np.isnan(tau):
            raise UndefinedError("one side is constant on these rows")
        return tau

    return weighted


def _kappa(pred_N: np.ndarray, human_N: np.ndarray, values_L: np.ndarray) -> Weighted:
    i_N, j_N = (_nearest(side_N, values_L).astype(np.float64) for side_N in (pred_N, human_N))

    def weighted(w_N: np.ndarray) -> float:
        share_N = w_N / w_N.sum()
        chance = share_N @ (i_N**2 + j_N**2) - 2.0 * (share_N @ i_N) * (share_N @ j_N)
        if not chance > SAME:
            raise UndefinedError("both name one and the same level everywhere")
        return float(1.0 - share_N @ (i_N - j_N) ** 2 / chance)

    return weighted


def logistic(x: np.ndarray, top: float, bottom: float, middle: float, width: float) -> np.ndarray:
    """bottom + (top - bottom) / (1 + exp(-(x - middle) / width)), VQEG's four parameters."""
    return bottom + (top - bottom) * expit((x - middle) / width)


def logistic_fit(pred_N: np.ndarray, human_N: np.ndarray) -> np.ndarray:
    """Predictions mapped by the logistic with the least squares to the people's means: from the
    official start, and from the same falling. UndefinedError where no fit is found.
    """
    _varies(pred_N, human_N)
    if len(pred_N) < 5:
        raise UndefinedError(f"{len(pred_N)} rows are too few to fit four parameters")
    high, low, middle = human_N.max(), human_N.min(), pred_N.mean()
    best, least = None, np.inf
    for start in ((high, low), (low, high)):
        first = (*start, middle, pred_N.std() / 4.0)
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore", OptimizeWarning)
                found, _ = curve_fit(logistic, pred_N, human_N, p0=first, maxfev=10_000)
                fitted_N = logistic(pred_N, *found)
        except (RuntimeError, ValueError, np.linalg.LinAlgError):
            continue
        error = float(((fitted_N - human_N) ** 2).sum())
        if error < least:  # never so for NaN
            best, least = fitted_N, error
    if best is None:
        raise UndefinedError("the logistic fit did not converge")
    return best


def discrete_kl(pred: Scored, human: Scored, values_L: np.ndarray) -> np.ndarray:
    """KL(people || prediction) of each row over the levels, nats; a prediction's probabilities are
    taken for at least 1e-12.
    """
    p_NL, q_NL = _probs(human), np.maximum(_probs(pred), FLOOR)
    return rel_entr(p_NL, q_NL / q_NL.sum(-1, keepdims=True)).sum(-1)


def discrete_js(pred: Scored, human: Scored, values_L: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of each row over the levels, nats, at most log 2."""
    p_NL, q_NL = _probs(human), _probs(pred)
    half_NL = 0.5 * (p_NL + q_NL)
    return 0.5 * (rel_entr(p_NL, half_NL) + rel_entr(q_NL, half_NL)).sum(-1)


def discrete_wasserstein(pred: Scored, human: Scored, values_L: np.ndarray) -> np.ndarray:
    """Wasserstein-1 distance of each row over the levels' values, in their unit."""
    away_NL = np.abs(np.cumsum(_probs(pred) - _probs(human), axis=-1))
    return away_NL[:, :-1] @ np.abs(np.diff(values_L))


def gauss_kl(pred: Scored, human: Scored, values_L: np.ndarray) -> np.ndarray:
    """KL(people || prediction) of Gaussians with their means and stds, nats; NaN where either std
    is 0 (the official code's 1e-8 makes that 20 nats or minus infinity).
    """
    s_N, r_N = _std(human), _std(pred)
    both_N = (s_N > 0) & (r_N > 0)
    s_N, r_N = np.where(both_N, s_N, 1.0), np.where(both_N, r_N, 1.0)
    gap_N = human.mean_N - pred.mean_N
    kl_N = np.log(r_N / s_N) + 0.5 * ((s_N / r_N) ** 2 + (gap_N / r_N) ** 2 - 1.0)
    return np.where(both_N, kl_N, np.nan)


def gauss_w2(pred: Scored, human: Scored, values_L: np.ndarray) -> np.ndarray:
    """Wasserstein-2 distance of the same Gaussians, sqrt((m1 - m2)^2 + (s1 - s2)^2)."""
    return np.hypot(human.mean_N - pred.mean_N, _std(human) - _std(pred))


def _error(pred: Scored, human: Scored, values_L: np.ndarray) -> np.ndarray:
    return np.abs(pred.mean_N - human.mean_N)


def _mean_of(rows: Rows) -> Ready:
    def ready(pred: Scored, human: Scored, values_L: np.ndarray) -> Weighted:
        row_N = rows(pred, human, values_L)
        kept_N = ~np.isnan(row_N)
        row_M = row_N[kept_N]

        def weighted(w_N: np.ndarray) -> float:
            w_M = w_N[kept_N]
            if not w_M.sum() > 0:
                raise UndefinedError("no row has what it takes (a std above 0 on both sides)")
            return float(w_M @ row_M / w_M.sum())

        return weighted

    return ready


def _of_means(function: Callable[[np.ndarray, np.ndarray], Weighted]) -> Ready:
    return lambda pred, human, values_L: function(pred.mean_N, human.mean_N)


def _of_stds(function: Callable[[np.ndarray, np.ndarray], Weighted]) -> Ready:
    return lambda pred, human, values_L: function(_std(pred), _std(human))


def _rmse(pred: Scored, human: Scored, values_L: np.ndarray) -> Weighted:
    square_N = (pred.mean_N - human.mean_N) ** 2
    return lambda w_N: float(np.sqrt(w_N @ square_N / w_N.sum()))


def _qwk(pred: Scored, human: Scored, values_L: np.ndarray) -> Weighted:
    return _kappa(pred.mean_N, human.mean_N, values_L)


def _fitted(pred_N: np.ndarray, human_N: np.ndarray) -> Weighted:
    return _pearson(logistic_fit(pred_N, human_N), human_N)


def _by_row(name: str, rows: Rows, *needs: Part) -> ScoreMetric:
    return ScoreMetric(name, False, _mean_of(rows), rows, needs)


SCORE_METRICS: dict[str, ScoreMetric] = {
    metric.name: metric
    for metric in (
        ScoreMetric("plcc", True, _of_means(_pearson)),
        ScoreMetric("plcc_logistic", True, _of_means(_fitted)),
        ScoreMetric("srcc", True, _of_means(_spearman)),
        ScoreMetric("krcc", True, _of_means(_kendall), slow=True),
        _by_row("mae", _error),
        ScoreMetric("rmse", False, _rmse),
        ScoreMetric("qwk", True, _qwk),
        ScoreMetric("std_plcc", True, _of_stds(_pearson), needs=("std",)),
        ScoreMetric("std_srcc", True, _of_stds(_spearman), needs=("std",)),
        _by_row("kl", discrete_kl, "probs"),
        _by_row("js", discrete_js, "probs"),
        _by_row("wasserstein", discrete_wasserstein, "probs"),
        _by_row("gauss_kl", gauss_kl, "std"),
        _by_row("gauss_w2", gauss_w2, "std"),
    )
}


def _varies(x_N: np.ndarray, y_N: np.ndarray) -> None:
    if len(x_N) < 3:  # two rows give 1 or -1, whatever they say
        raise UndefinedError(f"{len(x_N)} rows: a correlation needs three")
    for who, side_N in (("predictions", x_N), ("people's answers", y_N)):
        if np.ptp(side_N) <= SAME * np.abs(side_N).max():
            raise UndefinedError(f"the {who} are all equal")


def _nearest(mean_N: np.ndarray, values_L: np.ndarray) -> np.ndarray:
    """Number of the nearest level in ascending order; half-way it is the lower one."""
    return np.abs(mean_N[:, None] - np.sort(values_L)).argmin(-1)


def _std(one: Scored) -> np.ndarray:
    if one.std_N is None:
        raise UndefinedError("there is no std")
    return one.std_N


def _probs(one: Scored) -> np.ndarray:
    if one.probs_NL is None:
        raise UndefinedError("there are no level probabilities")
    return one.probs_NL
