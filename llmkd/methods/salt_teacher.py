"""The small LM: pretrained here on the student's own stream, or given."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import torch

from llmkd.data.tokenizer import tokenizer_digest
from llmkd.errors import MissingFileError, RecipeError
from llmkd.evaluation.cost import forward_flops
from llmkd.files import digest
from llmkd.labels import check_matches
from llmkd.labels.config import LabelConfig
from llmkd.methods.salt_plan import Plan
from llmkd.methods.stage import EarlyCopy, Stage, student_config, train
from llmkd.methods.steps import stage1_rows
from llmkd.models.build import count_parameters
from llmkd.objectives.divergences import find_divergence
from llmkd.selection import find as find_selection
from llmkd.teachers import LiveTeacher, ManyTeachers, StoredTeacher
from llmkd.teachers.loading import check_weights, commit_of, model_fingerprint
from llmkd.types import SparseTarget

# What a teacher trained here does not take from the recipe.
TEACHER_CHANGES: dict[str, Any] = {
    "kd_ratio": 0.0,
    "use_peft": False,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "selection": None,
    "model_name_or_path": None,
    "teacher_model_config": None,
    "teacher_learning_rate": None,
    "teachers": None,
    "label_store": None,
}
# What the small LM's own training never reads: changing these must not train it again.
NOT_THE_TEACHERS = (
    "kd_weight transition transition_hold teacher_temperature student_temperature t2_scale "
    "teacher_dtype selection_model_name_or_path selection_top_k selection_min_kept "
    "selection_batch_size selection_scores selection_rad_mistakes divergence "
    "divergence_beta divergence_skew teachers"
).split() + [f.name for f in fields(LabelConfig)]


def check_given_teacher(plan: Plan, stage: Stage) -> None:
    """Refuse a named teacher that speaks other tokens or holds NaN, and labels that were not made
    for these rows, before anything trains.
    """
    if not taught(stage):
        return
    assert plan.tokenizer is not None
    vocab = student_config(stage).vocab_size
    for entry in sources(stage):
        if "label_store" in entry:
            check_store(plan, stage, entry)
        elif "model_name_or_path" in entry:
            name, revision = entry["model_name_or_path"], entry.get("revision")
            LiveTeacher(name, revision=revision).check(vocab, plan.tokenizer)
            check_weights(name, "teacher_model_name_or_path")


def check_store(plan: Plan, stage: Stage, entry: dict[str, Any]) -> None:
    """DataError listing everything in which a label store is not made for this stage.

    Whether it has the rows of stage 1 is asked once they are known (`selection` chooses them late).
    """
    assert plan.tokenizer is not None
    store = StoredTeacher(entry["label_store"], revision=entry.get("revision")).open()
    tail = stage.labels.label_tail or store.manifest["tail"]
    if tail is not None and not stage.teachers:
        one = torch.ones(1, 1)
        label = SparseTarget(one.long(), one, store.manifest["shared"], tail)
        find_divergence(stage.training.divergence).check(label)
    known = stage.selection.selection is None or stage.first is not None
    check_matches(
        store,
        tokenizer_digest=tokenizer_digest(plan.tokenizer),
        rows_fingerprint=stage.rows.fingerprint,
        rows_needed=stage1_rows(stage) if known else [],
        max_length=stage.data.max_length,
        packing=stage.data.packing_strategy if stage.data.packing else None,
        teacher_temperature=stage.training.teacher_temperature,
        vocab=student_config(stage).vocab_size,
        # asked once: what this very run trains later is not held against labels it was given
        teacher=_teacher_beside(plan, stage) if stage.first is None else None,
    )


def _teacher_beside(plan: Plan, stage: Stage) -> dict[str, Any] | None:
    """What a recipe that has a teacher beside the store says of it; None where it has none."""
    if stage.teachers:  # each entry speaks for itself
        return None
    name = stage.settings["teacher_model_name_or_path"]
    if not name:
        return _trained_beside(plan) if stage.settings["teacher_model_config"] else None
    revision = stage.settings["teacher_model_revision"]
    try:
        LiveTeacher(name, revision=revision).config()
    except RecipeError:  # not at hand, and it need not be: its name is compared
        return {"id": name}
    return {"id": name, "fingerprint": model_fingerprint(name, commit_of(name, revision))}


def _trained_beside(plan: Plan) -> dict[str, Any]:
    """The same of one that `teacher_model_config` describes: its size always, its weights where
    they lie in the run's folder.
    """
    small = teacher_stage(plan)
    assert small is not None
    facts: dict[str, Any] = {"parameters": count_parameters(student_config(small))}
    try:
        found = teacher_at_hand(plan)
        return {**facts, "id": found["source"], "fingerprint": found["fingerprint"]}
    except MissingFileError:
        plan.say(
            f"label_store: whether its teacher is the one teacher_model_config describes cannot be "
            f"told ({small.folder} holds none yet); {facts['parameters']:,} parameters are compared"
        )
        return facts


def taught(stage: Stage) -> bool:
    """Whether the stage has a KD term."""
    return stage.training.kd_ratio > 0 and stage.training.kd_weight > 0


def sources(stage: Stage) -> list[dict[str, Any]]:
    """Where an arm's soft labels come from, as entries of `teachers`; {} is the one trained here.

    A label store counts before a teacher that is named beside it: it is that teacher's.
    """
    settings = stage.settings
    if stage.teachers:
        return stage.teachers
    if stage.labels.label_store:
        store, revision = stage.labels.label_store, stage.labels.label_store_revision
        return [{"label_store": store, "revision": revision}]
    if name := settings["teacher_model_name_or_path"]:
        return [{"model_name_or_path": name, "revision": settings["teacher_model_revision"]}]
    return [{}]


def needs_small_lm(stages: list[Stage]) -> bool:
    """False where stores or other teachers do all the teaching and nobody scores rows with it."""

    def asks(stage: Stage) -> bool:
        config = stage.selection
        scores = config.selection is not None and find_selection(config.selection).needs_model
        named = config.selection_model_name_or_path or config.selection_scores
        return (taught(stage) and {} in sources(stage)) or (scores and not named)

    elsewhere = any(taught(stage) and {} not in sources(stage) for stage in stages)
    return not elsewhere or any(asks(stage) for stage in stages)


def teacher_stage(plan: Plan) -> Stage | None:
    """The small LM's own training; None where it is given or nobody teaches."""
    teacher = plan.recipe.build()[2]
    if not teacher.teacher_model_config:
        return None
    changes = TEACHER_CHANGES | {
        "model_config": teacher.teacher_model_config,
        "learning_rate": teacher.teacher_learning_rate or plan.training.learning_rate,
    }
    folder = plan.folder / "teacher"
    stage = plan.stage("teacher", changes, folder)
    for key in NOT_THE_TEACHERS:
        stage.settings.pop(key, None)
    stage.callbacks = [EarlyCopy(folder / "early", stage.selection.selection_early_ratio)]
    return stage


def small_lm(plan: Plan, stage: Stage | None) -> dict[str, Any] | None:
    """Facts of the teacher: pretrained here on the student's own stream, or given. None without."""
    teacher = plan.recipe.build()[2]
    if stage is not None:
        facts = train(stage)
        flops = 3 * facts["student"]["forward_flops_per_token"] * facts["tokens"]
        return _teacher_facts(plan, str(stage.folder), None, flops)
    if teacher.teacher_model_name_or_path:
        name, revision = teacher.teacher_model_name_or_path, teacher.teacher_model_revision
        return _teacher_facts(plan, name, revision, None)
    return None


def teacher_at_hand(plan: Plan) -> dict[str, Any]:
    """Facts of the recipe's teacher as it stands, nothing trained; MissingFileError where it is
    gone.
    """
    teacher = plan.recipe.build()[2]
    name, revision = teacher.teacher_model_name_or_path, teacher.teacher_model_revision
    if name:
        try:
            return _teacher_facts(plan, name, revision, None)
        except RecipeError as error:
            raise MissingFileError(str(error)) from error
    folder = (plan.folder / "teacher").absolute()
    if not (folder / "config.json").is_file():  # it appears when training is over
        raise MissingFileError.of(
            "teacher_model_config",
            str(folder),
            "the teacher that was trained there is gone, and is not trained again for this",
            "if it lies elsewhere: --teacher_model_name_or_path FOLDER instead",
        )
    return _teacher_facts(plan, str(plan.folder / "teacher"), None, None)


def _teacher_facts(
    plan: Plan, source: str, revision: str | None, flops: float | None
) -> dict[str, Any]:
    config = LiveTeacher(source, revision=revision).config()
    commit = commit_of(source, revision)
    return {
        "source": source,
        "revision": commit or revision,
        "fingerprint": model_fingerprint(source, commit),
        "parameters": count_parameters(config),
        "forward_flops_per_token": forward_flops(config, plan.data.max_length),
        "training_flops": flops,
    }


def give_teacher(plan: Plan, stage: Stage, facts: dict[str, Any] | None) -> None:
    """A fresh teacher for an arm that has a KD stage; its predecessor left at the switch."""
    if not taught(stage):
        return
    made = [_teacher(plan, stage, entry, facts) for entry in sources(stage)]
    teachers, found = [one for one, _ in made], [one for _, one in made]
    if len(made) == 1 and not stage.teachers:
        stage.teacher, stage.teacher_facts = teachers[0], found[0]
        return
    weights = [entry.get("weight", 1.0) for entry in sources(stage)]
    stage.teacher = ManyTeachers(teachers, weights)
    stage.teacher_facts = {
        "source": stage.teacher.name,
        "revision": None,
        "fingerprint": digest([[one["fingerprint"] for one in found], weights]),
        "parameters": sum(one["parameters"] or 0 for one in found),
        "forward_flops_per_token": sum(one["forward_flops_per_token"] or 0 for one in found),
        "training_flops": None,
        "teachers": [{**one, "weight": w} for one, w in zip(found, weights, strict=True)],
    }


def _teacher(
    plan: Plan, stage: Stage, entry: dict[str, Any], small: dict[str, Any] | None
) -> tuple[LiveTeacher | StoredTeacher, dict[str, Any]]:
    if "label_store" in entry:
        name, tail = entry["label_store"], stage.labels.label_tail
        stored = StoredTeacher(name, revision=entry.get("revision"), tail=cast(Any, tail))
        manifest = stored.open().manifest
        labels = {"store": name, "key": manifest["key"], **manifest["encoding"]}
        facts = {**manifest["teacher"], "source": manifest["teacher"]["id"]}
        facts["training_flops"] = None  # not known here: the store says what the teacher is
        return stored, {**facts, "fingerprint": manifest["key"], "labels": labels}
    facts = small
    if "model_name_or_path" in entry:
        facts = _teacher_facts(plan, entry["model_name_or_path"], entry.get("revision"), None)
    assert facts is not None
    dtype = entry.get("dtype") or stage.settings["teacher_dtype"]
    source, revision = facts["source"], facts["revision"]
    packed = stage.data.packing
    return LiveTeacher(source, revision=revision, dtype=dtype, packed=packed), facts
