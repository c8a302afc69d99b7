"""DeQA-Score, arXiv 2501.11561: rated rows, level targets, a scorer, its agreement with people; arm
by arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmkd.methods.deqa_arm import Arm, train
from llmkd.methods.deqa_config import PATH_KEYS, TYPES, check_recipe
from llmkd.methods.deqa_finish import finish, measure
from llmkd.methods.deqa_plan import Plan
from llmkd.methods.recipe import Recipe, read_recipe, with_absolute_paths

__all__ = ["TYPES", "check_recipe", "main", "run"]


def main(argv: Sequence[str]) -> Path:
    """`llmkd deqa RECIPE [--key value ...]`; returns the run's folder."""
    return run(with_absolute_paths(read_recipe(argv, TYPES), PATH_KEYS))


def run(recipe: Recipe) -> Path:
    """The whole method. A second call with the same recipe goes on where the first one stopped."""
    check_recipe(recipe)
    plan = Plan.of(recipe)
    plan.claim()
    plan.read()
    arms = [Arm(plan, name, changes) for name, changes in plan.arms.items()]
    for arm in arms:
        arm.check()
    with plan.run.held():
        plan.begin()
        for arm in arms:
            train(arm)
            measure(arm)
        finish(plan, arms)
    return plan.folder
