"""ERNIE-Tiny, arXiv 2106.02241: general, general-enhanced, task-adaptive, task-specific
distillation, arm by arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llmkd.methods.ernie_config import PATH_KEYS, TYPES, ErnieTinyConfig, check_recipe
from llmkd.methods.ernie_finish import export, finish
from llmkd.methods.ernie_plan import Plan
from llmkd.methods.ernie_stage import DistillStage, Start, train
from llmkd.methods.ernie_student import check_student, make_student, student_key
from llmkd.methods.ernie_teacher import (
    asks_others,
    asks_teacher,
    check_given,
    prepare_teachers,
    soft_sources,
)
from llmkd.methods.recipe import Recipe, read_recipe, with_absolute_paths


def main(argv: Sequence[str]) -> Path:
    """`llmkd ernie-tiny RECIPE [--key value ...]`; returns the run's folder."""
    return run(with_absolute_paths(read_recipe(argv, TYPES), PATH_KEYS))


def run(recipe: Recipe) -> Path:
    """The whole method. A second call with the same recipe goes on where the first one stopped."""
    check_recipe(recipe)
    plan = Plan.of(recipe)
    plan.claim()
    plan.read()
    check_given(plan)
    for changes in plan.arms.values():
        check_student(plan, recipe.with_changes(changes))
    with plan.run.held():
        plan.begin()
        prepare_teachers(plan)
        for name, changes in plan.arms.items():
            stages = distil(plan, recipe.with_changes(changes))
            export(plan, name, recipe.with_changes(changes), stages)
        finish(plan)
    return plan.folder


def distil(plan: Plan, recipe: Recipe) -> list[DistillStage]:
    """The stages of one arm: the student, with its projections, walks through all of them."""
    config = recipe.build_one(ErnieTinyConfig)
    soft = soft_sources(plan, config)
    start = Start(student_key(plan, recipe), partial(make_student, plan, recipe))
    stages = []
    for spec in config.specs():
        role = plan.teachers[spec.teacher] if asks_teacher(spec, config) else None
        others = soft if asks_others(spec, config) else []
        stage = DistillStage(spec, recipe, plan, start, role, others)
        train(stage)
        stages.append(stage)
        start = stage.end()
    return stages
