"""From what annotators said about K responses to one table of logits, and from that to pairs.

Tables are [K, K], float64, nats, antisymmetric: entry i, j is the logit that i is preferred to j,
NaN where nobody was asked, as in `preference.py`. JSON has null for NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy.sparse.csgraph import connected_components

from llmkd.errors import DataError, RecipeError
from llmkd.labels.preference import Annotation, Logits, Scores, Votes
from llmkd.labels.votes import bradley_terry, debias_logit, probability, vote_logit
from llmkd.objectives.preference import check_positive
from llmkd.objectives.registry import near_names

PairChoice = Literal["best_worst", "all", "tournament"]
Combination = Literal["average", "votes", "tournament"]
PAIR_CHOICES: tuple[PairChoice, ...] = ("best_worst", "all", "tournament")
COMBINATIONS: tuple[Combination, ...] = ("average", "votes", "tournament")
SURE = 15.0  # nats: beyond it a soft win is a win but for 3e-7, and strengths are badly determined
SAME = 1e-9  # relative: tables that differ by less are the same table

Pair = tuple[int, int, float]


def choose_pairs(
    logits_KK: np.ndarray, how: str, *, wins_KK: np.ndarray | None = None
) -> list[Pair]:
    """`(i, j, logit that i is preferred to j)` with i < j, so that either may be the winner.

    `all`: every asked pair. `best_worst`: the highest and the lowest mean of sigma(logit) over the
    pairs a response was asked in, with the logit that stands in the table; of these means the two
    furthest apart that were asked together. `tournament`: the strongest and the weakest response
    with the gap of their Bradley-Terry log-strengths; where pairs do not connect all responses,
    within the largest connected group. The fit is to sigma(logit) of every asked pair as soft wins
    or to `wins_KK`, votes with 1/2 pseudo-win each way (and without what `combine` did to the
    logits since). Of equal pairs the first; nothing where no pair was asked.

    The winner's curse: with few noisy votes the best is also the luckiest, and its logit against
    the worst too large. Of 4 responses that are all alike, with 5 votes a pair, best_worst gives
    the best a mean logit of .93 and tournament .81 where 0 is true; `all`, which does not look, 0
    [ours]. More votes a pair and a temperature fitted on held-out votes make it smaller.

    Raises DataError for a table that is not antisymmetric or not finite, RecipeError for `how`.
    """
    _check_choice("pairs", how, PAIR_CHOICES)
    asked_KK = _asked(logits_KK)
    pairs = [(int(i), int(j)) for i, j in np.argwhere(np.triu(asked_KK, 1))]
    if how == "all" or not pairs:
        return [(i, j, float(logits_KK[i, j])) for i, j in pairs]
    if how == "best_worst":
        wins = np.where(asked_KK, probability(logits_KK), 0.0)
        mean_K = wins.sum(1) / np.maximum(asked_KK.sum(1), 1)
        i, j = max(pairs, key=lambda pair: abs(mean_K[pair[0]] - mean_K[pair[1]]))
        return [(i, j, float(logits_KK[i, j]))]
    log_K, group_K = _strengths(asked_KK, logits_KK, wins_KK)
    group = np.flatnonzero(group_K == np.bincount(group_K).argmax()).tolist()
    i, j = max(combinations(group, 2), key=lambda pair: abs(log_K[pair[0]] - log_K[pair[1]]))
    return [(i, j, float(log_K[i] - log_K[j]))]


def combine(
    annotations: Sequence[Annotation],
    how: str = "average",
    *,
    flip_rate: float = 0.0,
    temperature: float = 1.0,
    max_logit: float | None = None,
) -> np.ndarray:
    """One table [K, K] of several annotators' answers on the same K responses.

    `average`: the mean of the logits of those who were asked. `votes`: each annotator's preferred
    one of a pair is one vote, its own votes count as many as they are; Haldane's logit of all.
    `tournament`: the same votes, 1/2 pseudo-win added each way to every pair, Bradley-Terry's
    log(s_i / s_j): transitive, and there for pairs nobody was asked as long as others connect them.

    Then, in this order: flips are taken out (`debias_logit`), the logit is divided by
    `temperature`, and clamped to +-max_logit. Raises RecipeError for settings, DataError for no
    annotation, different K, or infinite logits that nothing clamps.
    """
    _check_choice("combine", how, COMBINATIONS)
    check_positive("logit_temperature", temperature)
    check_positive("max_logit", max_logit)
    _check_counts(annotations)
    if how == "average":
        logits_KK = _mean([annotation.logits() for annotation in annotations])
    else:
        wins_KK, votes_KK = pooled_votes(annotations)
        logits_KK = _pooled_logits(wins_KK, votes_KK, how)
    logits_KK = debias_logit(logits_KK, flip_rate) / temperature
    if max_logit is not None:
        logits_KK = np.clip(logits_KK, -max_logit, max_logit)
    np.fill_diagonal(logits_KK, 0.0)
    if np.isinf(logits_KK).any():
        problem = "the annotators are infinitely sure"
        raise DataError.of("logits", numbers_to_json(logits_KK), problem, "set max_logit")
    return logits_KK


def pooled_votes(annotations: Sequence[Annotation]) -> tuple[np.ndarray, np.ndarray]:
    """`(wins, votes)` [K, K] of all annotators together: own votes, or one vote by the sign of a
    logit (half a win each at 0, none where it is NaN).
    """
    parts = [_votes_of(annotation) for annotation in annotations]
    wins, votes = (np.sum([part[side] for part in parts], axis=0) for side in (0, 1))
    return wins, votes


def to_json(name: str, annotation: Annotation) -> dict[str, Any]:
    """One entry of "by" in an annotation row: what the annotator called `name` said."""
    entry: dict[str, Any] = {"annotator": name}
    if isinstance(annotation, Scores):
        parts = {"scores": annotation.scores_K, "variance": annotation.variance_K}
    elif isinstance(annotation, Votes):
        parts = {"wins": annotation.wins_KK, "votes": annotation.votes_KK}
        if annotation.first_KK is not None:
            parts["first"] = annotation.first_KK
    else:
        parts = {"logits": annotation.logits_KK, "first": annotation.first_KK}
    return entry | {
        key: None if part is None else numbers_to_json(part) for key, part in parts.items()
    }


def from_json(entry: Mapping[str, Any]) -> tuple[str, Annotation]:
    """`(name, annotation)` of an entry that `to_json` made; DataError for any other."""
    kinds = {"scores": Scores, "wins": Votes, "logits": Logits}
    rests = {"scores": "variance", "wins": "votes", "logits": "first"}
    kind = next((key for key in kinds if key in entry), None)
    if kind is None or "annotator" not in entry or (kind == "wins" and entry.get("votes") is None):
        problem = "needs annotator and scores, wins with votes, or logits"
        raise DataError.of("annotation", dict(entry), problem)
    rest = entry.get(rests[kind])
    second = None if rest is None else numbers_from_json(rest)
    third = [numbers_from_json(entry["first"])] if kind == "wins" and entry.get("first") else []
    return str(entry["annotator"]), kinds[kind](numbers_from_json(entry[kind]), second, *third)


def numbers_to_json(values: np.ndarray) -> list[Any]:
    """Nested lists of floats; null for NaN, which JSON does not have."""
    boxed = np.asarray(values, dtype=np.float64).astype(object)
    boxed[np.isnan(values)] = None
    return boxed.tolist()


def numbers_from_json(values: Sequence[Any]) -> np.ndarray:
    """float64 of what `numbers_to_json` made."""
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _votes_of(annotation: Annotation) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(annotation, Votes):
        wins_KK, votes_KK = annotation.wins_KK.astype(float), annotation.votes_KK.astype(float)
    else:
        logits_KK = annotation.logits()
        votes_KK = (~np.isnan(logits_KK)).astype(float)
        wins_KK = np.where(votes_KK > 0, 0.5 + 0.5 * np.sign(logits_KK), 0.0)
    off_KK = ~np.eye(annotation.count, dtype=bool)
    return np.where(off_KK, wins_KK, 0.0), np.where(off_KK, votes_KK, 0.0)


def _pooled_logits(wins_KK: np.ndarray, votes_KK: np.ndarray, how: str) -> np.ndarray:
    if how == "votes":
        return np.where(votes_KK > 0, vote_logit(wins_KK, votes_KK), np.nan)
    log_K, group_K = _strengths(votes_KK > 0, wins_KK, wins_KK)
    together_KK = group_K[:, None] == group_K[None, :]
    return np.where(together_KK, log_K[:, None] - log_K[None, :], np.nan)


def _strengths(
    asked_KK: np.ndarray, logits_KK: np.ndarray, wins_KK: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Log-strengths and the number of the connected group of each response, [K] both; strengths
    compare within a group only.
    """
    _, group_K = connected_components(asked_KK, directed=False)
    log_K = np.zeros(len(asked_KK))
    for group in np.unique(group_K):
        members = np.flatnonzero(group_K == group)
        part = np.ix_(members, members)
        if wins_KK is None:
            log_K[members] = _soft_strengths(asked_KK[part], logits_KK[part])
        else:
            log_K[members] = bradley_terry(np.where(asked_KK[part], wins_KK[part], 0.0))
    return log_K, group_K


def _soft_strengths(asked_KK: np.ndarray, logits_KK: np.ndarray) -> np.ndarray:
    """Of sigma(logit) as wins. Logits that agree with each other need no fit, however large."""
    mean_K = np.where(asked_KK, logits_KK, 0.0).sum(1) / len(logits_KK)
    known = logits_KK[asked_KK]
    off = np.abs((mean_K[:, None] - mean_K[None, :])[asked_KK] - known)
    complete = len(known) == len(logits_KK) * (len(logits_KK) - 1)
    if complete and off.max(initial=0.0) <= SAME * max(1.0, np.abs(known).max(initial=0.0)):
        return mean_K
    soft_KK = probability(np.clip(logits_KK, -SURE, SURE))
    return bradley_terry(np.where(asked_KK, soft_KK, 0.0), pseudo=0.0)


def _mean(tables: Sequence[np.ndarray]) -> np.ndarray:
    stacked = np.stack(tables)
    asked = ~np.isnan(stacked)
    count_KK = asked.sum(0)
    with np.errstate(invalid="ignore"):
        total_KK = np.where(asked, stacked, 0.0).sum(0)
    if np.isnan(total_KK).any():
        raise DataError.of("logits", "inf - inf", "annotators are infinitely sure of opposites")
    return np.where(count_KK > 0, total_KK / np.maximum(count_KK, 1), np.nan)


def _asked(logits_KK: np.ndarray) -> np.ndarray:
    """Which pairs have a logit; the diagonal has none."""
    shape = np.shape(logits_KK)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise DataError.of("logits", shape, "must be a square table")
    off_KK = ~np.eye(shape[0], dtype=bool)
    odd = np.allclose(logits_KK[off_KK], -logits_KK.T[off_KK], atol=1e-6, equal_nan=True)
    if not odd or np.isinf(logits_KK).any():
        problem = "must be finite or NaN, and entry j, i the negative of entry i, j"
        raise DataError.of("logits", numbers_to_json(logits_KK), problem)
    return off_KK & ~np.isnan(logits_KK)


def _check_counts(annotations: Sequence[Annotation]) -> None:
    counts = [annotation.count for annotation in annotations]
    if len(set(counts)) != 1:
        raise DataError.of("annotations", counts, "need one number of responses, the same for all")


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        ways = near_names(value, dict.fromkeys(known))
        raise RecipeError.of(key, value, "unknown", *ways)
