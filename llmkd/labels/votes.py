"""Logits of preference from votes, shares, scores and tournaments; numpy, float64, nats.

A logit is log(p / (1 - p)) with p the probability that the first of two is preferred. Functions on
numbers broadcast, and swapping the two sides negates their result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit, log_ndtr

from llmkd.errors import DataError, RecipeError
from llmkd.objectives.preference import check_flip_rate

FLOOR = 0.01  # the least probability that taking out flips may leave: a logit of 4.6
LEAST_VOTES = 20  # fewer leave a temperature uncertain by a factor
ROUNDS = 100_000
STRIDE = 5.0  # nats: the longest step of Newton's, whose parabola is only good nearby

Round = Callable[[np.ndarray, np.ndarray], np.ndarray]  # wins [K, K], log-strengths [K]


def probability(logit: ArrayLike) -> np.ndarray:
    """sigma(logit)."""
    return expit(_f64(logit))


def vote_logit(wins: ArrayLike, votes: ArrayLike) -> np.ndarray:
    """log((w + 1/2) / (h - w + 1/2)) for w wins out of h votes (Haldane 1956).

    Finite at 0 and at h wins, 0 for no votes, and nearly unbiased: at p = .8 (logit 1.386) its mean
    is .66 for h = 1, 1.28 for 5, 1.39 for 20, where clipping w / h to [.01, .99] gives 2.76, 2.13
    and 1.51 with up to four times the standard deviation. Ties are half a win for each. DataError
    for w < 0 or w > h.
    """
    wins, votes = _f64(wins), _f64(votes)
    _check_wins(wins, votes)
    return np.log(wins + 0.5) - np.log(votes - wins + 0.5)


def clipped_logit(p: ArrayLike, eps: float) -> np.ndarray:
    """logit of p clipped to [eps, 1 - eps]. DataError for p outside [0, 1], RecipeError for eps
    outside (0, 1/2).
    """
    _check_share("eps", eps)
    p = _f64(p)
    _check_probability(p)
    return _clipped(p, 1.0 - p, eps)


def score_logit(m1: ArrayLike, v1: ArrayLike, m2: ArrayLike, v2: ArrayLike) -> np.ndarray:
    """logit of Phi((m1 - m2) / sqrt(v1 + v2)): two independent normal scores, means m, variances v.

    Good in the far tails, where Phi itself is 0 or 1 (the logit grows as half the square). Equal
    means give 0 even without variance; else no variance at all gives infinity. DataError for a
    negative variance.
    """
    gap, spread = _f64(m1) - _f64(m2), _f64(v1) + _f64(v2)
    for variance in (_f64(v1), _f64(v2)):
        if np.any(variance < 0):
            raise DataError.of("variance", float(np.nanmin(variance)), "must be >= 0")
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(gap == 0, 0.0, gap / np.sqrt(spread))
    return log_ndtr(z) - log_ndtr(-z)


def debias(p: ArrayLike, flip_rate: float, floor: float = FLOOR) -> np.ndarray:
    """(p - e) / (1 - 2e), clipped to [floor, 1 - floor]: p before a share e of votes was flipped.

    Of .74 at e = .2 this makes .9. Few votes often land outside [e, 1 - e], hence the floor.
    DataError for p outside [0, 1], RecipeError for e outside [0, 1/2).
    """
    check_flip_rate(flip_rate)
    _check_share("floor", floor)
    p = _f64(p)
    _check_probability(p)
    return np.clip((p - flip_rate) / (1.0 - 2.0 * flip_rate), floor, 1.0 - floor)


def debias_logit(logit: ArrayLike, flip_rate: float, floor: float = FLOOR) -> np.ndarray:
    """`debias` from logit to logit; a logit that was beyond the floor's already stays as it is, so
    that taking out flips never weakens a preference.
    """
    check_flip_rate(flip_rate)
    _check_share("floor", floor)
    logit = _f64(logit)
    if flip_rate == 0.0:
        return logit
    scale = 1.0 - 2.0 * flip_rate
    for_1, for_2 = ((expit(side) - flip_rate) / scale for side in (logit, -logit))
    clean = _clipped(np.maximum(for_1, 0.0), np.maximum(for_2, 0.0), floor)
    return np.where(np.abs(clean) < np.abs(logit), logit, clean)


def both_orders(logit_12: ArrayLike, logit_21: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """`(logit, first_lean)` of a pair shown in both orders, nats.

    Each argument is the logit that the one shown *first* is preferred: 1 in `logit_12`, 2 in
    `logit_21`. The logit for 1 is half their difference, the lean towards the first half their sum.
    Where one order is NaN (not asked) the other is taken as it is and the lean is NaN.
    """
    shown_1, shown_2 = np.broadcast_arrays(_f64(logit_12), -_f64(logit_21))
    logit = np.where(np.isnan(shown_1), shown_2, np.where(np.isnan(shown_2), shown_1, np.nan))
    both = ~np.isnan(shown_1) & ~np.isnan(shown_2)
    return np.where(both, (shown_1 + shown_2) / 2.0, logit), (shown_1 - shown_2) / 2.0


def bradley_terry(wins_KK: ArrayLike, pseudo: float = 0.5) -> np.ndarray:
    """Log-strengths [K] in nats with mean 0: the Bradley-Terry maximum likelihood of a tournament.

    `wins_KK[i, j]`: how often i beat j, fractions allowed, the diagonal ignored; the logit of i
    against j is the difference of their log-strengths. `pseudo` wins are added each way to every
    pair; with 1/2 two players get `vote_logit`. Newman's iteration (arXiv 2207.00076) in
    logarithms, helped by Newton's; `zermelo` is the definition. DataError with pseudo = 0 where
    somebody never lost or never won against the rest: no finite strengths are best then.
    """
    return _fit(wins_KK, pseudo, _fast_round, settled=1e-9)  # the error after it: its square


def zermelo(wins_KK: ArrayLike, pseudo: float = 0.5) -> np.ndarray:
    """`bradley_terry` by Zermelo's own iteration (1929), slower:
    s_i <- sum_j w_ij / sum_j [(w_ij + w_ji) / (s_i + s_j)].
    """
    return _fit(wins_KK, pseudo, _zermelo_round, settled=1e-12)  # it creeps


def fit_temperature(
    logits_N: ArrayLike, wins_N: ArrayLike, votes_N: ArrayLike, *, least: float = LEAST_VOTES
) -> float:
    """T > 0 that makes held-out votes likeliest: w of h votes, binomial under sigma(logit / T).

    Above 1 the logits were too sure. DataError for fewer than `least` votes on pairs with a logit
    other than 0, for logits that contradict the votes on balance (no T helps), and for votes that
    never contradict the logits (the likelihood grows as T goes to 0).
    """
    logits_N, wins_N, votes_N = np.broadcast_arrays(_f64(logits_N), _f64(wins_N), _f64(votes_N))
    _check_wins(wins_N, votes_N)
    used_N = (votes_N > 0) & (logits_N != 0)
    l_N, w_N, h_N = logits_N[used_N], wins_N[used_N], votes_N[used_N]
    if not np.isfinite(np.concatenate((l_N, w_N, h_N))).all():
        raise DataError.of("logits", "NaN or infinity", "a temperature needs finite numbers")
    if h_N.sum() < least:
        problem = f"too few to fit a temperature, which needs {least:g}"
        raise DataError.of("votes", float(h_N.sum()), problem, "rate more pairs", "leave it at 1")
    scale = float(np.abs(l_N).mean())
    x_N = l_N / scale

    def slope(sharpness: float) -> float:
        return float((x_N * (w_N - h_N * expit(sharpness * x_N))).sum())

    # votes that balance exactly must not seem to agree by the last bit of a sum
    if slope(0.0) <= 1e-12 * float((np.abs(x_N) * h_N).sum()):
        problem = "the logits contradict the votes on balance; no temperature makes them likelier"
        raise DataError.of("logits", f"{len(l_N)} pairs", problem, "check which response is which")
    against_N = np.where(x_N > 0, h_N - w_N, w_N)
    if against_N.sum() == 0.0:
        problem = "no vote contradicts the logits: the fit would be T = 0"
        raise DataError.of("votes", float(h_N.sum()), problem, "rate more, and harder, pairs")
    high = 1.0
    while slope(high) > 0.0:
        high *= 2.0
    return scale / cast(float, brentq(slope, 0.0, high, xtol=1e-13))


def _fit(wins: ArrayLike, pseudo: float, one_round: Round, *, settled: float) -> np.ndarray:
    """Rounds until none moves anybody by `settled` nats (relative beyond 1)."""
    wins_KK = _checked_wins(wins, pseudo)
    log_K = np.zeros(len(wins_KK))
    if len(log_K) < 2:
        return log_K
    for _ in range(ROUNDS):
        before_K, log_K = log_K, one_round(wins_KK, log_K)
        log_K = log_K - log_K.mean()
        if np.abs(log_K - before_K).max() < settled * max(1.0, np.abs(log_K).max()):
            return log_K
    problem = f"Bradley-Terry strengths did not settle in {ROUNDS} rounds"
    raise DataError.of("wins", wins_KK.tolist(), problem, "add pseudo-wins (0.5)")


def _fast_round(wins_KK: np.ndarray, log_K: np.ndarray) -> np.ndarray:
    """Newman's round, then Newton's step where it is no worse: Newman alone always climbs, but
    takes 10^5 rounds where two groups hardly ever beat each other.
    """
    log_K = _newman_round(wins_KK, log_K)
    gap_KK = log_K[:, None] - log_K[None, :]
    slope_K = (wins_KK * expit(-gap_KK) - wins_KK.T * expit(gap_KK)).sum(1)
    bend_KK = (wins_KK + wins_KK.T) * expit(gap_KK) * expit(-gap_KK)
    step_K = np.linalg.lstsq(np.diag(bend_KK.sum(1)) - bend_KK, slope_K)[0]
    newton_K = log_K + step_K * (STRIDE / max(np.abs(step_K).max(), STRIDE))
    old, new = (_likelihood(wins_KK, each_K) for each_K in (log_K, newton_K))
    return newton_K if new >= old - 1e-13 * abs(old) else log_K


def _likelihood(wins_KK: np.ndarray, log_K: np.ndarray) -> float:
    """Sum of w_ij log P(i beats j), nats."""
    return float((wins_KK * log_expit(log_K[:, None] - log_K[None, :])).sum())


def _newman_round(wins_KK: np.ndarray, log_K: np.ndarray) -> np.ndarray:
    """s_i <- sum_j [w_ij s_j / (s_i + s_j)] / sum_j [w_ji / (s_i + s_j)], one after the other:
    all at once two players would swing for ever.
    """
    log_K = log_K.copy()
    for i in range(len(log_K)):
        gap_K = log_K[i] - log_K
        won, lost = wins_KK[i] @ expit(-gap_K), wins_KK[:, i] @ expit(gap_K)
        log_K[i] += np.log(won) - np.log(lost)
    return log_K


def _zermelo_round(wins_KK: np.ndarray, log_K: np.ndarray) -> np.ndarray:
    played_KK = wins_KK + wins_KK.T
    shares_KK = expit(log_K[:, None] - log_K[None, :])  # s_i / (s_i + s_j)
    return log_K + np.log(wins_KK.sum(1)) - np.log((played_KK * shares_KK).sum(1))


def _checked_wins(wins: ArrayLike, pseudo: float) -> np.ndarray:
    wins_KK = _f64(wins).copy()
    if wins_KK.ndim != 2 or wins_KK.shape[0] != wins_KK.shape[1]:
        raise DataError.of("wins", wins_KK.shape, "must be a square table")
    if not pseudo >= 0.0:
        raise RecipeError.of("pseudo", pseudo, "must be >= 0", "default: 0.5")
    np.fill_diagonal(wins_KK, 0.0)
    if not np.isfinite(wins_KK).all() or np.any(wins_KK < 0):
        raise DataError.of("wins", wins_KK.tolist(), "must be finite and >= 0")
    wins_KK += pseudo  # on the diagonal too, where it favours nobody
    groups, group_K = connected_components(wins_KK > 0, directed=True, connection="strong")
    if groups > 1:
        named = [np.flatnonzero(group_K == group).tolist() for group in range(groups)]
        problem = f"between the groups {named} wins go one way at most; no strengths are finite"
        raise DataError.of("wins", wins_KK.tolist(), problem, "pseudo=0.5")
    return wins_KK


def _check_wins(wins: np.ndarray, votes: np.ndarray) -> None:
    wrong = np.argwhere((wins < 0) | (wins > votes))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        wins, votes = np.broadcast_arrays(wins, votes)
        problem = f"{wins[place]:g} wins of {votes[place]:g} votes (at {list(place)})"
        raise DataError.of("wins", float(wins[place]), problem, "wins must lie in [0, votes]")


def _check_probability(p: np.ndarray) -> None:
    wrong = p[(p < 0) | (p > 1)]
    if wrong.size:
        raise DataError.of("probability", float(wrong[0]), "must lie in [0, 1]")


def _check_share(key: str, value: float) -> None:
    if not 0.0 < value < 0.5:
        raise RecipeError.of(key, value, "must lie in (0, 0.5)", "default: 0.01")


def _clipped(p: np.ndarray, other: np.ndarray, eps: float) -> np.ndarray:
    """log(p / other) for p + other = 1, p clipped to [eps, 1 - eps]."""
    limit = np.log1p(-eps) - np.log(eps)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(p) - np.log(other), -limit, limit)


def _f64(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)
