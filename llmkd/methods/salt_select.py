"""Rows of stage 1, and the verb `llmkd select`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import PartialState
from datasets import Dataset
from transformers import PretrainedConfig

from llmkd.data import load_documents, pad_id
from llmkd.errors import RecipeError, TeacherError
from llmkd.evaluation.cost import forward_flops
from llmkd.files import digest, read_json
from llmkd.methods.recipe import Recipe
from llmkd.methods.salt_config import check_recipe
from llmkd.methods.salt_plan import Plan, make_rows, make_tokenizer
from llmkd.methods.salt_teacher import small_lm, teacher_stage
from llmkd.methods.stage import Stage
from llmkd.methods.steps import global_batch
from llmkd.models.build import check_window
from llmkd.objectives import kd_steps
from llmkd.selection import (
    controls,
    find,
    four_cells,
    has_controls,
    histogram,
    read_scores,
    save_scores,
)
from llmkd.selection.controls import CONTROL
from llmkd.teachers import LiveTeacher
from llmkd.teachers.loading import (
    check_packing,
    commit_of,
    load_config,
    load_model,
    model_fingerprint,
    whole_weights,
)

MODEL_KEY = "selection_model_name_or_path"


def choose_rows(
    plan: Plan, stage: Stage, teacher: dict[str, Any] | None
) -> tuple[np.ndarray | None, float]:
    """Rows of stage 1 and the FLOPs their scoring cost; (None, 0) for rows as they come.

    Whether anybody teaches in stage 1 does not matter: with kd_weight 0 the selected rows come
    first all the same, which is the control for the soft labels.
    """
    config, rows = stage.selection, stage.rows
    if config.selection is None or not isinstance(rows.train, Dataset):
        return None, 0.0
    keep = rows_wanted(stage)
    if keep == 0:  # no stage 1, nothing to score
        return np.empty(0, dtype=np.int64), 0.0
    scores, flops = row_scores(plan, stage, teacher)
    kept = pick(stage, scores)
    plan.say(f"{stage.name}: stage 1 takes {keep} of {len(scores)} rows by {config.selection}")
    return kept, flops


def rows_wanted(stage: Stage) -> int:
    """Rows that stage 1 sees, each once; all of them where it is longer than an epoch."""
    assert isinstance(stage.rows.train, Dataset)
    steps = kd_steps(stage.training.kd_ratio, stage.steps)
    return min(steps * global_batch(stage.training), len(stage.rows.train))


def pick(stage: Stage, scores: np.ndarray) -> np.ndarray:
    """Numbers of the rows that the stage's selection keeps, given their scores."""
    seed, config = stage.training.seed, stage.selection
    assert config.selection is not None
    return find(config.selection).pick(scores, rows_wanted(stage), seed=seed, config=config)


def row_scores(
    plan: Plan, stage: Stage, teacher: dict[str, Any] | None
) -> tuple[np.ndarray, float]:
    """A score for every row, from the file named, the cache, or the scoring model."""
    config, rows, seed = stage.selection, stage.rows, stage.training.seed
    assert isinstance(rows.train, Dataset) and config.selection is not None
    selection, keep = find(config.selection), rows_wanted(stage)
    if not selection.needs_model:  # the control reads no file: it may be meant for another arm
        return selection.score(rows.train, seed=seed, keep=keep, config=config), 0.0
    if config.selection_scores:
        path = Path(config.selection_scores)
        return read_scores(path, len(rows.train), rows.fingerprint, selection.name), 0.0
    if selection.for_keep and keep == 0:
        raise RecipeError.of(
            "kd_ratio", stage.training.kd_ratio, f"{selection.name} needs a stage 1 to choose for"
        )
    source, revision = scoring_model(plan, stage, teacher)
    shape = check_scoring_model(plan, stage, source, revision)
    flops = forward_flops(shape, stage.data.max_length) * (rows.train_tokens or 0)
    settings = [getattr(config, key) for key in selection.reads]
    settings += [seed, keep] if selection.for_keep else []
    mark = model_fingerprint(source, commit_of(source, revision))
    key = digest([selection.name, *settings, mark])
    path = plan.folder / "selection" / f"{selection.name}-{key}.parquet"
    known = path.is_file()  # asked before any rank may write it
    PartialState().wait_for_everyone()
    if known:
        plan.say(f"{stage.name}: scores reused from {path} (same rows, model and settings)")
        return read_scores(path, len(rows.train), rows.fingerprint, selection.name), flops
    with whole_weights():
        model = load_model(source, revision=revision, key=MODEL_KEY)
    if stage.data.packing:
        check_packing(model, MODEL_KEY)
    pad = pad_id(stage.tokenizer)
    scores = selection.score(
        rows.train, seed=seed, keep=keep, model=model, config=config, pad_token_id=pad
    )
    if plan.main:
        save_scores(path, scores, rows.fingerprint, selection.name)
    PartialState().wait_for_everyone()
    return scores, flops


def scoring_model(
    plan: Plan, stage: Stage, teacher: dict[str, Any] | None
) -> tuple[str, str | None]:
    """Source and revision of the named model, the early copy of a teacher trained here, or the
    teacher itself.
    """
    named = stage.selection.selection_model_name_or_path
    if named:
        return named, None
    assert teacher is not None  # check_recipe saw to it
    early = plan.folder / "teacher" / "early"
    if early.is_dir():
        return str(early), None
    plan.say(
        f"{MODEL_KEY} is not set: {teacher['source']} itself scores the rows (SALT and EL2N use an "
        "early checkpoint)"
    )
    return teacher["source"], teacher.get("revision")


def check_named_scorer(plan: Plan, stage: Stage) -> None:
    """Refuse a scoring model that a recipe names, before anything trains."""
    config = stage.selection
    named = config.selection_model_name_or_path
    asked = config.selection is not None and find(config.selection).needs_model
    if named and asked and not config.selection_scores and stage.training.kd_ratio > 0:
        check_scoring_model(plan, stage, named, None)


def check_scoring_model(
    plan: Plan, stage: Stage, source: str, revision: str | None = None
) -> PretrainedConfig:
    """The config of a model that can read these rows; RecipeError where it speaks other tokens or
    its window is too short. No weights are read.
    """
    assert plan.tokenizer is not None
    config = load_config(source, revision, MODEL_KEY)
    check_window(config, stage.data.max_length, MODEL_KEY)
    try:
        LiveTeacher(source, revision=revision).check(config.vocab_size, plan.tokenizer)
    except TeacherError as error:
        raise RecipeError.of(
            MODEL_KEY, source, f"cannot score these rows: {str(error).splitlines()[0]}"
        ) from error
    return config


def select(recipe: Recipe) -> Path:
    """`llmkd select`: score the rows of a recipe's train split, draw the histogram, and say which
    arms show that a selection is worth it; or their results where the folder holds them.
    """
    check_recipe(recipe)
    plan = Plan.of(recipe)
    plan.claim()
    documents = load_documents(plan.data)
    plan.tokenizer = make_tokenizer(plan, documents)
    plan.rows = make_rows(plan, documents)
    stage = plan.stage("", {})
    config = stage.selection
    if config.selection is None:
        raise RecipeError.of("selection", None, "says nothing to select by", "--selection salt_ds")
    needs_model = find(config.selection).needs_model and not config.selection_scores
    named = config.selection_model_name_or_path
    if needs_model and named:
        check_scoring_model(plan, stage, named)
    needs_teacher = needs_model and not named
    small = teacher_stage(plan) if needs_teacher else None
    arms = [plan.stage(name, changes) for name, changes in plan.arms.items()]
    plan.claim_stages([*arms, *([small] if small else [])])
    teacher = small_lm(plan, small) if needs_teacher else None
    scores, _ = row_scores(plan, stage, teacher)
    path = plan.folder / "scores.parquet"
    if plan.main:
        save_scores(path, scores, plan.rows.fingerprint, config.selection)
        print(find(config.selection).about)
        print(histogram(scores, pick(stage, scores)))
        print(_comparison(plan, config.selection))
        plan.say(f"scores: {path}")
    return path


def _comparison(plan: Plan, selection: str) -> str:
    """The four arms a selection is judged by: what they gave, or what to put into the recipe."""
    arms = (read_json(plan.folder / "eval.json") or {}).get("arms", {})
    losses = {name: result["loss"] for name, result in arms.items()}
    if has_controls(selection, losses):
        return "\n" + four_cells(selection, losses, "held-out nats/token")
    if selection == CONTROL:
        return f"\n{CONTROL} is the control; `--selection NAME` names what to hold against it"
    mapping = yaml.safe_dump({"arms": controls(selection)}, sort_keys=False)
    return f"\nA fair comparison, {CONTROL} x {{soft, hard}} labels:\n{mapping}".rstrip()
