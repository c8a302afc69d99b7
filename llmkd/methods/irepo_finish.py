"""The end of an iREPO run: the last iterate at the top of the folder, report, table, push."""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

from accelerate import PartialState

from llmkd.evaluation.align_report import print_align_table, write_align_report
from llmkd.evaluation.align_run import read_rows
from llmkd.evaluation.policy import reward_mean
from llmkd.files import move_into, read_json, write_json
from llmkd.methods.irepo_plan import Plan
from llmkd.methods.irepo_policy import Policy
from llmkd.methods.train_folder import push_folder

NOT_EXPORTED = ("run.json", "recipe.yaml", "metrics.jsonl", "eval.json")


def finish(plan: Plan, policy: Policy) -> None:
    """The last iterate's files beside `run.json`, report and table and, where asked for, the push.

    Main process only.
    """
    try:
        if plan.main:
            export(plan, Path(policy.adapter or policy.source))
            _report(plan)
            if plan.training.push_to_hub:
                push_folder(plan.folder, plan.training, plan.folder.name, plan.say)
    finally:
        PartialState().wait_for_everyone()  # the others must not wait for a push that was refused


def export(plan: Plan, source: Path) -> None:
    """Copy a model or adapter, as anybody opens it, to the top of the run's folder; what stands
    there already stays as it is.
    """
    aside = plan.folder / ".model.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for path in source.iterdir():
        if not path.is_file() or path.name.startswith(".") or path.name in NOT_EXPORTED:
            continue
        there = plan.folder / path.name
        if not there.is_file() or not filecmp.cmp(path, there, shallow=False):
            shutil.copyfile(path, aside / path.name)
    move_into(aside, plan.folder)


def _report(plan: Plan) -> None:
    _reward_of_start(plan)
    found = [
        read_json(plan.folder / f"iteration-{number}" / "metrics.json") or {}
        for number in range(plan.iterations + 1)
    ]
    held_out = found[-1].get("held_out") or {}
    kept = ("win_rate_start", "win_rate_previous", "kl_initial", "kl_previous", "distinct_2")
    old = read_json(plan.folder / "eval.json") or {}
    write_json(plan.folder / "eval.json", {**old, "policy": {k: held_out.get(k) for k in kept}})
    plan.run.end(iterations=plan.iterations, tokens=sum(one.get("tokens") or 0 for one in found))
    page = write_align_report(plan.folder)
    print_align_table(plan.folder)
    plan.say(f"report: {os.path.relpath(page)}")


def _reward_of_start(plan: Plan) -> None:
    """The start's rewards, known since the first iterate was compared with it."""
    path = plan.folder / "iteration-0" / "metrics.json"
    metrics, values = read_json(path), []
    for line in read_rows(plan.folder / "iteration-1" / "held_out_verdicts.jsonl"):
        if line["against"] == "start" and line["other_score"] is not None:
            values.append(line["other_score"])
    if metrics and values:
        metrics["held_out"]["reward"] = reward_mean(values)
        write_json(path, metrics)
