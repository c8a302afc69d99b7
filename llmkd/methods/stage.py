"""One model trained into one run folder: what every arm, and the small LM, goes through."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import IterableDataset
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import get_peft_config, get_quantization_config

from llmkd.data import PackedCollator, TokenRows, pad_id
from llmkd.errors import RecipeError
from llmkd.evaluation.cost import forward_flops
from llmkd.files import digest, fsync_tree, move_into, write_json
from llmkd.methods.recipe import Recipe
from llmkd.methods.run_folder import RunFolder, check_room, result_settings, settings_key
from llmkd.methods.steps import global_batch, ordered_rows, steps_of
from llmkd.methods.train_folder import (
    begin_or_reuse,
    disk_needed,
    final_scores,
    save_trained,
    train_in,
)
from llmkd.models.build import (
    check_vocabulary,
    check_window,
    count_parameters,
    empty_model,
    model_config,
    new_model,
)
from llmkd.objectives import kd_steps
from llmkd.teachers import Teacher
from llmkd.teachers.loading import (
    check_packing,
    commit_of,
    load_config,
    load_model,
    model_fingerprint,
    whole_weights,
)
from llmkd.trainers import SaltConfig, SaltTrainer
from llmkd.trainers.bar import quiet_bar
from llmkd.trainers.callbacks import MetricsFile

logger = logging.getLogger(__name__)
PROBED_BELOW = 300_000_000  # parameters a model may have to be made just for a question


@dataclass
class Stage:
    """What to train: a recipe with changes, rows, a tokenizer, and where to put it."""

    name: str
    recipe: Recipe
    changes: dict[str, Any]
    folder: Path
    rows: TokenRows
    tokenizer: PreTrainedTokenizerBase
    say: Callable[[str], None]
    teacher: Teacher | None = None
    teacher_facts: dict[str, Any] | None = None
    first: np.ndarray | None = None
    selection_flops: float = 0.0
    callbacks: list[TrainerCallback] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = {**self.recipe.settings, **self.changes}
        made = self.recipe.build(**self.changes, output_dir=str(self.folder), push_to_hub=False)
        self.data, self.student, teacher, self.selection, self.training, self.labels = made
        self.teachers: list[dict[str, Any]] | None = teacher.teachers
        self.steps = steps_of(self.training, self.rows)
        self.run = RunFolder(self.folder, main=PartialState().is_main_process)

    @property
    def key(self) -> str:
        """Hash of all that decides the result."""
        teacher = (self.teacher_facts or {}).get("fingerprint")
        student = model_fingerprint(self.student.model_name_or_path, self.student.model_revision)
        first = digest(self.first.tolist()) if self.first is not None else None
        batch = global_batch(self.training)
        return settings_key(self.settings, self.rows.fingerprint, teacher, student, first, batch)


def train(stage: Stage) -> dict[str, Any]:
    """Train, resume or reuse one stage; returns its `run.json`.

    An interrupted run goes on from its last whole checkpoint. The model files appear in the folder
    only after training ended.
    """
    run, key = stage.run, stage.key
    facts = begin_or_reuse(run, key, stage.settings, name=stage.name, say=stage.say)
    if facts is not None:
        return facts
    config = student_config(stage)
    check_room(stage.folder, bytes_needed(config, stage.training))
    return train_in(
        run,
        key,
        name=stage.name,
        facts=_facts(stage, config),
        recipe=recipe_yaml(stage),
        make=lambda: make_trainer(stage, config),
        save=lambda trainer: _save(stage, trainer, final_scores(trainer)),
        say=stage.say,
    )


def make_trainer(stage: Stage, config: PretrainedConfig) -> SaltTrainer:
    """The trainer of a stage, model and row order included."""
    # Each trainer brings its own accelerator; without the reset DeepSpeed refuses a second one.
    AcceleratorState._reset_state()
    args = stage.training
    args.max_steps = stage.steps
    args.train_sampling_strategy = "sequential"
    model = _model(stage, config)
    if stage.data.packing and not is_deepspeed_zero3_enabled():
        check_packing(model, "model_name_or_path" if stage.student.model_name_or_path else "model")
    trainer = SaltTrainer(
        model,
        args,
        teacher=stage.teacher,
        peft_config=get_peft_config(stage.student),
        train_dataset=ordered_rows(stage),
        eval_dataset=stage.rows.held_out,
        processing_class=stage.tokenizer,
        data_collator=PackedCollator(pad_id(stage.tokenizer)),
        bytes_per_token=stage.rows.bytes_per_token,
        callbacks=[MetricsFile(stage.folder), *stage.callbacks],
    )
    for callback in stage.callbacks:
        if isinstance(callback, EarlyCopy):
            callback.trainer = trainer
    quiet_bar(trainer, stage.name)
    return trainer


def student_config(stage: Stage) -> PretrainedConfig:
    """The model's config, checked against tokenizer and row length."""
    student = stage.student
    if student.model_name_or_path:
        key = "model_name_or_path"
        config = load_config(student.model_name_or_path, student.model_revision, key)
        commit = commit_of(student.model_name_or_path, student.model_revision)
        if commit is not None:
            logger.info("%s at revision %s", student.model_name_or_path, commit)
    else:
        key = "teacher_model_config" if stage.name == "teacher" else "model_config"
        config = model_config(student.model_config, stage.tokenizer, key)
    check_vocabulary(config, stage.tokenizer, key)
    check_window(config, stage.data.max_length, key)
    return config


def _model(stage: Stage, config: PretrainedConfig) -> Any:
    student = stage.student
    if student.model_name_or_path:
        return load_model(
            student.model_name_or_path,
            revision=student.model_revision,
            dtype=student.dtype,
            attn=student.attn_implementation,
            quantization=get_quantization_config(student),
        )
    return _new_model(stage, config)


def _new_model(stage: Stage, config: PretrainedConfig) -> PreTrainedModel:
    """Fresh weights from the seed, the same ones however many ranks there are."""
    seed, attn = stage.training.seed, stage.student.attn_implementation
    if not is_deepspeed_zero3_enabled():
        return new_model(config, seed=seed, attn=attn)
    # ZeRO-3 would draw every shard anew. One rank makes the whole model, all read it from a file.
    folder = stage.folder / ".init.part"
    if stage.run.main:
        with whole_weights():
            new_model(config, seed=seed, attn=attn).save_pretrained(folder)
    PartialState().wait_for_everyone()
    model = load_model(str(folder), attn=attn)
    PartialState().wait_for_everyone()
    if stage.run.main:
        shutil.rmtree(folder)
    return model


def bytes_needed(config: PretrainedConfig, args: SaltConfig) -> int:
    """Disk for the model and its checkpoints (weights and two Adam moments, 4 bytes each)."""
    return disk_needed(count_parameters(config), args)


def recipe_yaml(stage: Stage) -> dict[str, Any]:
    """What the run folder's `recipe.yaml` says: the keys given, with the arm's changes."""
    recipe = {**stage.recipe.public(), **stage.changes, "output_dir": str(stage.folder)}
    return {key: value for key, value in recipe.items() if key not in ("arms", "overwrite_run")}


def _facts(stage: Stage, config: PretrainedConfig) -> dict[str, Any]:
    args, rows = stage.training, stage.rows
    train_rows = None if isinstance(rows.train, IterableDataset) else len(rows.train)
    return {
        "kind": "salt",
        "name": stage.name,
        "seed": args.seed,
        "data": {
            "source": stage.data.source,
            "fingerprint": rows.fingerprint,
            "train_rows": train_rows,
            "train_tokens": rows.train_tokens,
            "eval_rows": len(rows.held_out),
            "eval_tokens": sum(len(ids) for ids in rows.held_out["input_ids"]),
            "bytes_per_token": rows.bytes_per_token,
            "max_length": stage.data.max_length,
            "packing": stage.data.packing_strategy if stage.data.packing else "none",
            "selection": stage.selection.selection,
            "selected_rows": None if stage.first is None else len(stage.first),
        },
        "teacher": stage.teacher_facts,
        "student": {
            "source": stage.student.model_name_or_path or f"new {config.model_type}",
            "parameters": count_parameters(config),
            "forward_flops_per_token": forward_flops(config, stage.data.max_length),
        },
        "schedule": {
            "kd_ratio": args.kd_ratio,
            "kd_weight": args.kd_weight,
            "kd_steps": kd_steps(args.kd_ratio, stage.steps) if stage.teacher else 0,
            "max_steps": stage.steps,
            "batch_rows": global_batch(args),
            "transition": args.transition,
            "teacher_temperature": args.teacher_temperature,
            "student_temperature": args.student_temperature,
            "t2_scale": args.t2_scale,
            "learning_rate": args.learning_rate,
        },
        "selection_flops": stage.selection_flops,
        "settings": result_settings(stage.settings),
    }


def _save(stage: Stage, trainer: SaltTrainer, scores: dict[str, float]) -> None:
    aside = stage.folder / ".model.part"
    save_trained(trainer, aside, stage.student, main=stage.run.main)
    if not stage.run.main:
        return
    move_into(aside, stage.folder)
    held_out = {
        "loss": scores["eval_loss"],
        "bits_per_byte": scores.get("eval_bits_per_byte"),
        "accuracy": scores["eval_accuracy"],
        "tokens": int(scores["eval_tokens"]),
    }
    write_json(stage.folder / "eval.json", {"held_out": held_out})
    stage.run.end(tokens=trainer.state.num_input_tokens_seen)


class EarlyCopy(TrainerCallback):
    """Keeps a copy of the model at one step: the early small LM that scores rows for SALT_DS.

    `trainer` is set by `train`; saving is a collective under ZeRO-3.
    """

    trainer: SaltTrainer

    def __init__(self, folder: Path, ratio: float) -> None:
        self.folder, self.ratio = folder, ratio

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save once, whole or not at all, at `ratio` of all steps."""
        if state.global_step != max(1, round(self.ratio * state.max_steps)):
            return
        aside = self.folder.with_name(f".{self.folder.name}.part")
        self.trainer.save_model(str(aside))
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            fsync_tree(aside)
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(aside, self.folder)


def check_adapter(stage: Stage) -> None:
    """RecipeError where the LoRA keys do not fit the student; asked of a model without weights."""
    config = student_config(stage)
    peft_config = get_peft_config(stage.student)
    if peft_config is None:
        return
    from peft import get_peft_model

    try:
        with torch.device("meta"):
            get_peft_model(empty_model(config), peft_config)
    except ValueError as error:
        raise RecipeError.of(
            "lora_target_modules",
            stage.student.lora_target_modules,
            str(error).splitlines()[0][:300],
            "leave it out for the type's default",
        ) from error


def check_borders(stage: Stage) -> None:
    """RecipeError where a new model of this shape lets packed documents see each other.

    Asked of a model made for the question; a large or a loaded one is asked when it is there.
    """
    config = student_config(stage)
    if not stage.data.packing or stage.student.model_name_or_path:
        return
    if count_parameters(config) <= PROBED_BELOW:
        with whole_weights():
            check_packing(new_model(config, seed=0), "model_config")
