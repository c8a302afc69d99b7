"""Recipe keys of `llmkd ernie-tiny` beyond task, text, student and losses; and what is refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, cast

from llmkd.data import DataConfig, TaskConfig
from llmkd.data.augment import find_augment
from llmkd.data.config import from_json
from llmkd.errors import RecipeError, TeacherError
from llmkd.hub import check_hub
from llmkd.methods.ernie_stages import PRESETS, StageSpec, check_keys, read_stages
from llmkd.methods.recipe import SECRETS, Recipe
from llmkd.methods.salt_config import check_dtype, check_teachers
from llmkd.models.student import StudentShape
from llmkd.trainers import LatentDistillConfig


@dataclass(kw_only=True)
class GeneralText(DataConfig):
    """General text for the first stages; unlabelled, cut into rows of max_length tokens."""

    packing: bool = field(default=False, init=False)
    packing_strategy: str = field(default="bfd_split", init=False)
    truncate: bool = field(default=False, init=False)
    tokenizer_name_or_path: str | None = field(default=None, init=False)
    tokenizer_vocab_size: int = field(default=4096, init=False)


@dataclass(kw_only=True)
class ErnieTinyConfig:
    """Teachers, stages and arms of the run."""

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The pretrained teacher, Hub id or folder: an encoder, or a decoder. Its "
            "tokenizer is the student's."
        },
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub teacher."}
    )
    teacher_dtype: str = field(
        default="auto", metadata={"help": "Weights of a loaded teacher: auto, bfloat16, float32."}
    )
    finetuned_teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The teacher fine-tuned on the task already; by default the recipe fine-tunes "
            "teacher_model_name_or_path itself (stage_settings: {teacher: ...})."
        },
    )
    finetuned_teacher_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a fine-tuned Hub teacher."}
    )
    teacher_floor: float | None = field(
        default=None,
        metadata={
            "help": "Dev score (task_metric) the fine-tuned teacher must reach before any stage "
            "starts. Default: a fifth of the way from the best constant answer to 1."
        },
    )
    teachers: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several fine-tuned teachers for the soft loss, averaged in probability: a "
            "list of mappings with model_name_or_path (revision) or label_store, and a weight."
        },
    )
    stages: str = field(  # or a list; YAML gives one, the command line its JSON or names
        default="gd,ged,tad,tsd",
        metadata={
            "help": "Stages in order: gd, ged, tad, tsd, prediction (soft and hard alone), "
            "finetune (hard alone), each once or more; or mappings {stage: gd, name: ..., "
            "teacher: pretrained|finetuned|shuffled|none, data: general|task, losses: [...], and "
            "any training key}. shuffled is a control: a teacher fine-tuned on permuted labels."
        },
    )
    stage_settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Training keys of each stage by its name, for all arms, and of `teacher`, the "
            "fine-tuning: {gd: {max_steps: 1500, learning_rate: 1.0e-3}, teacher: {...}}."
        },
    )
    label_store: str | None = field(
        default=None,
        metadata={
            "help": "Class probabilities that `llmkd label RECIPE --label_store FOLDER` wrote: the "
            "soft loss reads them, and asks no teacher for logits. Folder or Hub dataset id."
        },
    )
    label_store_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a store on the Hub."}
    )
    overwrite_labels: bool = field(
        default=False, metadata={"help": "Delete labels of other settings in label_store first."}
    )
    label_batch_size: int = field(
        default=64, metadata={"help": "Rows of one forward pass of the labelling teacher."}
    )
    label_rows_per_shard: int = field(
        default=512, metadata={"help": "Rows of a shard: what a killed run of it loses at most."}
    )
    augment: str | None = field(
        default=None,
        metadata={
            "help": "module:function of your own that makes more training rows, function(rows, "
            "seed) -> rows, each {text, text_pair (of pairs), label}. They join the task's in "
            "stages that a teacher has a part in; not its fine-tuning, not finetune, no dev rows."
        },
    )
    general_stages: str | None = field(
        default=None,
        metadata={
            "help": "Folder of stages that no task had a part in (GD); shared between runs. "
            "Default: ernie-tiny-general beside output_dir."
        },
    )
    student_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout of the student's layers, in [0, 1); default: the teacher's."},
    )
    arms: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several runs of one recipe: name to changed keys, e.g. {full: {}, no_ged: "
            "{stages: [gd, tad, tsd]}}. Equal beginnings are trained once. The last one is what "
            "push_to_hub pushes."
        },
    )
    use_peft: bool = field(
        default=False,
        metadata={"help": "Refused: a student of this kind has no pretrained base to adapt."},
    )
    overwrite_run: bool = field(
        default=False, metadata={"help": "Delete another recipe's run in output_dir first."}
    )

    def __post_init__(self) -> None:
        for key in ("stage_settings", "arms"):
            setattr(self, key, from_json(key, getattr(self, key)))
            if getattr(self, key) is not None and not isinstance(getattr(self, key), dict):
                raise RecipeError.of(key, getattr(self, key), "must be a mapping")
        self.stages = _stage_list(self.stages)
        self.teachers = check_teachers(from_json("teachers", self.teachers))
        for place, entry in enumerate(self.soft_entries):
            if entry.get("dtype") is not None:
                raise RecipeError.of(
                    f"teachers[{place}].dtype",
                    entry["dtype"],
                    "all teachers here have the one dtype",
                    "--teacher_dtype",
                )
        check_dtype("teacher_dtype", self.teacher_dtype)
        if self.teacher_floor is not None and not -math.inf < self.teacher_floor <= 1:
            raise RecipeError.of(
                "teacher_floor", self.teacher_floor, "must be a number, at most 1 (a perfect score)"
            )
        if self.use_peft:
            raise RecipeError.of(
                "use_peft",
                True,
                "an adapter needs a trained base, and the student is new (or smaller than one); "
                "all its weights are distilled",
                "leave it out",
                "to adapt a large model with soft labels: llmkd salt with use_peft",
            )
        if self.student_dropout is not None and not 0 <= self.student_dropout < 1:
            raise RecipeError.of("student_dropout", self.student_dropout, "must lie in [0, 1)")

    def specs(self) -> list[StageSpec]:
        """The stages, resolved; RecipeError for what cannot be one."""
        arms = [arm for arm in (cast(Any, self.arms) or {}).values() if isinstance(arm, dict)]
        lists = [_stage_list(arm["stages"]) for arm in arms if "stages" in arm]
        elsewhere = {spec.name for stages in lists for spec in read_stages(stages, {})}
        return read_stages(self.stages, cast(Any, self.stage_settings) or {}, elsewhere)

    @property
    def soft_entries(self) -> list[dict[str, Any]]:
        """Entries of `teachers`; none where the stage's own teacher gives the soft labels."""
        return cast(Any, self.teachers) or []

    @property
    def teacher_settings(self) -> dict[str, Any]:
        """Training keys of the fine-tuning."""
        return (cast(Any, self.stage_settings) or {}).get("teacher") or {}

    @property
    def teacher_spec(self) -> StageSpec:
        """The fine-tuning as a stage."""
        return StageSpec("teacher", *PRESETS["finetune"], self.teacher_settings)


def _stage_list(given: Any) -> Any:
    """Stages as YAML gave them, or parsed from JSON or names with commas between."""
    if not isinstance(given, str):
        return given
    listed = given.strip().startswith("[")
    return from_json("stages", given) if listed else given.split(",")


TYPES = (TaskConfig, GeneralText, StudentShape, ErnieTinyConfig, LatentDistillConfig)
# All arms share task, text, teachers and folder; and no arm may carry a token into a recipe.yaml.
ARM_KEYS_FREE = {"stages", "stage_settings", "student_dropout", "seed", "teachers", "label_store"}
ARM_KEYS_FREE.add("augment")
ARM_KEYS_FREE |= {f.name for f in fields(StudentShape)}
ARM_KEYS_FREE |= {
    f.name
    for f in fields(LatentDistillConfig)
    if f.name != "output_dir" and not f.name.startswith(("hub_", "push_"))
}
ARM_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
TAKEN = ("teacher", "shuffled", "stages", "tokenizer")
PATH_KEYS = (
    "task_dataset",
    "task_eval_dataset",
    "dataset",
    "eval_dataset",
    "teacher_model_name_or_path",
    "finetuned_teacher_name_or_path",
    "student_name_or_path",
    "general_stages",
    "label_store",
)


def check_recipe(recipe: Recipe) -> None:
    """Everything that can be refused without reading data or weights; RecipeError, HubError."""
    if not recipe.given.get("output_dir", "unnamed"):
        raise RecipeError.of(
            "output_dir", recipe.given["output_dir"], "names no folder", "--output_dir runs/mine"
        )
    _, general, _, config, training = recipe.build()
    if not config.teacher_model_name_or_path:
        raise TeacherError.of(
            "teacher_model_name_or_path",
            None,
            "no teacher is named",
            "a Hub id or a folder of an encoder, e.g. google-bert/bert-base-uncased",
        )
    for name, changes in (config.arms or {"": {}}).items():
        _check_arm(recipe, name, changes or {})
    check_keys("stage_settings.teacher", config.teacher_settings)
    config.teacher_spec.check_args(recipe, learns=_trains_teacher(recipe, config.arms or {}))
    _check_augment(recipe, config.arms or {})
    if general.streaming:
        for spec in config.specs():
            if spec.data == "general" and spec.args(recipe, "x").max_steps <= 0:
                raise RecipeError.of("max_steps", -1, "a stream has no length", "--max_steps 10000")
    if training.push_to_hub:
        check_hub(training.hub_model_id, training.hub_token)


def _trains_teacher(recipe: Recipe, arms: dict[str, Any]) -> bool:
    """Whether a teacher is fine-tuned here for a stage of some arm."""
    for changes in arms.values() or [{}]:
        config = recipe.build_one(ErnieTinyConfig, **(changes or {}))
        others = config.label_store or config.teachers
        for spec in config.specs():
            asked = "latent" in spec.losses or ("soft" in spec.losses and not others)
            given = spec.teacher == "finetuned" and config.finetuned_teacher_name_or_path
            if spec.teacher in ("finetuned", "shuffled") and asked and not given:
                return True
    return False


def _check_augment(recipe: Recipe, arms: dict[str, Any]) -> None:
    named = {
        (changes or {}).get("augment", recipe.settings["augment"]) for changes in arms.values()
    }
    named = (named if arms else {recipe.settings["augment"]}) - {None}
    for name in sorted(named):
        find_augment(name)
    if len(named) > 1:
        raise RecipeError.of(
            "augment",
            ", ".join(sorted(named)),
            "one function serves a run; an arm has it or leaves it out",
            "arms: {plain: {augment: null}, full: {}}",
        )


def _check_arm(recipe: Recipe, name: str, changes: Any) -> None:
    import difflib

    if not isinstance(changes, dict):
        raise RecipeError.of(f"arms.{name}", changes, "must be a mapping of keys to values")
    if not isinstance(name, str):
        raise RecipeError.of(f"arms.{name}", changes, "is no text", f"in quotes: '{name}'")
    if name and (not ARM_NAME.fullmatch(name) or name in TAKEN or name.startswith("checkpoint-")):
        raise RecipeError.of(f"arms.{name}", changes, "cannot name a folder of the run")
    for key, value in changes.items():
        if key not in ARM_KEYS_FREE:
            near = difflib.get_close_matches(str(key), ARM_KEYS_FREE, n=1)
            raise RecipeError.of(
                f"arms.{name}.{key}",
                "***" if key in SECRETS else value,
                "no such key" if key not in recipe.settings else "is one for all arms",
                *(f"did you mean {match!r}?" for match in near),
            )
    task, _, _, config, _ = recipe.build(**changes)
    for spec in config.specs():
        spec.check(has_task=task.task_dataset is not None)
        spec.check_args(recipe.with_changes(changes))
    own, shared = config.teacher_settings, recipe.build_one(ErnieTinyConfig).teacher_settings
    if own and own != shared:
        raise RecipeError.of(
            f"arms.{name}.stage_settings.teacher", own, "the teacher is one for all arms"
        )
    if config.label_store and config.teachers:
        raise RecipeError.of(
            "label_store",
            config.label_store,
            "and teachers exclude each other",
            "teachers: [{label_store: ...}, ...]",
        )
