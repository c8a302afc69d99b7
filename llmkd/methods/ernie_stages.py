"""What a stage is: who teaches, on which text, by which losses. ERNIE-Tiny's four, and others."""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from llmkd.errors import RecipeError
from llmkd.methods.recipe import Recipe
from llmkd.trainers import LatentDistillConfig
from llmkd.trainers.latent_rules import check_losses, check_weights

# name: teacher, data, losses. One of the three changes from each of the four to the next.
PRESETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gd": ("pretrained", "general", ("latent",)),
    "ged": ("finetuned", "general", ("latent",)),
    "tad": ("finetuned", "task", ("latent",)),
    "tsd": ("finetuned", "task", ("latent", "soft", "hard")),
    "prediction": ("finetuned", "task", ("soft", "hard")),  # TinyBERT's last phase
    "finetune": ("none", "task", ("hard",)),
}
TEACHERS = ("pretrained", "finetuned", "shuffled", "none")
OWN_KEYS = ("stage", "name", "teacher", "data", "losses")
NAME = re.compile(r"[A-Za-z0-9][\w-]*")
FIXED = {"output_dir", "push_to_hub", "seed", "report_to"}
SOFT_KEYS = ("soft", "soft_weight", "soft_temperature", "t2_scale", "nkd_gamma")
LATENT_KEYS = (
    "attn",
    "hidden",
    "embeddings",
    "layer_map",
    "projection",
    "attn_weight",
    "hidden_weight",
)


@dataclass(frozen=True)
class StageSpec:
    """One stage of a list; `settings` are training keys that replace the recipe's."""

    name: str
    teacher: str
    data: str
    losses: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def predicts(self) -> bool:
        """Whether the student has a task head in it."""
        return "soft" in self.losses or "hard" in self.losses

    def args(self, recipe: Recipe, folder: str) -> LatentDistillConfig:
        """The training arguments of this stage in `folder`.

        The seed depends on the stage's name, not on its place: arms that differ elsewhere see the
        same batches in stages of the same name.
        """
        seed = int(recipe.settings["seed"]) + zlib.crc32(self.name.encode()) % 9973
        changes = {**self.settings, "output_dir": folder, "push_to_hub": False, "seed": seed}
        try:
            return recipe.build_one(LatentDistillConfig, **changes)
        except RecipeError as error:
            if self.settings:
                raise RecipeError(f"stage {self.name}: {error}") from error
            raise

    def result_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The training keys that decide this stage's weights, without those of absent losses."""
        known = {f.name for f in fields(LatentDistillConfig)}
        found = {k: v for k, v in {**settings, **self.settings}.items() if k in known}
        idle = () if "latent" in self.losses else LATENT_KEYS
        idle += () if "soft" in self.losses else SOFT_KEYS
        idle += () if "hard" in self.losses else ("hard_weight",)
        scored = ("eval_", "per_device_eval_")  # how often and how fast it is scored
        return {k: v for k, v in found.items() if k not in idle and not k.startswith(scored)}

    def check_args(self, recipe: Recipe, *, learns: bool = True) -> None:
        """RecipeError for training keys that cannot be, and, where it `learns`, for weights that
        leave nothing to learn.
        """
        args = self.args(recipe, "unused")
        if not learns:
            return
        try:
            check_weights(self.losses, args)
        except RecipeError as error:
            raise RecipeError(f"stage {self.name}: {error}") from error

    def check(self, *, has_task: bool) -> None:
        """RecipeError for a stage whose parts contradict each other."""
        key = f"stages.{self.name}"
        if self.data == "general" and self.predicts:
            raise RecipeError.of(
                key, list(self.losses), "general text has no labels", "losses: [latent]"
            )
        if not has_task and (self.data == "task" or self.teacher in ("finetuned", "shuffled")):
            raise RecipeError.of(
                "task_dataset",
                None,
                f"stage {self.name} needs a task (teacher {self.teacher}, data {self.data})",
                "--task_dataset PATH_OR_ID",
                "--stages gd: general distillation alone",
            )
        needs = [loss for loss in ("latent", "soft") if loss in self.losses]
        if self.teacher == "none" and needs:
            raise RecipeError.of(key, "none", f"nobody teaches, and {needs[0]} needs a teacher")
        if self.teacher == "pretrained" and "soft" in self.losses:
            raise RecipeError.of(
                key,
                "pretrained",
                "a pretrained teacher has no head for the task, so no soft labels",
                "teacher: finetuned",
            )


def read_stages(
    stages: Any, settings: Mapping[str, Any], elsewhere: Collection[str] = ()
) -> list[StageSpec]:
    """Stage names and mappings as specs; names made unique by a number. RecipeError otherwise.

    `settings` are by stage: of all stages of a kind, of one name; `elsewhere` are names of other
    arms' stages, which they may speak of too.
    """
    if not isinstance(stages, list | tuple) or not stages:
        raise RecipeError.of("stages", stages, "must be a list of stages", "[gd, ged, tad, tsd]")
    specs: list[StageSpec] = []
    for entry in stages:
        given = {"stage": entry} if isinstance(entry, str) else entry
        specs.append(_read_one(given, settings, {spec.name for spec in specs}))
    known = {*(s.name for s in specs), *PRESETS, "teacher", *elsewhere}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            ways = [f"did you mean {match!r}?" for match in near]
            raise RecipeError.of(f"stage_settings.{name}", settings[name], "no such stage", *ways)
        check_keys(f"stage_settings.{name}", settings[name])
    return specs


def _read_one(entry: Any, settings: Mapping[str, Any], taken: Collection[str]) -> StageSpec:
    if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
        raise RecipeError.of(
            "stages",
            entry,
            "each is a name or a mapping with `stage`",
            _known(),
            "{stage: gd, ...}",
        )
    preset = entry["stage"].strip().lower()
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        ways = [f"did you mean {match!r}?" for match in near]
        raise RecipeError.of("stages", entry["stage"], "no such stage", *ways, _known())
    name = first = str(entry.get("name", preset))
    if not NAME.fullmatch(name) or name == "teacher":
        raise RecipeError.of("stages", name, "cannot name a stage", "letters, digits, - and _")
    number = 1
    while name in taken:
        number += 1
        name = f"{first}-{number}"
    teacher, data, losses = PRESETS[preset]
    teacher, data = entry.get("teacher", teacher), entry.get("data", data)
    for key, value, known in (
        ("teacher", teacher, TEACHERS),
        ("data", data, ("general", "task")),
    ):
        if value not in known:
            raise RecipeError.of(f"stages.{name}.{key}", value, f"known: {', '.join(known)}")
    own = {key: value for key, value in entry.items() if key not in OWN_KEYS}
    check_keys(f"stages.{name}", own)
    found = check_losses(entry.get("losses", losses), f"stages.{name}.losses")
    merged: dict[str, Any] = {}
    for key in dict.fromkeys((preset, first, name)):  # the more special wins
        if isinstance(listed := settings.get(key), dict):  # else it is refused later
            merged |= listed
    return StageSpec(name, teacher, data, found, {**merged, **own})


def check_keys(key: str, settings: Any) -> None:
    """RecipeError for a stage's settings that are no mapping of training keys."""
    if not isinstance(settings, dict):
        raise RecipeError.of(key, settings, "must be a mapping of training keys to values")
    known = {f.name for f in fields(LatentDistillConfig) if f.init} - FIXED
    for name, value in settings.items():
        if name not in known or name.startswith("hub_"):
            near = difflib.get_close_matches(str(name), known, n=1)
            problem = "is one for all stages" if name in FIXED else "no such training key"
            ways = [f"did you mean {match!r}?" for match in near if match != name]
            raise RecipeError.of(f"{key}.{name}", value, problem, *ways)


def _known() -> str:
    return f"known: {', '.join(PRESETS)}"
