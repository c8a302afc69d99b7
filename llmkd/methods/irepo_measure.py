"""What an iterate is worth on held-out prompts: win rate, KL, lengths; and what it said."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llmkd.annotators.base import Annotator, Item
from llmkd.data.parts import read_parts
from llmkd.evaluation.annotator_summary import ALWAYS, annotator_summary
from llmkd.evaluation.policy import describe_responses, kl_on_samples, reward_mean, win_rate
from llmkd.files import read_json, write_json, write_text
from llmkd.labels.pairs import from_json
from llmkd.labels.preference import Scores
from llmkd.methods.irepo_plan import Plan
from llmkd.methods.irepo_policy import Policy
from llmkd.methods.irepo_sample import (
    Iteration,
    annotate_parts,
    clock,
    combined,
    sample_parts,
)
from llmkd.methods.irepo_scores import policy_log_probs

HELD_OUT_SEED = 7_000_003  # one for all iterates, so that they are compared on equal luck


def measure(it: Iteration, policy: Policy) -> dict[str, Any]:
    """`metrics.json` of the iteration: its counts, and `policy`, which came out of it, on the
    held-out prompts.
    """
    plan, path = it.plan, it.folder / "metrics.json"
    found: dict[str, Any] = {}
    if plan.prompts is not None and plan.prompts.held_out:
        with clock(it, "evaluate"):
            found = _held_out(it, policy, held_out_rows(it, policy))
    metrics = {
        "iteration": it.number,
        **{k: v for k, v in it.facts.items() if k != "annotators"},
        "held_out": found,
        "annotators": _summary(it),
        "seconds": read_json(it.folder / "seconds.json") or {},
    }
    metrics["warnings"] = _warnings(metrics)
    if plan.main:
        write_json(path, metrics)
    for text in metrics["warnings"]:
        plan.say(f"{it.label}: warning: {text}")
    return metrics


def held_out_rows(it: Iteration, policy: Policy) -> list[dict[str, Any]]:
    """Responses of an iterate to the held-out prompts."""
    plan = it.plan
    assert plan.prompts is not None
    count, folder = plan.loop.held_out_responses, it.folder / "held_out"
    seed = plan.training.seed + HELD_OUT_SEED
    return list(sample_parts(plan, folder, plan.prompts.held_out, policy, count, seed).rows())


def _held_out(it: Iteration, policy: Policy, rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {"prompts": len(rows), **describe_responses(rows)}
    return found | _divergence(it, policy, rows) | _verdicts(it, rows)


def _divergence(it: Iteration, policy: Policy, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """KL of the iterate to the start and to the iterate before, on its own fresh samples."""
    plan, start = it.plan, it.plan.start
    assert start is not None
    asked = [(row["prompt_ids"], ids) for row in rows for ids in row["ids"]]
    sums: dict[Policy, np.ndarray] = {}
    for name, one in (("own", policy), ("initial", start), ("previous", it.policy)):
        if one not in sums:
            folder = it.folder / f"held_out_log_probs_{name}"
            label = f"{it.label}: log-probabilities of held-out responses, {name}"
            sums[one] = policy_log_probs(plan, folder, asked, one, label)
    lengths = np.array([len(ids) for _, ids in asked])
    numbers = [row["row"] for row in rows for _ in row["ids"]]
    return {
        f"kl_{name}": kl_on_samples(sums[policy], sums[one], lengths, numbers)
        for name, one in (("initial", start), ("previous", it.policy))
    }


def _verdicts(it: Iteration, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Win rates against the start and the iterate before, and rewards where annotators score."""
    plan = it.plan
    annotators = plan.annotators(held_out=True)
    if not annotators:
        return {}
    others = {"start": _rows_of(plan, 0, rows), "previous": _rows_of(plan, it.number - 1, rows)}
    slots = [(row["row"], k) for row in rows for k in range(len(row["responses"]))]
    items, places = _items(rows, others, slots)
    said = _said(it, items, annotators)
    tables = {item.row: combined(plan, answer) for item, answer in zip(items, said, strict=True)}
    scores = {item.row: _scores(answer) for item, answer in zip(items, said, strict=True)}
    named = {one["annotator"] for answer in said for one in answer["by"] if "scores" in one}
    if scorers := [one for one in annotators if one.name in named]:
        scores |= _scores_of_the_same(it, rows, places, slots, scorers)
    found, lines = {}, []
    for name in others:
        logits = []
        for slot, place in enumerate(places):
            mine, other = place["new"], place[name]
            logit = 0.0 if mine[1] == other[1] else float(tables[slot][mine[0], other[0]])
            known = scores.get(slot)
            own, theirs = (None, None) if known is None else known[[mine[0], other[0]]].tolist()
            logits.append(logit)
            asked = not np.isnan(logit)
            lines.append(
                {
                    "row": slots[slot][0],
                    "against": name,
                    "response": mine[1],
                    "other": other[1],
                    "logit": logit if asked else None,
                    "score": own,
                    "other_score": theirs,
                }
            )
        if it.number and not np.isnan(logits).all():
            groups = np.array([row for row, _ in slots])
            found[f"win_rate_{name}"] = win_rate(np.array(logits), groups)
    if plan.main:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(it.folder / "held_out_verdicts.jsonl", text)
    rewards = [line["score"] for line in lines if line["against"] == "start"]
    scored = [value for value in rewards if value is not None]
    return found | ({"reward": reward_mean(scored)} if scored else {})


def _said(it: Iteration, items: list[Item], annotators: list[Annotator]) -> list[dict[str, Any]]:
    """What the annotators say of the items; of none nobody is asked."""
    if not items:
        return []
    folder, label = it.folder / "held_out_annotations", f"{it.label}: judging held-out responses"
    return list(annotate_parts(it.plan, folder, items, annotators, label).rows())


def _scores_of_the_same(
    it: Iteration,
    rows: list[dict[str, Any]],
    places: list[dict[str, tuple[int, str]]],
    slots: list[tuple[int, int]],
    annotators: list[Annotator],
) -> dict[int, np.ndarray | None]:
    """Scores where the iterate, the start and the one before say the same: asked beside another
    prompt's response, since a question has two.
    """
    texts = {slot: place["new"][1] for slot, place in enumerate(places)}
    alike = [s for s, place in enumerate(places) if all(at == 0 for at, _ in place.values())]
    prompts, items = {row["row"]: row["prompt"] for row in rows}, []
    for slot in alike:
        other = next((t for t in texts.values() if t.strip() and t != texts[slot]), None)
        if other is not None:
            items.append(Item(slot, prompts[slots[slot][0]], (texts[slot], other)))
    if not items:
        return {}
    folder, label = it.folder / "held_out_scores", f"{it.label}: scoring unchanged responses"
    said = annotate_parts(it.plan, folder, items, annotators, label).rows()
    return {item.row: _scores(answer) for item, answer in zip(items, said, strict=True)}


def _rows_of(plan: Plan, number: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The held-out responses of another iterate; the start is its own."""
    if number < 0 or not (plan.folder / f"iteration-{number}" / "held_out").is_dir():
        return rows
    return list(read_parts(plan.folder / f"iteration-{number}" / "held_out"))


def _items(
    rows: list[dict[str, Any]],
    others: dict[str, list[dict[str, Any]]],
    slots: list[tuple[int, int]],
) -> tuple[list[Item], list[dict[str, tuple[int, str]]]]:
    """One question a held-out response: it, the start's and the one before, each text once.

    `places` says where in the question each of the three stands, and its text.
    """
    mine = {row["row"]: row for row in rows}
    theirs = {name: {row["row"]: row for row in found} for name, found in others.items()}
    items, places = [], []
    for number, (row, k) in enumerate(slots):
        texts = {"new": mine[row]["responses"][k]}
        texts |= {name: found[row]["responses"][k] for name, found in theirs.items()}
        unique = list(dict.fromkeys(texts.values()))
        places.append({name: (unique.index(text), text) for name, text in texts.items()})
        if len(unique) > 1:
            items.append(Item(number, mine[row]["prompt"], tuple(unique)))
    return items, places


def _scores(answer: dict[str, Any]) -> np.ndarray | None:
    """Mean score of the annotators that score; None where none does."""
    made = [from_json(one)[1] for one in answer["by"]]
    scores = [one.scores_K for one in made if isinstance(one, Scores)]
    return np.mean(scores, axis=0) if scores else None


def _summary(it: Iteration) -> list[dict[str, Any]]:
    """Each annotator's leanings and its agreement with the others, from the training responses."""
    said = it.facts.get("annotators")
    return annotator_summary([row["by"] for row in said]) if said else []


def _warnings(metrics: dict[str, Any]) -> list[str]:
    found = []
    for one in metrics["annotators"]:
        share = one.get("first_share")
        if share is not None and max(share, 1 - share) > ALWAYS:
            which, often = ("first", share) if share > 0.5 else ("second", 1 - share)
            found.append(
                f"{one['name']} prefers whichever response it is shown {which} in {often:.0%} of "
                "its questions; both orders cancel out, little is left"
            )
    dropped = metrics.get("dropped") or {}
    total = metrics.get("responses") or 0
    for name, count in dropped.items():
        if total and count / total > 0.5:
            found.append(f"{count} of {total} responses were dropped as {name}")
    return found
