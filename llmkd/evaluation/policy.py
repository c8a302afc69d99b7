"""Numbers of one policy on held-out prompts: who wins, how far it moved, what its text is like.

Everything here is plain numpy over answers that exist already; no model is asked. Logits and
log-probabilities are in nats, lengths in tokens (the END token counts where it was written).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from llmkd.errors import DataError
from llmkd.evaluation.paired import paired_difference


def between(logits_KK: Any, mine: int) -> np.ndarray:
    """The part [mine, K - mine] of an annotator's table in which the first `mine` responses are one
    policy's and the rest the other's: logits in nats that the first policy's is preferred.
    """
    logits_KK = np.asarray(logits_KK, dtype=np.float64)
    count = len(logits_KK)
    if logits_KK.shape != (count, count) or not 0 < mine < count:
        problem = f"a table {logits_KK.shape} does not hold {mine} responses beside the other's"
        raise DataError.of("mine", mine, problem)
    return logits_KK[:mine, mine:]


def win_rate(
    logits_N: Any,
    prompts_N: Any = None,
    *,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """How often this policy beats another: {"soft", "hard", "low", "high"} as shares 0..1, and how
    many "prompts" were judged.

    `logits_N` are logits (nats) that this policy's response is preferred, one a pair; NaN is a pair
    nobody was asked about, two equal texts are a 0. `prompts_N` tells which pairs share a prompt
    (by default none): every prompt counts the same, however many pairs it has. "soft" is the mean
    probability sigma(logit), "hard" counts signs with ties as half. "low" and "high" bound "soft"
    by a bootstrap that draws prompts, since pairs of one prompt are not independent; of a single
    prompt it knows no spread. Raises DataError where no pair was judged.
    """
    logits_N = np.asarray(logits_N, dtype=np.float64)
    names = list(range(len(logits_N))) if prompts_N is None else list(prompts_N)
    if logits_N.ndim != 1 or len(names) != len(logits_N):
        problem = "every pair needs one logit and one prompt"
        raise DataError.of("logits", (logits_N.shape, len(names)), problem)
    pairs: dict[Hashable, list[float]] = defaultdict(list)
    for name, logit in zip(names, logits_N.tolist(), strict=True):
        if not np.isnan(logit):
            pairs[name].append(logit)
    if not pairs:
        way = "let the annotators compare at least one pair of held-out responses"
        raise DataError.of("logits", len(names), "no pair was judged, so nobody won", way)
    soft_P = np.array([expit(one).mean() for one in pairs.values()])
    hard_P = np.array([(0.5 + 0.5 * np.sign(one)).mean() for one in pairs.values()])
    drawn = paired_difference(
        [soft_P], [np.zeros_like(soft_P)], draws=draws, seed=seed, level=level
    )
    return {
        "soft": drawn.mean,
        "hard": float(hard_P.mean()),
        "low": drawn.low,
        "high": drawn.high,
        "prompts": len(pairs),
    }


def win_rate_of_scores(
    scores: Iterable[Any], others: Iterable[Any], *, draws: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """`win_rate` from scores of this policy's responses and of the other's, one array a prompt: all
    pairs of K with K' responses count, with the difference as logit. "soft" depends on the scale of
    the scores, "hard" does not.
    """
    pairs = zip(scores, others, strict=True)
    tables = [np.subtract.outer(np.ravel(mine), np.ravel(theirs)).ravel() for mine, theirs in pairs]
    prompts = [place for place, table in enumerate(tables) for _ in table]
    return win_rate(np.concatenate([*tables, []]), prompts, draws=draws, seed=seed)


def kl_on_samples(
    logps_N: Any, ref_logps_N: Any, lengths_N: Any, prompts_N: Any = None
) -> dict[str, Any]:
    """KL(policy || reference) on fresh samples of the policy, in nats: {"mean", "se"} a response
    (token SUMS) and "per_token" (all nats / all tokens).

    The plain estimator k1: the mean of log pi(y|x) - log ref(y|x) over responses y ~ pi; unbiased,
    and therefore now and then below 0. It is a KL only for samples of the policy as it is
    (temperature 1, no top-p, no top-k); for others it is their mean log-ratio and nothing more.
    `prompts_N` tells which responses share a prompt; the standard error takes these together and is
    None for a single prompt. Raises DataError for numbers that do not pair up or are not finite.
    """
    logps_N, ref_N = (np.asarray(one, dtype=np.float64) for one in (logps_N, ref_logps_N))
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    names = list(range(len(logps_N))) if prompts_N is None else list(prompts_N)
    shapes = [one.shape for one in (logps_N, ref_N, lengths_N)]
    if len(set(shapes)) != 1 or logps_N.ndim != 1 or len(names) != len(logps_N) or not names:
        problem = "every response needs both log-probabilities, a length and a prompt"
        raise DataError.of("log-probabilities", [*shapes, len(names)], problem)
    if not (np.isfinite(logps_N) & np.isfinite(ref_N)).all():
        first = int(np.flatnonzero(~(np.isfinite(logps_N) & np.isfinite(ref_N)))[0])
        found = (logps_N[first].item(), ref_N[first].item())
        raise DataError.of("log-probabilities", found, f"of response {first} are not finite")
    if (lengths_N < 0).any() or not lengths_N.sum():
        raise DataError.of("lengths", lengths_N[:4].tolist(), "no response holds a token")
    gaps_N = logps_N - ref_N
    mean = float(gaps_N.mean())
    return {
        "mean": mean,
        "se": _clustered_error(gaps_N, mean, names),
        "per_token": float(gaps_N.sum() / lengths_N.sum()),
    }


def _clustered_error(values_N: np.ndarray, mean: float, names: Sequence[Hashable]) -> float | None:
    """Standard error of the mean when only different `names` are independent."""
    moved: dict[Hashable, float] = defaultdict(float)
    for name, value in zip(names, values_N.tolist(), strict=True):
        moved[name] += value - mean
    if len(moved) < 2:
        return None
    squares = sum(one * one for one in moved.values()) * len(moved) / (len(moved) - 1)
    return float(np.sqrt(squares) / len(values_N))


def distinct(responses: Iterable[Sequence[Hashable]], n: int) -> float | None:
    """Different n-grams / all n-grams over the responses taken together, 0..1; None without any.

    `responses` are token ids or words. Longer and more responses repeat more: compare policies only
    on the same prompts with as many responses, and read it beside the lengths.
    """
    found = [gram for tokens in responses for gram in _grams(tokens, n)]
    return len(set(found)) / len(found) if found else None


def repetition(responses: Iterable[Sequence[Hashable]], n: int = 4) -> float | None:
    """Mean over responses of the share of n-grams that stood in the same response before, 0..1;
    responses shorter than n tokens do not count. None where all are.
    """
    shares = []
    for tokens in responses:
        if grams := _grams(tokens, n):
            shares.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else None


def _grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def share_identical(texts_by_prompt: Iterable[Sequence[str]]) -> float | None:
    """Share of responses that say the same, white space at the ends aside, as an earlier response
    to the same prompt, 0..1; None without responses.
    """
    groups = [[text.strip() for text in texts] for texts in texts_by_prompt]
    total = sum(map(len, groups))
    return sum(len(one) - len(set(one)) for one in groups) / total if total else None


def reward_mean(scores: Iterable[Any]) -> dict[str, Any]:
    """{"mean", "values"} of scores, one array a prompt; "mean" is over all responses that have a
    score, in the annotator's unit, and None where none has.
    """
    values = [value for one in scores for value in np.ravel(np.asarray(one, float)).tolist()]
    values = [value for value in values if np.isfinite(value)]
    return {"mean": float(np.mean(values)) if values else None, "values": values}


def describe_responses(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What `metrics.json` says of held-out response rows ({"ids", "responses", "finished"}) without
    another model: "responses", "lengths" (tokens), "distinct_1", "distinct_2", "repetition",
    "truncated" (share that met no END) and "identical" (share that repeats another one).
    """
    rows = list(rows)
    ids = [tuple(one) for row in rows for one in row["ids"]]
    finished = [bool(one) for row in rows for one in row["finished"]]
    return {
        "responses": len(ids),
        "lengths": [len(one) for one in ids],
        "distinct_1": distinct(ids, 1),
        "distinct_2": distinct(ids, 2),
        "repetition": repetition(ids),
        "truncated": 1 - sum(finished) / len(finished) if finished else None,
        "identical": share_identical(row["responses"] for row in rows),
    }


def interpolate_at_kl(kls: Sequence[float], wins: Sequence[float], at: float) -> float | None:
    """Win rate of a sweep (say, over beta) at the KL `at`, on straight lines between its points.

    The points are put in order of their KL, whatever order they were run in; points of the same KL
    count as their mean, points that are not finite do not count. None outside of the points: a
    sweep says nothing of a KL it never reached.
    """
    at_kl: dict[float, list[float]] = defaultdict(list)
    for kl, win in zip(kls, wins, strict=True):
        if np.isfinite(kl) and np.isfinite(win):
            at_kl[float(kl)].append(float(win))
    known = sorted(at_kl)
    if not known or not known[0] <= at <= known[-1]:
        return None
    return float(np.interp(at, known, [np.mean(at_kl[kl]) for kl in known]))
