"""SALT, arXiv 2410.18779: small LM -> (selection) -> KD stage -> plain training, arm by arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from accelerate import PartialState

from llmkd.data import load_documents
from llmkd.evaluation.compare import as_json, compare, print_table
from llmkd.evaluation.report import write_report
from llmkd.files import read_json, write_json
from llmkd.methods.recipe import Recipe, read_recipe
from llmkd.methods.run_folder import check_room
from llmkd.methods.salt_config import TYPES, check_recipe, with_absolute_paths
from llmkd.methods.salt_plan import Plan, make_rows, make_tokenizer
from llmkd.methods.salt_select import check_named_scorer, choose_rows
from llmkd.methods.salt_teacher import (
    check_given_teacher,
    give_teacher,
    needs_small_lm,
    small_lm,
    taught,
    teacher_stage,
)
from llmkd.methods.stage import (
    Stage,
    bytes_needed,
    check_adapter,
    check_borders,
    student_config,
    train,
)
from llmkd.methods.train_folder import push_folder
from llmkd.selection import controls, four_cells, has_controls
from llmkd.selection.controls import CONTROL

BASELINE = "baseline"


def main(argv: Sequence[str]) -> Path:
    """`llmkd salt RECIPE [--key value ...]`; returns the run's folder."""
    return run(with_absolute_paths(read_recipe(argv, TYPES)))


def run(recipe: Recipe) -> Path:
    """The whole method. A second call with the same recipe goes on where the first one stopped."""
    check_recipe(recipe)
    plan = Plan.of(recipe)
    plan.claim()
    documents = load_documents(plan.data)
    plan.tokenizer = make_tokenizer(plan, documents)
    plan.rows = make_rows(plan, documents)
    stages = [plan.stage(name, changes) for name, changes in plan.arms.items()]
    # labels that lie in a store were paid for: their teacher is not trained again
    small = teacher_stage(plan) if needs_small_lm(stages) else None
    check_stages(plan, [*([small] if small else []), *stages])
    plan.begin(documents)
    teacher = small_lm(plan, small)
    for stage in stages:
        give_teacher(plan, stage, teacher)
        stage.first, stage.selection_flops = choose_rows(plan, stage, teacher)
        if stage.labels.label_store and stage.first is not None and taught(stage):
            check_given_teacher(plan, stage)
        train(stage)
    finish(plan, stages)
    return plan.folder


def check_stages(plan: Plan, stages: list[Stage]) -> None:
    """Everything that can be refused before the first file is written: models, teachers, folders,
    room on the disk.
    """
    needed = 0
    for stage in stages:
        check_given_teacher(plan, stage)
        check_named_scorer(plan, stage)
        check_adapter(stage)
        check_borders(stage)
        if not stage.run.finished_ever():
            needed += bytes_needed(student_config(stage), stage.training)
    plan.claim_stages(stages)
    check_room(plan.folder, needed)


def finish(plan: Plan, stages: list[Stage]) -> None:
    """Table, pictures, report and, where asked for, the push to the Hub. Main process only."""
    try:
        if plan.main:
            _report(plan, stages)
            if plan.training.push_to_hub:
                last = stages[-1]
                push_folder(last.folder, plan.training, last.name, plan.say)
    finally:
        PartialState().wait_for_everyone()  # the others must not wait for a push that was refused


def _report(plan: Plan, stages: list[Stage]) -> None:
    results = compare({stage.name: stage.folder for stage in stages}, BASELINE)
    if plan.several:
        old = read_json(plan.folder / "eval.json") or {}
        write_json(plan.folder / "eval.json", {**old, "arms": as_json(results)})
        plan.run.end(tokens=sum(result.tokens for result in results))
    write_report(plan.folder)
    print_table(results, BASELINE)
    losses = {result.name: result.loss for result in results}
    for selection in sorted({stage.selection.selection or CONTROL for stage in stages} - {CONTROL}):
        print(f"\n{selection}: {_against_random(selection, losses)}")
    plan.say(f"report: {plan.folder / 'report.html'}")


def _against_random(selection: str, losses: dict[str, float]) -> str:
    """What a selection is worth: its four arms, or what to add to the recipe."""
    if has_controls(selection, losses):
        return four_cells(selection, losses, "held-out nats/token")
    arms = yaml.safe_dump(controls(selection), default_flow_style=True, width=10_000).strip()
    return f"{CONTROL} rows and hard labels are not all among the arms; the four to add:\n{arms}"
