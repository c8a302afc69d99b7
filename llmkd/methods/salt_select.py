"""Rows of stage 1, and the verb `llmkd select`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset

from llmkd.data import load_documents, pad_id
from llmkd.errors import RecipeError
from llmkd.evaluation.cost import forward_flops
from llmkd.files import digest
from llmkd.methods.recipe import Recipe
from llmkd.methods.salt_config import check_recipe
from llmkd.methods.salt_plan import Plan, make_rows, make_tokenizer
from llmkd.methods.salt_teacher import small_lm, teacher_stage
from llmkd.methods.stage import Stage, global_batch, steps_of
from llmkd.objectives import kd_steps
from llmkd.selection import find, histogram, read_scores, save_scores, top_rows
from llmkd.teachers.loading import load_model, model_fingerprint, whole_weights


def choose_rows(
    plan: Plan, stage: Stage, teacher: dict[str, Any] | None
) -> tuple[np.ndarray | None, float]:
    """Rows of stage 1 and the FLOPs their scoring cost; (None, 0) for rows as they come."""
    config, rows = stage.selection, stage.rows
    if config.selection is None or not isinstance(rows.train, Dataset):
        return None, 0.0
    steps = kd_steps(stage.training.kd_ratio, steps_of(stage.training, rows))
    keep = min(steps * global_batch(stage.training), len(rows.train))
    scores, flops = row_scores(plan, stage, teacher)
    kept = top_rows(scores, keep)
    plan.say(f"{stage.name}: stage 1 takes {keep} of {len(scores)} rows by {config.selection}")
    return kept, flops


def row_scores(
    plan: Plan, stage: Stage, teacher: dict[str, Any] | None
) -> tuple[np.ndarray, float]:
    """A score for every row, from the file named, the cache, or the scoring model."""
    config, rows = stage.selection, stage.rows
    assert isinstance(rows.train, Dataset) and config.selection is not None
    if config.selection_scores:
        path = Path(config.selection_scores)
        return read_scores(path, len(rows.train), rows.fingerprint), 0.0
    if config.selection == "random":
        return find("random")(rows.train, seed=stage.training.seed), 0.0
    source = scoring_model(plan, stage, teacher)
    model_mark = model_fingerprint(source, None)
    key = digest([config.selection, config.selection_top_k, config.selection_min_kept, model_mark])
    path = plan.folder / "selection" / f"{config.selection}-{key}.parquet"
    with whole_weights():
        model = load_model(source, key="selection_model_name_or_path")
    flops = forward_flops(model.config, stage.data.max_length) * (rows.train_tokens or 0)
    known = path.is_file()  # asked before any rank may write it
    PartialState().wait_for_everyone()
    if known:
        plan.say(f"{stage.name}: scores reused from {path} (same rows, model and settings)")
        return read_scores(path, len(rows.train), rows.fingerprint), flops
    pad = pad_id(stage.tokenizer)
    scores = find(config.selection)(
        rows.train, seed=stage.training.seed, model=model, config=config, pad_token_id=pad
    )
    if plan.main:
        save_scores(path, scores, rows.fingerprint)
    PartialState().wait_for_everyone()
    return scores, flops


def scoring_model(plan: Plan, stage: Stage, teacher: dict[str, Any] | None) -> str:
    """The named model, the early copy of a teacher trained here, or the teacher itself."""
    named = stage.selection.selection_model_name_or_path
    if named:
        return named
    assert teacher is not None
    early = plan.folder / "teacher" / "early"
    if early.is_dir():
        return str(early)
    plan.say(
        f"selection_model_name_or_path is not set: {teacher['source']} itself scores the rows "
        "(the paper uses an early checkpoint of it)"
    )
    return teacher["source"]


def select(recipe: Recipe) -> Path:
    """`llmkd select`: score the rows of a recipe's train split and draw the histogram."""
    check_recipe(recipe)
    plan = Plan.of(recipe)
    plan.claim()
    documents = load_documents(plan.data)
    plan.tokenizer = make_tokenizer(plan, documents)
    plan.rows = make_rows(plan, documents)
    stage = plan.stage("", {})
    if stage.selection.selection is None:
        raise RecipeError.of("selection", None, "says nothing to select by", "--selection salt_ds")
    needs_teacher = (
        stage.selection.selection != "random"
        and not stage.selection.selection_model_name_or_path
        and not stage.selection.selection_scores
    )
    small = teacher_stage(plan) if needs_teacher else None
    plan.claim_stages([stage, *([small] if small else [])])
    teacher = small_lm(plan, small) if needs_teacher else None
    scores, _ = row_scores(plan, stage, teacher)
    steps = kd_steps(stage.training.kd_ratio, stage.steps)
    keep = min(steps * global_batch(stage.training), len(scores))
    path = plan.folder / "scores.parquet"
    if plan.main:
        save_scores(path, scores, plan.rows.fingerprint)
        print(histogram(scores, top_rows(scores, keep)))
        plan.say(f"scores: {path}")
    return path
