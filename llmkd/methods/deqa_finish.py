"""The end of an arm and of a run: scores of held-out rows, how they agree with people, report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from llmkd.errors import DataError, LlmkdError
from llmkd.evaluation.deqa_report import PREDICTIONS, print_deqa_table, write_deqa_report
from llmkd.evaluation.score_metrics import Scored
from llmkd.evaluation.score_report import paired_scores, score_report
from llmkd.files import digest, read_json, write_json, write_text
from llmkd.methods.deqa_arm import Arm
from llmkd.methods.deqa_plan import Plan
from llmkd.methods.deqa_targets import people
from llmkd.methods.train_folder import push_folder
from llmkd.models.scorer import Scorer, ScoreTable
from llmkd.teachers.frozen import collect
from llmkd.teachers.loading import whole_weights

SPLITS = ("held_out", "validation")
COMPARED = ("plcc", "srcc", "mae", "std_plcc", "kl", "wasserstein")


def measure(arm: Arm) -> None:
    """`predictions.jsonl` and `eval.json` of an arm: what its scorer says of rows it did not train
    on, against what people said. Ranks share the rows; what is there already stays.
    """
    plan = arm.plan
    key = digest([arm.key, plan.target.bootstrap_draws])
    known = read_json(arm.folder / "eval.json") or {}
    done = known.get("key") == key and (arm.folder / PREDICTIONS).is_file()
    PartialState().wait_for_everyone()  # all have looked before anybody writes
    if done:
        return
    tables = _score(arm)
    if plan.main:
        lines, found = [], {}
        for split, table in tables.items():
            rows = getattr(plan.rows, split)
            report, human = agreement(
                rows, table, plan.target.bootstrap_draws, group=bool(plan.data.group_column)
            )
            found[split] = report.as_dict()
            lines += prediction_rows(rows, table, human, split)
        write_text(arm.folder / PREDICTIONS, json_lines(lines))
        write_json(arm.folder / "eval.json", {**known, "key": key, **found})
    PartialState().wait_for_everyone()


def _score(arm: Arm) -> dict[str, ScoreTable]:
    """The table of each split that has rows, whole on every rank."""
    plan = arm.plan
    with whole_weights():
        scorer = Scorer(
            str(arm.folder),
            device=plan.training.device,
            batch_size=plan.target.scoring_batch_size,
        )
    found = {}
    for split in SPLITS:
        if not (rows := getattr(plan.rows, split)):
            continue
        found[split] = shared_table(scorer, rows, plan.rank, plan.world)
    del scorer
    collect()
    return found


def shared_table(
    scorer: Scorer, rows: Sequence[dict[str, Any]], rank: int, world: int
) -> ScoreTable:
    """The table of all rows, whole on every rank; ranks share them, and all raise the error of the
    first that has one (a launcher shows that of rank 0 alone).
    """
    error, made, cut = None, [], 0
    places = range(rank, len(rows), world)
    try:
        if places:
            table = scorer.score([rows[place] for place in places])
            made = list(zip(places, table.level_logits_NL.tolist(), strict=True))
            cut = table.cut
    except LlmkdError as raised:
        error = raised
    gathered = gather_object([(error, made, cut)])
    if (first := next((one for one, _, _ in gathered if one is not None), None)) is not None:
        raise first
    logits = dict(pair for _, some, _ in gathered for pair in some)
    logits_NL = np.array([logits[place] for place in range(len(rows))])
    logits_NL = logits_NL.reshape(len(rows), len(scorer.levels.words))
    return ScoreTable.of(logits_NL, scorer.levels, sum(cut for _, _, cut in gathered))


def agreement(
    rows: Sequence[dict[str, Any]], table: ScoreTable, draws: int, *, group: bool
) -> tuple[Any, Scored]:
    """The report of a table of scores on rated rows, and what people said of these."""
    values = table.levels.values_L
    std_N, probs_NL = people(rows, values)
    human = Scored.of([row["mean"] for row in rows], std_N, probs_NL)
    said = Scored.of(table.mean_N, table.std_N, table.probs_NL)
    groups = [row["group"] for row in rows] if group else None
    return score_report(said, human, values, groups=groups, draws=draws), human


def prediction_rows(
    rows: Sequence[dict[str, Any]], table: ScoreTable, human: Scored | None, split: str | None
) -> list[dict[str, Any]]:
    """Lines of `predictions.jsonl`; `human_*` where people rated the rows."""
    found = []
    for place, row in enumerate(rows):
        line: dict[str, Any] = {"row": row["row"], "split": split, "group": row["group"]}
        if split is None:
            line.pop("split")
        line["mean"], line["std"] = float(table.mean_N[place]), float(table.std_N[place])
        line["probs"] = table.probs_NL[place].tolist()
        if human is not None:
            line["human_mean"], line["human_std"] = float(row["mean"]), row["std"]
            probs_NL = human.probs_NL
            line["human_probs"] = None if probs_NL is None else probs_NL[place].tolist()
        found.append(line)
    return found


def json_lines(rows: Sequence[dict[str, Any]]) -> str:
    """JSON, a row a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def finish(plan: Plan, arms: list[Arm]) -> None:
    """Arms compared with the first, report and table. Main process only."""
    try:
        if plan.main:
            if plan.several:
                _compare(plan, arms)
            page = write_deqa_report(plan.folder)
            print_deqa_table(plan.folder)
            plan.say(f"report: {os.path.relpath(page)}")
            if plan.training.push_to_hub:
                push_folder(plan.folder, plan.training, plan.folder.name, plan.say)
    finally:
        PartialState().wait_for_everyone()


def _compare(plan: Plan, arms: list[Arm]) -> None:
    found = {arm.name: read_json(arm.folder / "eval.json")["held_out"]["measures"] for arm in arms}
    old = read_json(plan.folder / "eval.json") or {}
    said = {arm.name: predictions_of(arm.folder) for arm in arms}
    first, *others = said
    draws, paired = plan.target.bootstrap_draws, {}
    for name in others if draws else ():
        paired[name] = _paired(said[name], said[first], plan, draws)
    result = {"arms": found, "against": first, "paired": paired}
    write_json(plan.folder / "eval.json", {**old, **result})
    facts = [arm.run.facts() or {} for arm in arms]
    plan.run.end(tokens=sum(one.get("tokens") or 0 for one in facts))


def _paired(a: tuple[Scored, Scored], b: tuple[Scored, Scored], plan: Plan, draws: int) -> Any:
    """How much better `a` is than `b` on the held-out rows, by metric; None where undefined."""
    assert plan.levels is not None
    found: dict[str, Any] = {}
    for metric in COMPARED:
        try:
            gap = paired_scores(metric, [a[0]], [b[0]], a[1], plan.levels.values_L, draws=draws)
            found[metric] = {k: v for k, v in asdict(gap).items() if k != "per_seed"}
        except DataError:  # constant predictions, or people of whom no spread is known
            found[metric] = None
    return found


def predictions_of(folder: Path, split: str = "held_out") -> tuple[Scored, Scored]:
    """What an arm's scorer said of a split, and what people said."""
    text = (folder / PREDICTIONS).read_text(encoding="utf-8")
    rows = [row for line in text.splitlines() if (row := json.loads(line))["split"] == split]

    def column(name: str) -> list[Any] | None:
        found = [row[name] for row in rows]
        return None if None in found else found

    scored = [column(name) for name in ("mean", "std", "probs")]
    human = [column(f"human_{name}") for name in ("mean", "std", "probs")]
    return Scored.of(*scored), Scored.of(*human)  # type: ignore[arg-type]
