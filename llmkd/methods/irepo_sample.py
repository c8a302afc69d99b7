"""The first half of an iteration: responses, what is said of them, and the pairs made of both."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, Value
from trl import get_quantization_config

from llmkd.annotators.base import Annotator, Item
from llmkd.annotators.checks import checked
from llmkd.data.parts import Parts
from llmkd.data.screen import screen
from llmkd.errors import DataError, LlmkdError, RunFolderError
from llmkd.files import digest, read_json, whole_folder, write_json
from llmkd.labels.pairs import choose_pairs, combine, from_json, to_json
from llmkd.methods.irepo_plan import Plan
from llmkd.methods.irepo_policy import Policy
from llmkd.methods.irepo_scores import policy_log_probs, run_all

ANNOTATED_AT_ONCE = 16  # prompts in one part of an annotation


@dataclass
class Iteration:
    """One turn of the loop, in a folder of its own; number 0 is the start."""

    plan: Plan
    number: int
    policy: Policy  # what samples: the iterate before
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where all of it lies."""
        return self.plan.folder / f"iteration-{self.number}"

    @property
    def label(self) -> str:
        """What lines on the terminal call it."""
        return f"iteration {self.number}"


def sample_parts(
    plan: Plan, folder: Path, rows: list[dict[str, Any]], policy: Policy, count: int, seed: int
) -> Parts:
    """Responses to `rows`, `count` a prompt, in parts of sampling_batch_size prompts; what is there
    already is not sampled again.
    """
    size = plan.sampling.sampling_batch_size
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    sampler = plan.sampler()
    key = plan.part_key("sample", rows_key(rows), sampler.settings(), count, seed, policy)
    parts = Parts(folder, len(batches), key)
    parts.claim()
    if parts.missing():
        sampler.load(
            policy.source,
            adapter=policy.adapter,
            revision=policy.revision,
            device=plan.device,
            attn=plan.policy.attn_implementation,
            quantization=get_quantization_config(plan.policy),
        )

    def make(part: int) -> list[dict[str, Any]]:
        batch = batches[part]
        ids = [row["prompt_ids"] for row in batch]
        found = sampler.sample(ids, seed=seed + part, count=count)
        return [
            {
                **row,
                "responses": [one.text for one in samples],
                "ids": [one.ids for one in samples],
                "finished": [one.finished for one in samples],
            }
            for row, samples in zip(batch, found, strict=True)
        ]

    run_all(plan, parts, make, f"{folder.parent.name}: sampling")
    sampler.release()
    return parts


def rows_key(rows: list[dict[str, Any]]) -> str:
    """Hash of prompts."""
    return digest([row["prompt_ids"] for row in rows])


def annotate_parts(
    plan: Plan, folder: Path, items: list[Item], annotators: list[Annotator], label: str
) -> Parts:
    """What each annotator says of each item, in parts."""
    size = ANNOTATED_AT_ONCE
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    texts = digest([[item.prompt, item.responses] for item in items])
    names = [[one.name, one.fingerprint] for one in annotators]
    parts = Parts(folder, len(batches), plan.part_key("annotate", texts, names))
    try:
        parts.claim()
    except RunFolderError as error:
        way = f"rm -r {folder}: the responses are kept, only the annotators are asked again"
        raise RunFolderError(f"{error}\n  - {way}") from error
    if parts.missing():
        for annotator in annotators:
            annotator.load(plan.device)
        _prepare(plan, annotators, items)

    def make(part: int) -> list[dict[str, Any]]:
        said = [checked(one, batches[part]) for one in annotators]
        return [
            {
                "row": item.row,
                "by": [
                    to_json(one.name, answers[place])
                    for one, answers in zip(annotators, said, strict=True)
                ],
            }
            for place, item in enumerate(batches[part])
        ]

    run_all(plan, parts, make, label)
    for annotator in annotators:
        annotator.release()
    return parts


def _prepare(plan: Plan, annotators: list[Annotator], items: list[Item]) -> None:
    """Let those who answer slowly see all questions at once: a person fills in one file."""
    for annotator in annotators:
        if plan.main and hasattr(annotator, "prepare"):
            cast(Any, annotator).prepare(items)


def combined(plan: Plan, row: dict[str, Any]) -> np.ndarray:
    """Logits [K, K] of what all annotators said of one item."""
    config = plan.annotation
    return combine(
        [from_json(one)[1] for one in row["by"]],
        config.combine,
        flip_rate=config.flip_rate,
        temperature=config.logit_temperature,
        max_logit=config.max_logit,
    )


def collect_pairs(it: Iteration) -> None:
    """Sample, annotate and choose: fills `pairs/` of the iteration's folder and its facts."""
    plan = it.plan
    share = plan.shares[it.number - 1]
    seed = plan.training.seed + 100_003 * it.number
    count = plan.sampling.num_responses
    with clock(it, "sample"):
        parts = sample_parts(plan, it.folder / "responses", share, it.policy, count, seed)
    rows = list(parts.rows())
    items, dropped = screened(plan, rows)
    it.facts |= {
        "prompts": len(rows),
        "responses": sum(len(row["responses"]) for row in rows),
        "dropped": dropped,
    }
    if not items:
        raise empty(it, dropped, "left a prompt with two different responses")
    with clock(it, "annotate"):
        annotators = plan.annotators()
        said = annotate_parts(
            plan, it.folder / "annotations", items, annotators, f"{it.label}: annotating"
        )
    it.facts["annotators"] = list(said.rows())
    chosen = _pairs(plan, rows, items, it.facts["annotators"])
    it.facts["prompts_without_pair"] = len(rows) - len({pair["row"] for pair in chosen})
    if not chosen:
        raise empty(it, dropped, "gave a pair: the annotators answered no question")
    lost = ", ".join(f"{number} {name}" for name, number in dropped.items())
    plan.say(
        f"{it.label}: {len(rows)} prompts, {it.facts['responses']} responses (dropped: {lost}), "
        f"{len(chosen)} pairs"
    )
    check_not_all_ties(chosen)
    with clock(it, "reference"):
        write_pairs(it, chosen)


def screened(plan: Plan, rows: list[dict[str, Any]]) -> tuple[list[Item], dict[str, int]]:
    """Prompts that have two different responses left, and what was dropped."""
    items, dropped = [], Counter(duplicate=0, truncated=0, empty=0)
    for row in rows:
        kept, lost = screen(
            row["responses"], row["finished"], drop_truncated=plan.loop.drop_truncated
        )
        dropped.update(lost)
        row["kept"] = kept
        if len(kept) >= 2:
            texts = tuple(row["responses"][place] for place in kept)
            items.append(Item(row["row"], row["prompt"], texts))
    return items, dict(dropped)


def check_not_all_ties(pairs: list[dict[str, Any]]) -> None:
    """DataError where every pair is a tie: regressing on that keeps the policy where it is."""
    if all(abs(pair["pref_logit"]) < 1e-9 for pair in pairs):
        raise DataError.of(
            "pref_logit",
            0.0,
            f"all {len(pairs)} pairs are ties: nothing can be learnt from them",
            "does the annotator tell responses apart? `llmkd judge` asks it about rated pairs",
        )


def empty(it: Iteration, dropped: dict[str, int], what: str) -> LlmkdError:
    """The error of an iteration that has nothing to regress on."""
    lost = ", ".join(f"{count} {name}" for name, count in dropped.items())
    return DataError.of(
        "iterations",
        it.number,
        f"no prompt of this iteration {what} ({it.facts['responses']} responses, dropped: {lost})",
        "truncated: raise max_new_tokens, or --drop_truncated false",
        "duplicate: raise temperature or num_responses",
        "empty: the policy ends at once; look at the chat template, or at its training",
        "such keys change the whole run: --overwrite_run true with them, or another --output_dir",
    )


def _pairs(
    plan: Plan, rows: list[dict[str, Any]], items: list[Item], said: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    by_row = {row["row"]: row for row in rows}
    pairs = []
    for item, answer in zip(items, said, strict=True):
        row = by_row[item.row]
        votes = _votes(answer)
        for i, j, logit in choose_pairs(combined(plan, answer), plan.loop.pairs):
            first, second = row["kept"][i], row["kept"][j]
            pairs.append(
                {
                    "row": item.row,
                    "prompt": row["prompt"],
                    "response_1": row["responses"][first],
                    "response_2": row["responses"][second],
                    "prompt_ids": row["prompt_ids"],
                    "ids_1": row["ids"][first],
                    "ids_2": row["ids"][second],
                    "pref_logit": float(logit),
                    "wins": None if votes is None else float(votes[0][i, j]),
                    "votes": None if votes is None else float(votes[1][i, j]),
                }
            )
    return pairs


def _votes(answer: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Votes of the annotators that vote, added; None where none does."""
    voted = [one for one in answer["by"] if "wins" in one]
    if not voted:
        return None
    return (
        np.sum([np.asarray(one["wins"], dtype=np.float64) for one in voted], axis=0),
        np.sum([np.asarray(one["votes"], dtype=np.float64) for one in voted], axis=0),
    )


def write_pairs(it: Iteration, pairs: list[dict[str, Any]]) -> None:
    """`pairs/`: an Arrow dataset with log-probabilities of both references as columns."""
    plan, target = it.plan, it.folder / "pairs"
    start = plan.start
    assert start is not None
    rows = [(pair["prompt_ids"], pair[name]) for pair in pairs for name in ("ids_1", "ids_2")]

    def under(policy: Policy, name: str) -> list[list[float]]:
        folder, label = it.folder / f"log_probs_{name}", f"{it.label}: log-probabilities, {name}"
        found = policy_log_probs(plan, folder, rows, policy, label, as_trained=True)
        return found.reshape(-1, 2).tolist()

    previous = under(it.policy, "previous")
    initial = previous if it.policy == start else under(start, "initial")
    reference = previous if plan.training.reference == "previous" else initial
    for place, pair in enumerate(pairs):
        for name, values in (("ref", reference), ("initial", initial)):
            pair[f"{name}_logps_1"], pair[f"{name}_logps_2"] = values[place]
    if plan.main:
        with whole_folder(target) as aside:
            # of scores alone, the votes would be of no type
            typed = dict.fromkeys(("wins", "votes"), Value("float64"))
            features = Features({**Dataset.from_list(pairs).features, **typed})
            Dataset.from_list(pairs, features=features).save_to_disk(str(aside))
    PartialState().wait_for_everyone()


@contextmanager
def clock(it: Iteration, phase: str) -> Iterator[None]:
    """Adds the wall time of a block to the iteration's seconds, whether it ends or fails."""
    began = time.monotonic()
    try:
        yield
    finally:
        if it.plan.main:
            path = it.folder / "seconds.json"
            known = read_json(path) or {}
            known[phase] = round(known.get(phase, 0.0) + time.monotonic() - began, 2)
            write_json(path, known)
