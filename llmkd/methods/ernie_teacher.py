"""The teachers' roles: pretrained, fine-tuned (here, or given), and one of permuted labels."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset, concatenate_datasets
from transformers.integrations import is_deepspeed_zero3_enabled

from llmkd.data.tokenizer import tokenizer_digest
from llmkd.errors import DataError, MissingFileError, RecipeError, TeacherError
from llmkd.evaluation.task_metrics import chance
from llmkd.files import digest, read_json, write_json
from llmkd.methods.ernie_config import ErnieTinyConfig
from llmkd.methods.ernie_plan import Plan
from llmkd.methods.ernie_stage import HEADS, DistillStage, Start, predict_task, train
from llmkd.methods.ernie_stages import StageSpec, check_keys
from llmkd.methods.train_folder import begin_or_reuse
from llmkd.models.latent_student import LatentStudent
from llmkd.objectives.token import IGNORE
from llmkd.teachers.latent import LatentTeacher
from llmkd.teachers.loading import (
    check_weights,
    commit_of,
    load_config,
    load_model,
    model_fingerprint,
)
from llmkd.teachers.stored_classes import StoredClasses
from llmkd.trainers import LatentDistillTrainer

FLOOR = 0.2  # of the way from the best constant answer to 1, where no teacher_floor is given


def roles_needed(plan: Plan) -> list[str]:
    """Roles that any arm's stages ask, in the order they are prepared."""
    arms = plan.configs().values()
    asked = {spec.teacher for arm in arms for spec in arm.specs() if asks_teacher(spec, arm)}
    return [role for role in ("pretrained", "finetuned", "shuffled") if role in asked]


def asks_teacher(spec: StageSpec, config: ErnieTinyConfig) -> bool:
    """Whether a stage needs its own teacher: not where all it wants are soft labels of others."""
    return "latent" in spec.losses or ("soft" in spec.losses and not asks_others(spec, config))


def asks_others(spec: StageSpec, config: ErnieTinyConfig) -> bool:
    """Whether a stage takes its soft labels from `teachers` or a store. They are the fine-tuned
    teacher's; a stage with another one is taught by that.
    """
    named = bool(config.label_store or config.soft_entries)
    return named and "soft" in spec.losses and spec.teacher == "finetuned"


def check_given(plan: Plan) -> None:
    """TeacherError, RecipeError or DataError for models and labels that are named and cannot teach:
    NaN weights, other classes. Reads configs and local weight files, before anything trains.
    """
    config = plan.config
    check_weights(str(config.teacher_model_name_or_path), "teacher_model_name_or_path")
    check_keys("stage_settings.teacher", config.teacher_settings)
    given, revision = config.finetuned_teacher_name_or_path, config.finetuned_teacher_revision
    named = {} if given is None else {(given, revision): "finetuned_teacher_name_or_path"}
    stores: dict[str, str] = {}
    for arm in plan.configs().values():
        for place, entry in enumerate(_other_sources(arm)):
            if "label_store" in entry:
                store = _check_store(plan, entry)
                stores[entry["label_store"]] = store.open().manifest["key"]
            else:
                name = entry["model_name_or_path"], entry.get("revision")
                named.setdefault(name, f"teachers[{place}]")
    for (name, revision), key in named.items():
        _check_classes(plan, key, name, revision)
        check_weights(name, key)
    if plan.kind == "token" and "shuffled" in roles_needed(plan):
        raise DataError.of(
            "stages", "shuffled", "rows of unequal length cannot change their tokens' labels"
        )
    plan.claim_models(stores)


def _check_classes(plan: Plan, key: str, name: str, revision: str | None) -> None:
    """The classes of a fine-tuned teacher are the task's, in the task's order."""
    config: Any = load_config(name, revision, key)
    rows = plan.task_rows
    if rows is None:
        return
    kinds = config.architectures or ["no architecture"]
    if not any("Classification" in kind for kind in kinds):
        raise TeacherError.of(
            key,
            name,
            f"has no head for the task ({kinds[0]})",
            "name a model that was fine-tuned on the task",
            "leave it out: the recipe then fine-tunes teacher_model_name_or_path itself",
        )
    names = [str(config.id2label[place]) for place in range(config.num_labels)]
    if rows.kind == "regression":
        same = config.num_labels == 1
    else:
        unnamed = names == [f"LABEL_{place}" for place in range(len(names))]
        same = names == list(rows.label_names) or (unnamed and len(names) == rows.labels)
    if not same:
        raise TeacherError.of(
            key,
            name,
            f"has the classes {_short(names)}, the task {_short(rows.label_names)}",
            "name a teacher of this task, its classes in the same order",
            "leave it out: the recipe then fine-tunes teacher_model_name_or_path itself",
        )


def _short(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f", ... ({len(listed)})" if len(listed) > 6 else "")


def prepare_teachers(plan: Plan) -> None:
    """Facts of every role that a stage names, fine-tuning what has to be; asserts the floor.

    Raises TeacherError where the fine-tuned teacher's dev score is below `teacher_floor`.
    """
    for role in roles_needed(plan):
        if role == "pretrained":
            plan.teachers[role] = _facts(plan, *_pretrained(plan), head="none")
        elif role == "finetuned":
            plan.teachers[role] = finetuned_teacher(plan)
        else:
            plan.teachers[role] = _trained(plan, role, _permuted(plan))


def finetuned_teacher(plan: Plan) -> dict[str, Any]:
    """Facts of the fine-tuned teacher, given or trained here; TeacherError below the floor."""
    facts = _finetuned(plan)
    _check_floor(plan, facts["score"])
    return facts


def teacher_at_hand(plan: Plan) -> dict[str, Any]:
    """Facts of the fine-tuned teacher as it stands, nothing trained and nothing scored;
    MissingFileError where it is gone.
    """
    config, head = plan.config, HEADS.get(str(plan.kind), "sequence")
    if given := config.finetuned_teacher_name_or_path:
        try:
            return _facts(plan, given, config.finetuned_teacher_revision, head=head)
        except RecipeError as error:
            raise MissingFileError(str(error)) from error
    folder = (plan.folder / "teacher").absolute()
    if not (folder / "config.json").is_file():  # it appears when training is over
        raise MissingFileError.of(
            "output_dir",
            str(folder),
            "the teacher that was fine-tuned there is gone, and is not trained again for this",
            "if it lies elsewhere: --finetuned_teacher_name_or_path FOLDER",
        )
    return _facts(plan, str(folder), None, head=head)


def _pretrained(plan: Plan) -> tuple[str, str | None]:
    return str(plan.config.teacher_model_name_or_path), plan.config.teacher_model_revision


def _facts(plan: Plan, source: str, revision: str | None, *, head: str) -> dict[str, Any]:
    load_config(source, revision, "teacher_model_name_or_path")
    commit = commit_of(source, revision)
    return {
        "source": source,
        "revision": commit or revision,
        "fingerprint": model_fingerprint(source, commit),
        "head": head,
        "finetuned_here": False,
    }


def _finetuned(plan: Plan) -> dict[str, Any]:
    given = plan.config.finetuned_teacher_name_or_path
    if given is None:
        return _trained(plan, "teacher", None)
    revision = plan.config.finetuned_teacher_revision
    facts = _facts(plan, given, revision, head=HEADS.get(str(plan.kind), "sequence"))
    scores = _score_given(plan, facts)
    return {**facts, "score": scores[plan.metric], "scores": scores}


def teacher_stage(plan: Plan, name: str, rows: Dataset | None) -> DistillStage:
    """Fine-tuning the pretrained teacher on the task, in `<output_dir>/<name>`."""
    source, revision = _pretrained(plan)
    facts = _facts(plan, source, revision, head="none")

    def make() -> Any:
        return load_model(source, revision=revision, key="teacher_model_name_or_path", head="none")

    start = Start(digest(["teacher", facts["fingerprint"]]), make, general=False)
    spec, folder = plan.config.teacher_spec, plan.folder / name
    return DistillStage(spec, plan.recipe, plan, start, None, folder=folder, label=name, rows=rows)


def _trained(plan: Plan, name: str, rows: Dataset | None) -> dict[str, Any]:
    stage = teacher_stage(plan, name, rows)
    train(stage)
    scores = read_json(stage.folder / "eval.json")["task"]
    facts = _facts(plan, str(stage.folder.absolute()), None, head=stage.head)
    base = _pretrained(plan)[0]
    return {
        **facts,
        "finetuned_here": True,
        "base": base,
        "score": scores[plan.metric],
        "scores": scores,
    }


def _permuted(plan: Plan) -> Dataset:
    """The task's training rows with their labels dealt out at random: a teacher of these knows the
    text and not the task.
    """
    assert plan.task_rows is not None
    rows = plan.task_rows.train
    order = np.random.default_rng(plan.training.seed).permutation(len(rows))
    dealt = rows.select_columns("labels").select(order)
    return concatenate_datasets([rows.remove_columns("labels"), dealt], axis=1)


def _score_given(plan: Plan, facts: dict[str, Any]) -> dict[str, Any]:
    """Dev scores of a fine-tuned teacher that was given; kept in `<output_dir>/teacher`."""
    stage = teacher_stage(plan, "teacher", None)
    key = digest([facts["fingerprint"], stage.data_fingerprint()])
    found = begin_or_reuse(stage.run, key, {}, name="teacher", say=plan.say)
    if found is None:
        AcceleratorState._reset_state()
        model = load_model(facts["source"], revision=facts["revision"], head=facts["head"])
        trainer = LatentDistillTrainer(
            LatentStudent(model),
            stage.args,
            losses=["hard"],
            kind=plan.kind,
            task_metrics=stage.task_scores,
            eval_dataset=stage.held_out,
            processing_class=plan.tokenizer,
        )
        if not is_deepspeed_zero3_enabled():
            trainer.is_deepspeed_enabled = False  # lower stages have no engine that only answers
        size = {"head": facts["head"], "parameters": sum(p.numel() for p in model.parameters())}
        stage.run.begin(key, {"kind": "teacher", "name": "teacher", "student": size}, {})
        scores = predict_task(stage, trainer)
        if stage.run.main:
            write_json(stage.folder / "eval.json", scores)
            stage.run.end(tokens=0, steps=0)
        PartialState().wait_for_everyone()
    return read_json(stage.folder / "eval.json")["task"]


def floor_of(plan: Plan) -> float:
    """The dev score the fine-tuned teacher must reach."""
    if plan.config.teacher_floor is not None:
        return plan.config.teacher_floor
    assert plan.task_rows is not None
    found = plan.task_rows.held_out["labels"][:]
    labels = np.concatenate(found) if plan.task_rows.kind == "token" else np.asarray(found)
    if plan.task_rows.kind == "token":
        labels = labels[labels != IGNORE]
    least = chance(plan.task_rows.kind, labels, plan.task.task_metric)
    return least + FLOOR * (1 - least)


def _check_floor(plan: Plan, score: float) -> None:
    floor = floor_of(plan)
    plan.say(f"teacher: {plan.metric} {score:.4f} on the dev rows (floor {floor:.4f})")
    if score < floor:
        raise TeacherError.of(
            "teacher_floor",
            round(floor, 4),
            f"the fine-tuned teacher has {plan.metric} {score:.4f} on the dev rows; a teacher that "
            "does not know the task ruins every task stage without a sign",
            "train it longer: stage_settings: {teacher: {max_steps: ...}}, --overwrite_run true",
            "look at its labels and columns; or name one: --finetuned_teacher_name_or_path",
            "--teacher_floor 0 lets it teach all the same",
        )


def soft_sources(plan: Plan, config: ErnieTinyConfig) -> list[dict[str, Any]]:
    """Entries of an arm's `teachers` or its label store, each with its fingerprint and a way to
    make it; empty where the stage's own teacher gives the soft labels. Checks stores.
    """
    made = []
    for entry in _other_sources(config):
        weight = entry.get("weight", 1.0)
        if "label_store" in entry:
            store = _check_store(plan, entry)
            facts = {"source": entry["label_store"], "fingerprint": store.open().manifest["key"]}
            make: Any = partial(StoredClasses, entry["label_store"], revision=entry.get("revision"))
        else:
            head = HEADS.get(str(plan.kind), "sequence")
            name, revision = entry["model_name_or_path"], entry.get("revision")
            facts = _facts(plan, name, revision, head=head)
            dtype = plan.config.teacher_dtype
            make = partial(
                LatentTeacher, name, head=head, revision=revision, dtype=dtype, key="teachers"
            )
        made.append({**facts, "weight": weight, "make": make})
    return made


def _other_sources(config: ErnieTinyConfig) -> list[dict[str, Any]]:
    """Entries of an arm's `teachers`, or its label store as one; none where no stage asks them."""
    if not any(asks_others(spec, config) for spec in config.specs()):
        return []
    if config.label_store:
        revision = config.label_store_revision
        return [{"label_store": config.label_store, "revision": revision, "own": True}]
    return config.soft_entries


def _check_store(plan: Plan, entry: dict[str, Any]) -> StoredClasses:
    """The store of an entry; DataError listing everything in which it is not made for this run."""
    assert plan.task_rows is not None and plan.tokenizer is not None
    store = StoredClasses(entry["label_store"], revision=entry.get("revision"))
    store.check(
        rows_fingerprint=plan.task_rows.taught_fingerprint,
        tokenizer_digest=tokenizer_digest(plan.tokenizer),
        max_length=plan.task.task_max_length,
        label_names=plan.task_rows.output_names,
        rows_needed=np.arange(len(plan.task_rows.taught)),
        teacher=_teacher_beside(plan) if entry.get("own") else None,
    )
    store.check_dataset(plan.task_rows.taught)
    return store


def _teacher_beside(plan: Plan) -> dict[str, Any] | None:
    """What the run knows of its own fine-tuned teacher, whose answers `label_store` has to hold;
    None before it is trained here, and where no stage asks it. Entries of `teachers` are others'.
    """
    facts, config = plan.teachers.get("finetuned"), plan.config
    if facts is None and (given := config.finetuned_teacher_name_or_path):
        head = HEADS.get(str(plan.kind), "sequence")
        facts = _facts(plan, given, config.finetuned_teacher_revision, head=head)
    return facts and {"id": facts["source"], "fingerprint": facts["fingerprint"]}
