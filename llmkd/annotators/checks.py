"""What an annotator gave, checked before anybody learns from it."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkd.annotators.base import Annotator, Item
from llmkd.errors import AnnotatorError, LlmkdError
from llmkd.labels.preference import Annotation, Logits, Scores, Votes

KEY = "annotators"
FORMS = (
    "a list of K numbers: scores, of which only differences count",
    "a [K, K] table: entry i, j is the logit that i is better than j; None where not asked",
    "a tuple (wins, votes) of [K, K] tables: wins[i][j] of votes[i][j] preferred i to j",
    "of two responses also (wins of the first, votes), or the logit that the first is better",
)
AGAIN = "mend it and run the same command again: the responses are kept"
ROUNDING = 1e-5  # of float32 tables; relative to the largest entry


class _Wrong(Exception):
    """What is wrong with an answer, in words that follow "row 3: "."""


def checked(annotator: Annotator, items: Sequence[Item]) -> list[Annotation]:
    """What `annotator` says of `items`, in float64, one an item.

    AnnotatorError that names annotator, row and way out for an exception of its own, another number
    of answers, other shapes, NaN or infinity (NaN logits mean a pair that was not asked, and some
    pair must be), logits that are not antisymmetric, and votes that do not add up.
    """
    try:
        found = annotator.annotate(items)
    except LlmkdError:
        raise
    except Exception as error:
        raise _refuse(annotator.name, f"{_rows(items)}: {raised(error)}") from error
    if not isinstance(found, list | tuple) or len(found) != len(items):
        has = f"{len(found)} answers" if isinstance(found, list | tuple) else type(found).__name__
        raise _refuse(annotator.name, f"{_rows(items)}: gave {has} for {len(items)} prompts")
    answers = []
    for item, annotation in zip(items, found, strict=True):
        try:
            answers.append(_clean(annotation, len(item.responses)))
        except _Wrong as wrong:
            raise _refuse(annotator.name, f"row {item.row}: {wrong}") from None
    return answers


def as_annotation(value: Any, count: int, *, name: str = "function", row: int = 0) -> Annotation:
    """What a function of the user's own returned for `count` responses, as an annotation; `FORMS`
    says what it may be. AnnotatorError that names `name`, `row` and the forms.
    """
    try:
        return _clean(_typed(value, count), count)
    except _Wrong as wrong:
        raise _refuse(name, f"row {row}: {wrong}", *FORMS) from None


def raised(error: BaseException) -> str:
    """An exception of code that is not ours, in one line with the place it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    lines = str(error).splitlines() or [""]
    return f"raised {type(error).__name__}: {lines[0][:240]}{where}"


def _refuse(name: str, problem: str, *ways: str) -> LlmkdError:
    return AnnotatorError.of(KEY, name, problem, *ways, AGAIN)


def _rows(items: Sequence[Item]) -> str:
    numbers = [item.row for item in items]
    if len(numbers) < 2:
        return f"row {numbers[0]}" if numbers else "no rows"
    return f"rows {numbers[0]} to {numbers[-1]}"


def _typed(value: Any, count: int) -> Annotation:
    """The form of what a user's function returned; values are not looked at."""
    if isinstance(value, Scores | Votes | Logits):
        return value
    if isinstance(value, tuple) and len(value) == 2:
        wins, votes = (_numbers(part) for part in value)
        if wins.ndim == votes.ndim == 0:
            return _votes_of_two(float(wins), float(votes), count)
        return Votes(wins, votes)
    if isinstance(value, bool | np.bool_):
        raise _Wrong(f"returned {value}; a vote for the first of two is (1, 1), against it (0, 1)")
    table = _numbers(value)
    if table.ndim == 0:
        if count != 2:
            raise _Wrong(f"returned one number for {count} responses")
        return Logits(np.array([[0.0, table], [-table, 0.0]]))
    if table.ndim == 1:
        return Scores(table)
    if table.ndim == 2:
        asked = np.array([[entry is not None for entry in line] for line in value])
        if np.isnan(table[asked & ~np.eye(*table.shape, dtype=bool)]).any():
            raise _Wrong("returned NaN among its logits; a pair that was not asked is None")
    return Logits(table)


def _votes_of_two(wins: float, votes: float, count: int) -> Votes:
    if count != 2:
        raise _Wrong(f"returned a tuple of two numbers for {count} responses")
    if votes != round(votes):
        raise _Wrong(
            f"returned the tuple ({wins:g}, {votes:g}), which means wins and votes, and "
            f"{votes:g} is no number of votes; two scores are a list"
        )
    return Votes(
        np.array([[0.0, wins], [votes - wins, 0.0]]), np.array([[0.0, votes], [votes, 0.0]])
    )


def _numbers(value: Any) -> np.ndarray:
    """float64 of any shape; None becomes NaN in tables of two dimensions."""
    if hasattr(value, "detach"):  # a tensor, maybe with gradients or on another device
        value = value.detach().cpu().double().numpy()
    try:
        found = np.asarray(value)
        if found.dtype == object and found.ndim > 1:
            found = np.array([[np.nan if e is None else e for e in line] for line in value])
    except (ValueError, TypeError) as error:
        raise _Wrong(f"returned {_short(value)}: {error}") from None
    if found.dtype.kind not in "biuf":
        raise _Wrong(f"returned {_short(value)}, which is no number, list or table of numbers")
    return found.astype(np.float64)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _clean(annotation: Any, count: int) -> Annotation:
    if isinstance(annotation, Scores):
        return _clean_scores(annotation, count)
    if isinstance(annotation, Votes):
        return _clean_votes(annotation, count)
    if isinstance(annotation, Logits):
        return _clean_logits(annotation, count)
    raise _Wrong(f"gave {_short(annotation)}, which is no Scores, Votes or Logits")


def _shaped(values: Any, what: str, *shape: int) -> np.ndarray:
    """A float64 copy; refused where its shape is another."""
    found = np.array(values, dtype=np.float64)
    if found.shape != shape:
        raise _Wrong(
            f"gave {what} of shape {list(found.shape)} for {shape[0]} responses, not {list(shape)}"
        )
    return found


def _clean_scores(given: Scores, count: int) -> Scores:
    scores_K = _shaped(given.scores_K, "scores", count)
    if not np.isfinite(scores_K).all():
        raise _Wrong(f"gave the scores {_short(scores_K.tolist())}, not all of them finite")
    if given.variance_K is None:
        return Scores(scores_K)
    variance_K = _shaped(given.variance_K, "variances", count)
    if not (np.isfinite(variance_K).all() and (variance_K >= 0).all()):
        raise _Wrong(f"gave the variances {_short(variance_K.tolist())}, not all finite and >= 0")
    if (variance_K == 0).sum() > 1:
        raise _Wrong("gave several variances of 0: scores without variance are Scores(scores)")
    return Scores(scores_K, variance_K)


def _clean_votes(given: Votes, count: int) -> Votes:
    wins_KK = _shaped(given.wins_KK, "wins", count, count)
    votes_KK = _shaped(given.votes_KK, "votes", count, count)
    np.fill_diagonal(wins_KK, 0.0)
    np.fill_diagonal(votes_KK, 0.0)
    wrong = {
        "not finite": ~(np.isfinite(wins_KK) & np.isfinite(votes_KK)),
        "wins beyond 0 and the votes": (wins_KK < 0) | (wins_KK > votes_KK),
        "other votes the other way round": votes_KK != votes_KK.T,
        "wins of both that are not the votes (a tie is half a win each)": ~np.isclose(
            wins_KK + wins_KK.T, votes_KK
        ),
    }
    for problem, bad_KK in wrong.items():
        if bad_KK.any():
            i, j = np.argwhere(bad_KK)[0]
            raise _Wrong(
                f"has {problem}: of responses {i} and {j}, wins {wins_KK[i, j]:g} and "
                f"{wins_KK[j, i]:g}, votes {votes_KK[i, j]:g} and {votes_KK[j, i]:g}"
            )
    if given.first_KK is None:
        return Votes(wins_KK, votes_KK)
    return Votes(wins_KK, votes_KK, _shaped(given.first_KK, "leans to the first", count, count))


def _clean_logits(given: Logits, count: int) -> Logits:
    logits_KK = _shaped(given.logits_KK, "logits", count, count)
    off_KK = ~np.eye(count, dtype=bool)
    if np.isinf(logits_KK).any():
        raise _Wrong("gave an infinite logit: nobody is that sure")
    if np.isnan(logits_KK[off_KK]).all():
        raise _Wrong("gave no logit of any pair, only NaN")
    sums_KK = np.where(off_KK, logits_KK + logits_KK.T, 2 * np.nan_to_num(logits_KK))
    one_sided = np.isnan(logits_KK) != np.isnan(logits_KK.T)
    bad_KK = one_sided | (np.abs(sums_KK) > ROUNDING * (1 + np.nanmax(np.abs(logits_KK))))
    if bad_KK.any():
        i, j = np.argwhere(bad_KK)[0]
        chances = bool(np.allclose(sums_KK, 1)) and bool((logits_KK >= 0).all())
        hint = "; probabilities become logits by log(p / (1 - p))" if chances else ""
        raise _Wrong(
            f"gave logits that are not antisymmetric: entry {i}, {j} is {logits_KK[i, j]:g}, "
            f"entry {j}, {i} is {logits_KK[j, i]:g}{hint}"
        )
    logits_KK = (logits_KK - logits_KK.T) / 2
    np.fill_diagonal(logits_KK, 0.0)
    if given.first_KK is None:
        return Logits(logits_KK)
    first_KK = _shaped(given.first_KK, "leans", count, count)
    if np.isinf(first_KK).any():
        raise _Wrong("gave an infinite lean towards the first")
    return Logits(logits_KK, first_KK)
