"""Scores of a classifier or regressor on a labelled set, and what a constant answer would score.

Every score that can be the main one is better when HIGHER; `loss` and `mse` are reported beside
them and can never be the main one. All maths in float64, whatever the model computed in.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkd.errors import DataError, NonFiniteError, RecipeError

# kind of task -> scores that may decide, the usual one first
SCORES: dict[str, tuple[str, ...]] = {
    "single_label": ("accuracy", "macro_f1", "matthews", "f1"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match"),
    "regression": ("pearson", "spearman"),
    "token": ("token_accuracy", "macro_f1"),
}
LOSSES = ("loss", "mse")
NO_CASE: dict[str, Any] = {"zero_division": 0}  # an F1 nobody asked for and nobody gave is 0


def main_metric(
    kind: str, metric: str | None = None, *, classes: int | None = None, key: str = "metric"
) -> str:
    """The score that decides for tasks of this `kind` (higher is better): `metric`, or the usual.

    Raises RecipeError that names `key` for a score the kind does not have, and for `f1` (of
    class 1) where `classes` is known and not two; also for an unknown kind.
    """
    if kind not in SCORES:
        raise RecipeError.of("kind", kind, f"use one of {', '.join(SCORES)}")
    if metric is None:
        return SCORES[kind][0]
    if metric not in SCORES[kind]:
        problem = "lower is better, so it cannot be the main score" if metric in LOSSES else None
        problem = problem or f"a task of kind {kind} has no such score"
        raise RecipeError.of(key, metric, problem, f"use one of {', '.join(SCORES[kind])}")
    if metric == "f1" and classes is not None and classes != 2:
        problem = f"is the F1 of class 1 of two; this task has {classes} classes"
        raise RecipeError.of(key, metric, problem, f"{key}: macro_f1")
    return metric


def task_scores(
    kind: str, outputs: np.ndarray, labels: np.ndarray, *, metric: str | None = None
) -> dict[str, float]:
    """Scores by name: the main one first, then the kind's others, `loss` and `examples`.

    kind          outputs             labels       loss (mean over the N examples)
    single_label  [N, C] logits       [N] classes  cross-entropy, nats
    multi_label   [N, C] logits       [N, C] 0/1   binary cross-entropy, nats, mean over classes
    regression    [N] or [N, 1]       [N] numbers  squared error
    token         [M, C] logits       [M] classes  cross-entropy, nats; M counted tokens, flattened

    A multi-label class is answered where its logit is above 0. `macro_f1` averages over the classes
    that occur in labels or answers (multi_label: over all); an F1 without any case is 0. `f1` is
    that of class 1, only with two classes. A correlation with something constant is undefined and
    given as 0, which is what a constant answer deserves.

    Raises RecipeError for a wrong kind or metric, DataError for shapes or labels that do not fit
    the kind (an unlabelled test set has -1), NonFiniteError for NaN or infinite outputs.
    """
    outputs, labels = _checked(kind, outputs, labels)
    if kind == "regression":
        scores = _regression(outputs, labels)
    elif kind == "multi_label":
        scores = _multi_label(outputs, labels)
    else:
        scores = _classes(kind, outputs, labels)
    main = main_metric(kind, metric, classes=None if outputs.ndim == 1 else outputs.shape[1])
    return {main: scores[main], **scores, "examples": len(labels)}


def chance(kind: str, labels: Sequence[float] | np.ndarray, metric: str | None = None) -> float:
    """The main score of the best answer that ignores the input: what a trained model must beat.

    The best class (or set of classes, or label row) is chosen by the labels themselves and for the
    score asked; correlations and `matthews` give 0. `labels` are shaped as in `task_scores`.
    """
    main, labels = main_metric(kind, metric), np.asarray(labels)
    if not len(labels):
        raise DataError.of("labels", 0, "no example to score")
    if main in ("matthews", "pearson", "spearman"):
        return 0.0
    if kind == "multi_label":
        return _chance_multi(main, labels)
    _, counts = np.unique(labels, return_counts=True)
    share = counts.max() / len(labels)
    if main == "f1":
        share = float(np.mean(labels == 1))  # always answering class 1
    f1 = 2 * share / (1 + share)  # precision is the share, recall is 1
    return float({"f1": f1, "macro_f1": f1 / len(counts)}.get(main, share))


def _checked(kind: str, outputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs in float64 and labels, shaped as the kind wants them; raises for all that is not."""
    main_metric(kind)
    outputs, labels = np.asarray(outputs, dtype=np.float64), np.asarray(labels)
    if kind == "regression":
        outputs = outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        fits = outputs.ndim == 1 and labels.shape == outputs.shape
    elif kind == "multi_label":
        fits = outputs.ndim == 2 and labels.shape == outputs.shape
    else:
        fits = outputs.ndim == 2 and labels.shape == outputs.shape[:1]
    if not fits:
        problem = f"do not fit labels {labels.shape} in a task of kind {kind}"
        raise DataError.of("outputs", outputs.shape, problem)
    if not len(labels):
        raise DataError.of("labels", 0, "no example to score")
    _check_values(kind, outputs, labels)
    return outputs, labels.astype(np.float64 if kind == "regression" else np.int64)


def _check_values(kind: str, outputs: np.ndarray, labels: np.ndarray) -> None:
    bad = int((~np.isfinite(outputs)).sum())
    if bad:
        raise NonFiniteError.of("outputs", bad, f"of {outputs.size:,} numbers are NaN or infinite")
    if kind == "regression":
        wrong = ~np.isfinite(labels.astype(np.float64))
        wanted = "a number"
    else:
        top = 1 if kind == "multi_label" else outputs.shape[1] - 1
        wrong = (labels < 0) | (labels > top) | (labels != np.floor(labels))
        wanted = f"a whole number from 0 to {top}"
    if wrong.any():
        first = labels[wrong].flat[0].item()
        raise DataError.of("labels", first, f"is not {wanted}", "score a set that has labels")


def _classes(kind: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.special import log_softmax
    from sklearn.metrics import f1_score, matthews_corrcoef

    chosen = logits.argmax(-1)
    accuracy = float(np.mean(chosen == labels))
    macro = float(f1_score(labels, chosen, average="macro", **NO_CASE))
    if kind == "token":
        scores = {"token_accuracy": accuracy, "macro_f1": macro}
    else:
        scores = {"accuracy": accuracy, "macro_f1": macro}
        scores["matthews"] = float(matthews_corrcoef(labels, chosen))
        if logits.shape[1] == 2:
            scores["f1"] = float(f1_score(labels, chosen, pos_label=1, **NO_CASE))
    right = np.take_along_axis(log_softmax(logits, axis=-1), labels[:, None], axis=-1)
    return {**scores, "loss": -float(right.mean())}


def _multi_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score

    chosen = (logits > 0).astype(np.int64)
    # By column, since scikit-learn takes a single column for a task of two classes.
    hits, asked = (chosen & labels).sum(0), chosen.sum(0) + labels.sum(0)
    by_class = np.where(asked > 0, 2 * hits / np.maximum(asked, 1), 0.0)
    return {
        "micro_f1": float(f1_score(labels.ravel(), chosen.ravel(), **NO_CASE)),
        "macro_f1": float(by_class.mean()),
        "exact_match": float(np.mean((chosen == labels).all(-1))),
        "loss": float(np.mean(np.logaddexp(0, logits) - logits * labels)),
    }


def _regression(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    mse = float(np.mean((outputs - labels) ** 2))
    scores = {"pearson": 0.0, "spearman": 0.0, "mse": mse, "loss": mse}
    if np.ptp(outputs) == 0 or np.ptp(labels) == 0:
        return scores
    with warnings.catch_warnings():  # nearly constant: scipy warns and may give NaN
        warnings.simplefilter("ignore")
        found = pearsonr(outputs, labels)[0], spearmanr(outputs, labels)[0]
    pearson, spearman = (
        np.nan_to_num(np.asarray(value, dtype=np.float64)).item() for value in found
    )
    return {**scores, "pearson": pearson, "spearman": spearman}


def _chance_multi(main: str, labels: np.ndarray) -> float:
    if main == "exact_match":
        return float(np.unique(labels, axis=0, return_counts=True)[1].max() / len(labels))
    ones = labels.sum(0)
    if main == "macro_f1":  # answering every class always: recall 1, precision its share
        return float(np.mean(2 * ones / (len(labels) + ones)))
    # Micro: the best set of k classes holds the k most frequent ones; every k is tried.
    most = np.sort(ones)[::-1]
    sizes = np.arange(1, len(most) + 1)
    return float(np.max(2 * np.cumsum(most) / (ones.sum() + sizes * len(labels))))
