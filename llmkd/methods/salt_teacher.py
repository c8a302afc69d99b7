"""The small LM: pretrained here on the student's own stream, or given."""

from __future__ import annotations

from typing import Any

from llmkd.evaluation.cost import forward_flops
from llmkd.methods.salt_plan import Plan
from llmkd.methods.stage import EarlyCopy, Stage, student_config, train
from llmkd.models.build import count_parameters
from llmkd.teachers import LiveTeacher
from llmkd.teachers.loading import check_weights, model_fingerprint

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
}
# What the small LM's own training never reads: changing these must not train it again.
NOT_THE_TEACHERS = (
    "kd_weight transition transition_hold teacher_temperature student_temperature t2_scale "
    "teacher_dtype selection_model_name_or_path selection_top_k selection_min_kept "
    "selection_batch_size selection_scores"
).split()


def check_given_teacher(plan: Plan, stage: Stage) -> None:
    """Refuse a named teacher that speaks other tokens or holds NaN, before anything trains."""
    named = stage.settings["teacher_model_name_or_path"]
    if named and stage.training.kd_ratio > 0 and stage.training.kd_weight > 0:
        assert plan.tokenizer is not None
        vocab = student_config(stage).vocab_size
        revision = stage.settings["teacher_model_revision"]
        LiveTeacher(named, revision=revision).check(vocab, plan.tokenizer)
        check_weights(named, "teacher_model_name_or_path")


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
        stage.settings.pop(key)
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


def _teacher_facts(
    plan: Plan, source: str, revision: str | None, flops: float | None
) -> dict[str, Any]:
    config = LiveTeacher(source, revision=revision).config()
    return {
        "source": source,
        "revision": revision or getattr(config, "_commit_hash", None),
        "fingerprint": model_fingerprint(source, getattr(config, "_commit_hash", None)),
        "parameters": count_parameters(config),
        "forward_flops_per_token": forward_flops(config, plan.data.max_length),
        "training_flops": flops,
    }


def give_teacher(plan: Plan, stage: Stage, facts: dict[str, Any] | None) -> None:
    """A fresh teacher for an arm that has a KD stage; its predecessor left at the switch."""
    training = stage.training
    if facts is None or training.kd_ratio == 0 or training.kd_weight == 0:
        return
    stage.teacher_facts = facts
    stage.teacher = LiveTeacher(
        facts["source"],
        revision=facts["revision"],
        dtype=stage.settings["teacher_dtype"],
        packed=stage.data.packing,
    )
