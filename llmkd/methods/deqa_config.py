"""Recipe keys of `llmkd deqa` beyond rows, levels and losses; what is refused."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields
from typing import Any

from trl import ModelConfig

from llmkd.data.config import from_json
from llmkd.data.levels import LevelConfig
from llmkd.data.score_config import ScoreDataConfig
from llmkd.errors import LlmkdError, RecipeError
from llmkd.hub import check_hub
from llmkd.labels.score import SCORE_BUILDERS
from llmkd.methods.deqa_targets import LevelTarget
from llmkd.methods.recipe import SECRETS, Recipe
from llmkd.models.build import DTYPES
from llmkd.trainers import ScoreConfig

ARM_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
FILES = (".json", ".jsonl", ".yaml", ".html", ".png")  # an arm's name is a folder's
PATH_KEYS = ("model_name_or_path", "score_dataset", "score_eval_dataset", "image_root")
# Keys that decide how a trained scorer is measured, not what is trained.
MEASURING_KEYS = ("scoring_batch_size", "bootstrap_draws")


@dataclass(kw_only=True)
class ScorerModelConfig(ModelConfig):
    """The model that rates: TRL's `ModelConfig` (id, revision, dtype, LoRA and quantisation)."""

    def __post_init__(self) -> None:
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        if self.dtype not in DTYPES:
            raise RecipeError.of("dtype", self.dtype, f"use one of {', '.join(DTYPES)}")


@dataclass(kw_only=True)
class TargetConfig:
    """Targets at the level token, arms, how the scorer is measured."""

    label: str = field(
        default="gauss_deqa",
        metadata={"help": f"How ratings become level targets: {', '.join(SCORE_BUILDERS)}."},
    )
    label_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of `label`, e.g. {form: integral, repaired: true}."},
    )
    arms: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several runs on the same rows, each a mapping of keys to change, e.g. "
            "{bin: {label: onehot_bin}, gauss: {label: gauss_tilt}}. Others are compared with the "
            "first."
        },
    )
    scoring_batch_size: int = field(
        default=16, metadata={"help": "Held-out rows scored at once, on each device."}
    )
    bootstrap_draws: int = field(
        default=1000, metadata={"help": "Resamples of an interval; 0 draws none."}
    )
    overwrite_run: bool = field(
        default=False,
        metadata={"help": "Replace another recipe's run that stands in output_dir."},
    )

    def __post_init__(self) -> None:
        self.label_options = from_json("label_options", self.label_options)
        self.arms = from_json("arms", self.arms)
        for key in ("label_options", "arms"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, dict):
                raise RecipeError.of(key, value, "must be a mapping")
        for key, least in (("scoring_batch_size", 1), ("bootstrap_draws", 0)):
            if getattr(self, key) < least:
                raise RecipeError.of(key, getattr(self, key), f"must be at least {least}")


TYPES = (ScoreDataConfig, ScorerModelConfig, LevelConfig, TargetConfig, ScoreConfig)
# All arms share rows, levels, model and folder; and no arm may carry a token into a recipe.yaml.
ARM_KEYS_FIXED = {
    *(f.name for kind in (ScoreDataConfig, LevelConfig) for f in fields(kind)),
    *(f.name for f in fields(TargetConfig) if not f.name.startswith("label")),
    *("output_dir", "model_name_or_path", "model_revision", "max_length"),
    *(f.name for f in fields(ScoreConfig) if f.name.startswith(("hub_", "push_"))),
}


def check_recipe(recipe: Recipe) -> None:
    """Everything that can be refused without reading data or weights; RecipeError."""
    data, model, _, target, training = recipe.build()
    if not model.model_name_or_path:
        way = "model_name_or_path: a Hub id or folder of a causal or image-text model"
        raise RecipeError.of("model_name_or_path", None, "no model is named", way)
    if data.score_dataset is None:
        problem, way = "no rated rows are named", "score_dataset: a Hub id, file or folder"
        raise RecipeError.of("score_dataset", None, problem, way)
    if training.push_to_hub:
        if target.arms:
            problem = "one repository holds one model, and arms make several"
            way = "leave it out, then: llmkd push OUTPUT_DIR/ARM OWNER/NAME"
            raise RecipeError.of("push_to_hub", True, problem, way)
        check_hub(training.hub_model_id, training.hub_token)
    for name, changes in (target.arms if target.arms is not None else {"": {}}).items():
        _check_arm(recipe, name, {} if changes is None else changes)
    if target.arms == {}:
        raise RecipeError.of("arms", {}, "names no arm", "leave it out for a single run")


def _check_arm(recipe: Recipe, name: str, changes: Any) -> None:
    if not isinstance(changes, dict):
        raise RecipeError.of(f"arms.{name}", changes, "must be a mapping of keys to values")
    taken = name.startswith("checkpoint-") or name.endswith(FILES)
    if name and (taken or not ARM_NAME.fullmatch(name)):
        raise RecipeError.of(f"arms.{name}", changes, "cannot name a folder of the run")
    for key in changes:
        if key in recipe.settings and key not in ARM_KEYS_FIXED:
            continue
        near = difflib.get_close_matches(key, recipe.settings, n=1)
        raise RecipeError.of(
            f"arms.{name}.{key}",
            "***" if key in SECRETS else changes[key],
            "no such key" if key not in recipe.settings else "is one for all arms",
            *(f"did you mean {match!r}?" for match in near if match != key),
        )
    try:
        _check_settings(*recipe.build(**changes))
    except LlmkdError as error:
        raise type(error)(f"arms.{name}.{error}" if changes else str(error)) from error


def _check_settings(
    data: ScoreDataConfig,
    model: ScorerModelConfig,
    levels: LevelConfig,
    target: TargetConfig,
    training: ScoreConfig,
) -> None:
    """What an arm's keys say together."""
    LevelTarget.of(target, levels).check(data)
    pairs = training.fidelity_weight > 0 and training.pair_loss == "fidelity"
    if pairs and data.mean_column is not None and data.std_column is None:
        raise RecipeError.of(
            "pair_loss",
            "fidelity",
            "pairs need the raters' spread, and mean_column stands without std_column",
            "std_column: the column of standard deviations",
            "pair_loss: binary",
            "fidelity_weight: 0 trains without pairs",
        )
