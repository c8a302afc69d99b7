"""Recipe keys of `llmkd salt` beyond data, student, selection and training; and what is refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from llmkd.data import DataConfig
from llmkd.data.config import STDLIB, from_json
from llmkd.errors import RecipeError, TeacherError
from llmkd.hub import check_hub
from llmkd.labels.config import LabelConfig
from llmkd.methods.recipe import SECRETS, Recipe
from llmkd.methods.recipe import with_absolute_paths as absolute_paths
from llmkd.models.build import StudentConfig
from llmkd.selection import SelectionConfig
from llmkd.selection import find as find_selection
from llmkd.trainers import SaltConfig


@dataclass(kw_only=True)
class TeacherConfig:
    """The small LM and the arms of the run."""

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The small LM: Hub id or folder with the student's tokenizer."},
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub teacher."}
    )
    teacher_model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Pretrain the small LM first, on the student's own stream, from a config like "
            "model_config."
        },
    )
    teacher_dtype: str = field(
        default="auto", metadata={"help": "Weights of a loaded teacher: auto, bfloat16, float32."}
    )
    teacher_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the small LM's own training (default: the same)."},
    )
    teachers: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several teachers, averaged in probability: a list of mappings, each with "
            "model_name_or_path (revision, dtype) or label_store, and a weight (default 1)."
        },
    )
    arms: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several runs of one recipe: name to changed keys, e.g. {baseline: {kd_ratio: "
            "0}, "
            "rkd: {kd_ratio: 1}, salt: {}}. The arm called baseline is the yardstick; the last one "
            "is what push_to_hub pushes."
        },
    )
    overwrite_run: bool = field(
        default=False, metadata={"help": "Delete another recipe's run in output_dir first."}
    )

    def __post_init__(self) -> None:
        for key in ("teacher_model_config", "arms"):
            setattr(self, key, from_json(key, getattr(self, key)))
            if getattr(self, key) is not None and not isinstance(getattr(self, key), dict):
                raise RecipeError.of(key, getattr(self, key), "must be a mapping")
        self.teachers = check_teachers(from_json("teachers", self.teachers))
        if self.teacher_model_name_or_path and self.teacher_model_config:
            raise RecipeError.of(
                "teacher_model_config",
                self.teacher_model_config,
                f"and teacher_model_name_or_path {self.teacher_model_name_or_path!r} exclude each "
                "other",
                "keep one: load the small LM, or pretrain it",
            )


def check_dtype(key: str, name: Any) -> None:
    """RecipeError for what is neither auto nor a dtype of weights."""
    found: Any = getattr(torch, name, None) if isinstance(name, str) else None
    if name != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise RecipeError.of(key, name, "no such dtype", "known: auto, float32, bfloat16, float16")


TEACHER_KEYS = {"model_name_or_path", "revision", "dtype", "label_store", "weight"}


def check_teachers(teachers: Any) -> list[dict[str, Any]] | None:
    """The list of teachers, each entry's keys known and one source each; RecipeError otherwise."""
    if teachers is None:
        return None
    if not isinstance(teachers, list) or not teachers:
        raise RecipeError.of("teachers", teachers, "must be a list of mappings")
    for entry in teachers:
        if not isinstance(entry, dict) or not set(entry) <= TEACHER_KEYS:
            raise RecipeError.of(
                "teachers", entry, f"known keys: {', '.join(sorted(TEACHER_KEYS))}"
            )
        if ("model_name_or_path" in entry) == ("label_store" in entry):
            raise RecipeError.of("teachers", entry, "name one of model_name_or_path, label_store")
        for key in ("model_name_or_path", "label_store"):
            if key in entry and (not isinstance(entry[key], str) or not entry[key]):
                raise RecipeError.of("teachers", entry, f"{key} must be a folder or a Hub id")
        if entry.get("dtype") is not None:
            check_dtype("teachers", entry["dtype"])
        weight = entry.get("weight", 1)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise RecipeError.of("teachers", entry, "weight must be a number, at least 0")
    if not sum(entry.get("weight", 1) for entry in teachers):
        raise RecipeError.of("teachers", teachers, "all weights are 0")
    return teachers


TYPES = (DataConfig, StudentConfig, TeacherConfig, SelectionConfig, SaltConfig, LabelConfig)
# All arms share text, teacher and folder; and no arm may carry a token into a recipe.yaml.
ARM_KEYS_FIXED = {
    *(f.name for f in fields(DataConfig)),
    *(f.name for f in fields(TeacherConfig) if f.name != "teacher_dtype"),
    "output_dir",
    *(f.name for f in fields(SaltConfig) if f.name.startswith(("hub_", "push_"))),
}
ARM_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
TAKEN = ("teacher", "tokenizer", "selection", "held_out.jsonl", "adapter")
PATH_KEYS = (
    "dataset",
    "eval_dataset",
    "tokenizer_name_or_path",
    "model_name_or_path",
    "teacher_model_name_or_path",
    "selection_model_name_or_path",
    "selection_scores",
    "label_store",
)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Local paths made absolute, so that a resume works from any folder."""
    return absolute_paths(recipe, PATH_KEYS, STDLIB)


def check_recipe(recipe: Recipe) -> None:
    """Everything that can be refused without reading data or weights; RecipeError, HubError."""
    data, student, teacher, selection, training, _ = recipe.build()
    if student.model_name_or_path and student.model_config:
        raise RecipeError.of(
            "model_config",
            student.model_config,
            f"and model_name_or_path {student.model_name_or_path!r} exclude each other",
            "keep one: load a model, or make a new one",
        )
    if not student.model_name_or_path and not student.model_config:
        raise RecipeError.of(
            "model_name_or_path",
            None,
            "no student is named",
            "model_name_or_path: a Hub id or folder (continued pretraining)",
            "model_config: {model_type: llama, hidden_size: 256, ...} (from scratch)",
        )
    for name, changes in (teacher.arms or {"": {}}).items():
        _check_arm(recipe, name, changes or {})
    if data.streaming and training.max_steps <= 0:
        raise RecipeError.of(
            "max_steps", training.max_steps, "a stream has no length", "--max_steps 10000"
        )
    if data.streaming and selection.selection:
        raise RecipeError.of(
            "selection",
            selection.selection,
            "needs all rows before training; a stream does not have them",
            "--streaming false",
        )
    if training.push_to_hub:
        check_hub(training.hub_model_id, training.hub_token)


def _check_arm(recipe: Recipe, name: str, changes: Any) -> None:
    if not isinstance(changes, dict):
        raise RecipeError.of(f"arms.{name}", changes, "must be a mapping of keys to values")
    if name and (not ARM_NAME.fullmatch(name) or name in TAKEN or name.startswith("checkpoint-")):
        raise RecipeError.of(f"arms.{name}", changes, "cannot name a folder of the run")
    for key in changes:
        if key not in recipe.settings or key in ARM_KEYS_FIXED:
            import difflib

            near = difflib.get_close_matches(key, recipe.settings, n=1)
            raise RecipeError.of(
                f"arms.{name}.{key}",
                "***" if key in SECRETS else changes[key],
                "no such key" if key not in recipe.settings else "is one for all arms",
                *(f"did you mean {match!r}?" for match in near if match != key),
            )
    _, _, teacher, selection, training, labels = recipe.build(**changes)
    scores = find_selection(selection.selection) if selection.selection else None
    named = teacher.teacher_model_name_or_path or teacher.teacher_model_config
    taught = named or labels.label_store or teacher.teachers
    if training.kd_ratio > 0 and training.kd_weight > 0 and not taught:
        raise TeacherError.of(
            "teacher_model_name_or_path",
            None,
            f"kd_ratio {training.kd_ratio} and kd_weight {training.kd_weight} need a teacher",
            "name a Hub id or folder with the student's tokenizer",
            "teacher_model_config: {...} pretrains one first",
            "--label_store FOLDER reads labels that `llmkd label` wrote",
            "--kd_ratio 0 trains without one",
        )
    if (scores and scores.needs_model) and not (
        named or selection.selection_model_name_or_path or selection.selection_scores
    ):
        raise RecipeError.of(
            "selection",
            selection.selection,
            "no model to score with",
            "--selection_model_name_or_path PATH",
        )
