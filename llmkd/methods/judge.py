"""`llmkd judge`: ask the annotators of an iREPO recipe about pairs that people rated.

A judge that people do not agree with teaches a policy something else than what people like; and
one that is too sure makes every step too large. Both are measured here, before anything is trained.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from llmkd.annotators.base import Annotator, Item
from llmkd.annotators.checks import checked
from llmkd.annotators.config import AnnotatorConfig, make_annotators
from llmkd.data.config import from_json
from llmkd.data.parts import Parts, run_parts
from llmkd.data.rated import COLUMNS, RatedPairs, load_rated
from llmkd.errors import AnnotatorError, RecipeError
from llmkd.evaluation.agreement import Agreement, agreement, kappa, rater_agreement, raw_agreement
from llmkd.evaluation.judge_report import JudgeReport, print_judges, write_judge_report
from llmkd.files import digest
from llmkd.labels.pairs import combine, numbers_from_json, numbers_to_json, to_json
from llmkd.labels.pairs import from_json as annotation_of
from llmkd.labels.preference import Annotation
from llmkd.methods import irepo_config
from llmkd.methods.recipe import Recipe, read_recipe, with_absolute_paths
from llmkd.methods.run_folder import check_writable

AT_ONCE = 8  # pairs of one part: what a killed run loses at most
FOLDER = "runs/judge"
COMBINED = "all together"


@dataclass(kw_only=True)
class JudgeConfig:
    """The rated pairs of `llmkd judge`."""

    rated_pairs: str | None = field(
        default=None,
        metadata={
            "help": "Pairs people rated: Hub id or local file (.jsonl, .json, .parquet, .csv) with "
            "prompt, response_1, response_2 and either wins (of response_1) and votes, or "
            "preferred: 1, 2 or tie; or with chosen and rejected."
        },
    )
    rated_split: str = field(default="train", metadata={"help": "Split of the rated pairs."})
    rated_name: str | None = field(
        default=None, metadata={"help": "Configuration (subset) name of rated pairs on the Hub."}
    )
    rated_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of rated pairs on the Hub."}
    )
    rated_columns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Where columns have other names: {prompt: input, preferred: label, ...}. "
            "`group` names a column by which accuracy is reported too."
        },
    )
    max_rated_pairs: int | None = field(
        default=None, metadata={"help": "Ask about this many pairs, drawn by the seed."}
    )

    def __post_init__(self) -> None:
        columns = from_json("rated_columns", self.rated_columns)
        if columns is not None and not isinstance(columns, dict):
            raise RecipeError.of("rated_columns", columns, "must be a mapping")
        for key, value in (columns or {}).items():
            if key not in COLUMNS or not isinstance(value, str):
                known = f"known: {', '.join(COLUMNS)}"
                raise RecipeError.of(f"rated_columns.{key}", value, "names no column", known)
        self.rated_columns = columns
        if self.max_rated_pairs is not None and self.max_rated_pairs < 1:
            raise RecipeError.of("max_rated_pairs", self.max_rated_pairs, "must be at least 1")


TYPES = (*irepo_config.TYPES, JudgeConfig)
PATH_KEYS = ("rated_pairs",)


def check_recipe(recipe: Recipe) -> None:
    """Everything that can be refused without reading data or weights; RecipeError."""
    config, judge = recipe.build_one(AnnotatorConfig), recipe.build_one(JudgeConfig)
    if not judge.rated_pairs:
        raise RecipeError.of(
            "rated_pairs", None, "names no pairs that people rated", "--rated_pairs FILE or Hub id"
        )
    if not config.annotator_entries:
        raise RecipeError.of(
            "annotators", None, "nobody is to be checked", "annotators: [{type: judge, model: ...}]"
        )
    check_writable("output_dir", _folder(recipe))


def main(argv: Sequence[str]) -> Path:
    """`llmkd judge RECIPE --rated_pairs FILE [--key value ...]`; returns the page it wrote."""
    return run(with_absolute_paths(read_recipe(argv, TYPES), PATH_KEYS))


def run(recipe: Recipe) -> Path:
    """Ask every annotator about every pair, and report. A second call asks only what is missing."""
    check_recipe(recipe)
    folder, seed = _folder(recipe), recipe.settings.get("seed") or 0
    config, judge = recipe.build_one(AnnotatorConfig), recipe.build_one(JudgeConfig)
    rated = load_rated(
        judge.rated_pairs or "",
        judge.rated_split,
        subset=judge.rated_name,
        revision=judge.rated_revision,
        columns=judge.rated_columns,  # type: ignore[arg-type]
        most=judge.max_rated_pairs,
        seed=seed,
    )
    items = [Item(p.row, p.prompt, (p.response_1, p.response_2)) for p in rated.pairs]
    asked = [_ask(one, items, folder) for one in make_annotators(config, seed=seed, folder=folder)]
    logits = {one.name: _logits(one.said) for one in asked}
    rows = [_agreement(one, logits[one.name], rated, seed) for one in asked]
    together = _combined(config, asked)
    whole = agreement(COMBINED, together, rated.wins_N, rated.votes_N, seed=seed)
    report = JudgeReport(
        source=judge.rated_pairs or "",
        rated=rated,
        judges=rows,
        combined=whole,
        combine=config.combine,
        logits={**logits, COMBINED: together},
        between=_between(logits),
        raters=rater_agreement(rated.wins_N, rated.votes_N),
        temperature=config.logit_temperature,
    )
    page = write_judge_report(report, folder)
    print_judges(report)
    print(f"{report.advice}\n{page}")
    return page


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.settings.get("output_dir") or FOLDER).expanduser()


@dataclass(frozen=True)
class _Asked:
    """One annotator's answers: annotations of two responses, leans (nats) and time."""

    name: str
    fingerprint: str
    said: list[Annotation]
    first_N: np.ndarray | None
    seconds: float | None
    counts: dict[str, Any]


def _ask(annotator: Annotator, items: list[Item], folder: Path) -> _Asked:
    """Ask in parts that are kept below `folder`, by a hash of annotator and pairs."""
    texts = [[item.prompt, item.responses] for item in items]
    key = digest([annotator.name, annotator.fingerprint, texts])
    batches = [items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE)]
    parts = Parts(folder / "judge" / key, len(batches), key)
    parts.claim()
    seconds = None
    if missing := parts.missing():
        annotator.load(PartialState().device)
        began = time.monotonic()
        run_parts(parts, lambda part: _answers(annotator, batches[part]), label=annotator.name)
        pairs = sum(len(batches[part]) for part in missing)
        seconds = (time.monotonic() - began) / pairs
        annotator.release()
    rows = list(parts.rows())
    said = [annotation_of(row["said"])[1] for row in rows]
    leans = [None if row["lean"] is None else numbers_from_json(row["lean"])[0, 1] for row in rows]
    known = np.array([np.nan if lean is None else lean for lean in leans])
    counts = dict(getattr(annotator, "counts", None) or {}) if seconds is not None else {}
    first_N = None if np.isnan(known).all() else known
    return _Asked(annotator.name, annotator.fingerprint, said, first_N, seconds, counts)


def _answers(annotator: Annotator, items: list[Item]) -> list[dict[str, Any]]:
    """Rows of a part: what was said of each pair, and the lean towards the one shown first."""
    said = checked(annotator, items)
    # Votes have no place for a lean; who asked both orders keeps those of the last call.
    leans = getattr(annotator, "leans", None) or [None] * len(items)
    rows = []
    for item, annotation, lean in zip(items, said, leans, strict=True):
        lean = getattr(annotation, "first_KK", None) if lean is None else lean
        row = {"row": item.row, "said": to_json(annotator.name, annotation)}
        rows.append({**row, "lean": None if lean is None else numbers_to_json(lean)})
    return rows


def _logits(said: list[Annotation]) -> np.ndarray:
    """Logit that the first response is preferred, nats; NaN where there was no answer."""
    return np.array([annotation.logits()[0, 1] for annotation in said])


def _agreement(asked: _Asked, logits_N: np.ndarray, rated: RatedPairs, seed: int) -> Agreement:
    if np.isnan(logits_N).all():
        raise AnnotatorError.of(
            "annotators",
            asked.name,
            f"answered none of {len(logits_N)} pairs",
            f"what it counted: {asked.counts}",
            "look at its template, and at the first warning above",
        )
    return agreement(
        asked.name,
        logits_N,
        rated.wins_N,
        rated.votes_N,
        first_N=asked.first_N,
        seed=seed,
        seconds=asked.seconds,
        notes={"fingerprint": asked.fingerprint, **asked.counts},
    )


def _combined(config: AnnotatorConfig, asked: list[_Asked]) -> np.ndarray:
    """What the loop would learn from, before temperature and clamp."""
    made = [
        combine(list(answers), config.combine, flip_rate=config.annotator_flip_rate)[0, 1]
        for answers in zip(*(one.said for one in asked), strict=True)
    ]
    return np.array(made)


def _between(logits: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Agreement of every two annotators."""
    names = list(logits)
    return [
        {
            "judges": [one, other],
            "agreement": raw_agreement(logits[one], logits[other]),
            "kappa": kappa(logits[one], logits[other]),
        }
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    ]
