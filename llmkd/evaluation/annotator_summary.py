"""What a run's own annotations say about those who made them: leanings and agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmkd.labels.pairs import from_json
from llmkd.labels.preference import Annotation, Scores

ALWAYS = 0.9  # share of questions won by the first shown, from which on a judge is flagged


def annotator_summary(said: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One mapping an annotator: "name", "questions" (pairs it compared), "agreement_with" (name to
    share of pairs that both gave a side, and the same one) and, where it was asked in both orders,
    "first_lean" (mean lean to the first shown, nats), "first_share" (share of questions the first
    shown won, ties half) and "orders_disagree" (share of pairs where the order decided).

    `said` holds, for each prompt, an annotation row's "by".
    """
    made = [dict(from_json(entry) for entry in by) for by in said]
    names = list(dict.fromkeys(name for one in made for name in one))
    sides = {name: _upper([one.get(name) for one in made]) for name in names}
    found = []
    for name in names:
        own = sides[name]
        others = {other: _agreement(own, sides[other]) for other in names if other != name}
        summary = {"name": name, "questions": int((~np.isnan(own)).sum()), "agreement_with": others}
        found.append(summary | _leanings([one[name] for one in made if name in one]))
    return found


def _upper(annotations: list[Annotation | None]) -> np.ndarray:
    """Signs of the logits above the diagonal, all prompts in a row; NaN for what was not asked."""
    parts = []
    for one in annotations:
        if one is not None:
            parts.append(np.sign(one.logits()[np.triu_indices(one.count, 1)]))
    return np.concatenate([*parts, np.zeros(0)])


def _agreement(one: np.ndarray, other: np.ndarray) -> float | None:
    if len(one) != len(other):
        return None
    both = (one * other != 0) & ~np.isnan(one * other)
    return float((one[both] == other[both]).mean()) if both.any() else None


def _leanings(annotations: list[Annotation]) -> dict[str, Any]:
    pairs = [
        (one.logits()[at], one.first_KK[at])
        for one in annotations
        if not isinstance(one, Scores) and one.first_KK is not None
        for at in [np.triu_indices(one.count, 1)]
    ]
    if not pairs:
        return {}
    logit_N, first_N = (np.concatenate(side) for side in zip(*pairs, strict=True))
    known = ~np.isnan(first_N) & ~np.isnan(logit_N)
    logit_N, first_N = logit_N[known], first_N[known]
    if not len(first_N):
        return {}
    won_N = 0.5 + 0.25 * (np.sign(first_N + logit_N) + np.sign(first_N - logit_N))
    return {
        "first_lean": float(first_N.mean()),
        "first_share": float(won_N.mean()),
        "orders_disagree": float((np.abs(first_N) > np.abs(logit_N)).mean()),
    }
