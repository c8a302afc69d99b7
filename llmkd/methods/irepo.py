"""iREPO, arXiv 2405.15230: sample, annotate, regress on the logit of the empirical preference,
and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmkd.methods.irepo_config import TYPES, check_recipe, with_paths
from llmkd.methods.irepo_finish import finish
from llmkd.methods.irepo_measure import measure
from llmkd.methods.irepo_plan import Plan
from llmkd.methods.irepo_regress import given_pairs, regress
from llmkd.methods.irepo_sample import Iteration, collect_pairs
from llmkd.methods.recipe import Recipe, read_recipe

__all__ = ["TYPES", "check_recipe", "main", "run"]


def main(argv: Sequence[str]) -> Path:
    """`llmkd irepo RECIPE [--key value ...]`; returns the run's folder."""
    return run(with_paths(read_recipe(argv, TYPES)))


def run(recipe: Recipe) -> Path:
    """The whole method. A second call with the same recipe goes on where the first one stopped."""
    check_recipe(recipe)
    plan = Plan.of(recipe)
    plan.claim()
    plan.read()
    plan.say_what_is_measured()
    with plan.run.held():
        plan.begin()
        plan.begin_run()
        plan.pretrain()
        assert plan.start is not None
        policy = plan.start
        measure(Iteration(plan, 0, policy), policy)
        for number in range(1, plan.iterations + 1):
            it = Iteration(plan, number, policy)
            if plan.given:
                given_pairs(it)
            else:
                collect_pairs(it)
            policy = regress(it)
            measure(it, policy)
        finish(plan, policy)
    return plan.folder
