"""Does a judge agree with people, is it as sure as it should be, and does it look at the order?

`logits_N` is a judge's logit (nats) that response 1 of a pair is preferred, `wins_N` of `votes_N`
people preferred it (ties are half a win). Which response is called 1 means nothing: every number
here stays the same when the responses of some pairs change places (their logit is negated, their
wins become votes - wins). All maths in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.special import expit

from llmkd.errors import DataError
from llmkd.labels.votes import fit_temperature

BINS = 10
DRAWS = 2000
FOLDS = 5
ALWAYS = 0.9  # share of answers for one place from which on a judge hardly reads


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the middle 95 % of a bootstrap over pairs."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PositionBias:
    """`lean`: mean logit (nats) that whichever response was shown first is preferred; `disagree`:
    share of pairs whose two orders name different responses; `first`: share of answers for the
    response shown first (ties half); `words`: said where one place wins nearly always.
    """

    lean: float
    disagree: float
    first: float
    pairs: int
    words: str = ""


@dataclass(frozen=True, slots=True)
class Temperature:
    """`value` fitted on all pairs; `ece` and `log_loss` of every pair under a temperature fitted
    without its fold; `words` says why there is none.
    """

    value: float | None = None
    ece: float | None = None
    log_loss: float | None = None
    words: str = ""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One judge against people. Shares in [0, 1]; `log_loss` in nats a vote; `pairs` have both an
    answer and a vote, `unanswered` a vote alone. `decided` is the accuracy where people have a
    majority. None stands where there is nothing to measure.
    """

    name: str
    pairs: int
    unanswered: int
    accuracy: Interval
    decided: Interval | None
    ece: float
    brier: float
    log_loss: float
    temperature: Temperature
    position: PositionBias | None = None
    seconds: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def agreement(
    name: str,
    logits_N: np.ndarray,
    wins_N: np.ndarray,
    votes_N: np.ndarray,
    *,
    first_N: np.ndarray | None = None,
    seed: int = 0,
    seconds: float | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Agreement:
    """All numbers of one judge. NaN logits are pairs it did not answer; pairs without votes are
    left out. `first_N` is its lean towards the first (nats), NaN where one order was asked.

    DataError where no pair has both, or shapes and votes do not fit.
    """
    logits_N, wins_N, votes_N = (
        np.asarray(v, dtype=np.float64) for v in (logits_N, wins_N, votes_N)
    )
    _check(logits_N, wins_N, votes_N)
    rated_N, answered_N = votes_N > 0, ~np.isnan(logits_N)
    used_N = rated_N & answered_N
    if not used_N.any():
        problem = f"has no answer to any of {int(rated_N.sum())} rated pairs"
        raise DataError.of("annotators", name, problem, "rate pairs, or look at what it answers")
    l_N, w_N, h_N = logits_N[used_N], wins_N[used_N], votes_N[used_N]
    majority_N = w_N * 2 != h_N
    hits_N = hits(l_N, w_N, h_N)
    return Agreement(
        name=name,
        pairs=len(l_N),
        unanswered=int((rated_N & ~answered_N).sum()),
        accuracy=bootstrap(hits_N, seed=seed),
        decided=bootstrap(hits_N[majority_N], seed=seed) if majority_N.any() else None,
        ece=ece(l_N, w_N / h_N),
        brier=brier(l_N, w_N / h_N),
        log_loss=log_loss(l_N, w_N, h_N),
        temperature=cross_temperature(l_N, w_N, h_N, seed=seed),
        position=None if first_N is None else position_bias(logits_N, np.asarray(first_N)),
        seconds=seconds,
        notes=dict(notes or {}),
    )


def _check(logits_N: np.ndarray, wins_N: np.ndarray, votes_N: np.ndarray) -> None:
    shapes = [logits_N.shape, wins_N.shape, votes_N.shape]
    if len(set(shapes)) != 1 or logits_N.ndim != 1:
        raise DataError.of("shapes", shapes, "logits, wins and votes need one number a pair each")
    if not (np.isfinite(wins_N).all() and np.isfinite(votes_N).all()):
        raise DataError.of("votes", "NaN or infinite", "must be numbers")
    bad_N = (wins_N < 0) | (wins_N > votes_N)
    if bad_N.any():
        place = int(bad_N.argmax())
        said = f"{wins_N[place]:g} of {votes_N[place]:g}"
        raise DataError.of("wins", said, f"is no number of wins (pair {place})")
    if np.isinf(logits_N).any():
        raise DataError.of("logits", "infinite", "must be finite, or NaN for no answer")


def hits(logits_N: np.ndarray, wins_N: np.ndarray, votes_N: np.ndarray) -> np.ndarray:
    """1 where a judge names the majority's response, 0 where the other, ½ where people or the judge
    are at a tie.
    """
    return 0.5 + 0.5 * np.sign(logits_N) * np.sign(2 * wins_N - votes_N)


def bootstrap(
    values_N: np.ndarray, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of values of independent pairs, and the middle `level` of means of resampled pairs."""
    make, count = np.random.default_rng(seed), len(values_N)
    kinds, times = np.unique(values_N, return_counts=True)
    if len(kinds) <= 3:  # hits: a draw of pairs is a draw of how often each of 0, 1/2, 1 occurs
        means_D = make.multinomial(count, times / count, size=draws) @ kinds / count
    else:
        means_D = np.array(
            [values_N[make.integers(count, size=count)].mean() for _ in range(draws)]
        )
    low, high = np.quantile(means_D, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values_N.mean()), float(low), float(high))


def reliability(
    logits_N: np.ndarray, share_N: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(said_B, found_B, count_B)`: mean sigma(|logit|), mean share of votes for the response the
    judge prefers, and pairs, in `bins` of (nearly) equal numbers of pairs by |logit|.

    Pairs are turned so that the judge prefers response 1. Where its logit is 0 it prefers none and
    the share is ½ for it. Pairs of one and the same |logit| share their mean, so that the bins do
    not depend on the order of the pairs.
    """
    side_N = np.sign(logits_N)
    turned_N = np.where(side_N > 0, share_N, np.where(side_N < 0, 1 - share_N, 0.5))
    values, group_N = np.unique(np.abs(logits_N), return_inverse=True)
    mean_G = np.bincount(group_N, turned_N) / np.bincount(group_N)
    order = np.sort(group_N)
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)]
    said_B = np.array([expit(values[part]).mean() for part in parts])
    found_B = np.array([mean_G[part].mean() for part in parts])
    return said_B, found_B, np.array([len(part) for part in parts])


def ece(logits_N: np.ndarray, share_N: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean |said - found| over the bins of `reliability`, weighted by
    their pairs. 0 is calibrated, ½ always sure and right half of the time, 1 always sure and wrong.
    """
    said_B, found_B, count_B = reliability(logits_N, share_N, bins)
    return float(np.abs(said_B - found_B) @ count_B / count_B.sum())


def brier(logits_N: np.ndarray, share_N: np.ndarray) -> float:
    """Mean squared difference of sigma(logit) and the share of votes; always ½ gives ≤ ¼."""
    return float(np.mean((expit(logits_N) - share_N) ** 2))


def log_loss(logits_N: np.ndarray, wins_N: np.ndarray, votes_N: np.ndarray) -> float:
    """Mean -log of what sigma(logit) gave each vote, nats a vote; always ½ gives log 2 = .693."""
    losses_N = wins_N * np.logaddexp(0, -logits_N) + (votes_N - wins_N) * np.logaddexp(0, logits_N)
    return float(losses_N.sum() / votes_N.sum())


def cross_temperature(
    logits_N: np.ndarray,
    wins_N: np.ndarray,
    votes_N: np.ndarray,
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> Temperature:
    """The temperature that fits, and how well it does on pairs it was not fitted on: each of
    `folds` parts under the temperature of the others.
    """
    try:
        value = fit_temperature(logits_N, wins_N, votes_N)
        part_N = np.random.default_rng(seed).permutation(len(logits_N)) % min(folds, len(logits_N))
        out_N = np.empty(len(logits_N))
        for part in np.unique(part_N):
            rest = part_N != part
            held = fit_temperature(logits_N[rest], wins_N[rest], votes_N[rest])
            out_N[~rest] = logits_N[~rest] / held
    except DataError as error:
        return Temperature(words=str(error).splitlines()[0])
    return Temperature(value, ece(out_N, wins_N / votes_N), log_loss(out_N, wins_N, votes_N))


def position_bias(logits_N: np.ndarray, first_N: np.ndarray) -> PositionBias | None:
    """What the order did, from both orders' logit for response 1, L + F and L - F, where L is the
    judge's logit and F its lean; None where no pair was asked in both orders.

    For votes F is the logit of the votes for the first of both orders together: the orders name
    different responses just when |F| > |L|, whatever the number of votes an order.
    """
    asked_N = ~np.isnan(logits_N) & ~np.isnan(first_N)
    if not asked_N.any():
        return None
    l_N, f_N = logits_N[asked_N], first_N[asked_N]
    one_N, other_N = f_N + l_N, f_N - l_N  # logit of the one shown first, in either order
    near_N = np.abs(np.abs(f_N) - np.abs(l_N)) <= 1e-9 * (np.abs(f_N) + np.abs(l_N))
    disagree = float(np.mean((np.abs(f_N) > np.abs(l_N)) & ~near_N))
    first = float(np.mean(0.5 + 0.25 * (_sign(one_N) + _sign(other_N))))
    words = ""
    if first > ALWAYS or first < 1 - ALWAYS:
        place, share = ("first", first) if first > 0.5 else ("second", 1 - first)
        words = (
            f"prefers the {place} response whatever it says: {share:.0%} of its answers; asking "
            "both orders cancels that, but leaves little behind"
        )
    return PositionBias(float(f_N.mean()), disagree, first, int(asked_N.sum()), words)


def _sign(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < 1e-9, 0.0, np.sign(values))


def raw_agreement(logits_N: np.ndarray, other_N: np.ndarray) -> float | None:
    """Share of pairs on which two judges name the same response (or both none); None where they
    answered no pair in common.
    """
    a_N, b_N = _verdicts(logits_N, other_N)
    return float(np.mean(a_N == b_N)) if len(a_N) else None


def kappa(logits_N: np.ndarray, other_N: np.ndarray) -> float | None:
    """Cohen's kappa of two judges' verdicts (1, tie, 2): agreement beyond chance, 1 at most, 0 for
    judges that know nothing of each other.

    Chance is taken with every pair counted in both orders, so that each judge names 1 and 2 equally
    often and the order of the responses means nothing. None where nothing but ties is in common.
    """
    a_N, b_N = _verdicts(logits_N, other_N)
    if not len(a_N):
        return None
    tie_a, tie_b = np.mean(a_N == 0), np.mean(b_N == 0)
    chance = tie_a * tie_b + (1 - tie_a) * (1 - tie_b) / 2
    return None if chance == 1 else float((np.mean(a_N == b_N) - chance) / (1 - chance))


def _verdicts(logits_N: np.ndarray, other_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both_N = ~np.isnan(logits_N) & ~np.isnan(other_N)
    return np.sign(logits_N[both_N]), np.sign(other_N[both_N])


def rater_agreement(wins_N: np.ndarray, votes_N: np.ndarray) -> float | None:
    """Share of two raters of one pair that voted alike, over pairs with several votes: more cannot
    be asked of a judge. Votes are taken for one side or the other, so that a tie counts as half a
    vote each. None where no pair has two votes.
    """
    several_N = votes_N >= 2
    w_N, h_N = wins_N[several_N], votes_N[several_N]
    if not len(h_N):
        return None
    same_N = w_N * (w_N - 1) + (h_N - w_N) * (h_N - w_N - 1)
    return float(np.clip(same_N / (h_N * (h_N - 1)), 0, 1).mean())
