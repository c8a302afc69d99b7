"""Recipe keys of `llmkd irepo` beyond prompts, sampling, annotators and loss; what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl import ModelConfig

from llmkd.annotators.config import AnnotatorConfig
from llmkd.data.config import from_json
from llmkd.data.preferences import PreferenceConfig
from llmkd.data.prompts import PromptConfig
from llmkd.errors import LlmkdError, RecipeError
from llmkd.hub import check_hub
from llmkd.labels.pairs import PAIR_CHOICES
from llmkd.methods import salt_config
from llmkd.methods.recipe import Recipe, inner_recipe, named_paths, with_absolute_paths
from llmkd.models.build import DTYPES
from llmkd.models.sample import SamplingConfig
from llmkd.trainers import IrepoConfig

# Keys of an annotator that name files, models in folders, and files that may come to be later.
OLD_PATHS = ("function", "model", "models")
NEW_PATHS = ("file", "to_rate", "cache_dir")
# Keys of an annotator that decide no answer: a run goes on with others.
NOT_ANSWERS = (
    "url timeout retries concurrency max_calls max_tokens_spent api_key_env cache_dir batch_size "
    "to_rate"
).split()
NOT_STARTS = ("output_dir", "overwrite_run", "arms", "push_to_hub", "hub_token")


@dataclass(kw_only=True)
class PolicyConfig(ModelConfig):
    """The policy: TRL's `ModelConfig` (id, revision, dtype, LoRA and quantisation keys)."""

    start: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Instead of model_name_or_path: a recipe of `llmkd salt` that pretrains the "
            "policy first, e.g. {kd_ratio: 0, model_config: {...}, max_steps: 500}."
        },
    )

    def __post_init__(self) -> None:
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        self.start = from_json("start", self.start)
        if self.dtype not in DTYPES:
            raise RecipeError.of("dtype", self.dtype, f"use one of {', '.join(DTYPES)}")


@dataclass(kw_only=True)
class LoopConfig:
    """The loop: iterations, pairs, what is measured."""

    iterations: int = field(
        default=3,
        metadata={
            "help": "How often to sample, annotate and regress. A finished run goes on where more "
            "are asked for, if prompts_per_iteration is set. SPPO's 3; the paper's own count was "
            "not recovered."
        },
    )
    prompts_per_iteration: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of one iteration; no prompt serves two. By default all training "
            "prompts are shared out."
        },
    )
    pairs: str = field(
        default="best_worst",
        metadata={
            "help": "Which pairs of a prompt's responses to regress on: best_worst (the paper's: "
            "highest against lowest mean win probability), all, tournament (highest against lowest "
            "Bradley-Terry strength, with the logit of the strengths)."
        },
    )
    drop_truncated: bool = field(
        default=True,
        metadata={"help": "Leave out responses that max_new_tokens cut off; they are counted."},
    )
    held_out_responses: int = field(
        default=1, metadata={"help": "Responses to each held-out prompt, for win rate and KL."}
    )
    held_out_annotators: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Annotators of the held-out win rate, in the form of `annotators`; by default "
            "the same. Another judge shows what the first one was merely fooled into."
        },
    )
    overwrite_run: bool = field(
        default=False,
        metadata={"help": "Replace another recipe's run that stands in output_dir."},
    )

    def __post_init__(self) -> None:
        self.held_out_annotators = from_json("held_out_annotators", self.held_out_annotators)
        for key in ("iterations", "held_out_responses", "prompts_per_iteration"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise RecipeError.of(key, value, "must be at least 1")
        if self.pairs not in PAIR_CHOICES:
            raise RecipeError.of(
                "pairs", self.pairs, "unknown", f"known: {', '.join(PAIR_CHOICES)}"
            )


TYPES = (
    PromptConfig,
    PolicyConfig,
    SamplingConfig,
    AnnotatorConfig,
    PreferenceConfig,
    LoopConfig,
    IrepoConfig,
)
PATH_KEYS = (
    "model_name_or_path",
    "prompt_dataset",
    "held_out_dataset",
    "preference_dataset",
)


def with_paths(recipe: Recipe) -> Recipe:
    """Local paths made absolute, those of annotators and of `start` too, so that a resume works
    from any folder.
    """
    recipe = with_absolute_paths(recipe, PATH_KEYS)
    changed = {}
    for key in ("annotators", "held_out_annotators"):
        if isinstance(given := from_json(key, recipe.settings[key]), list):
            changed[key] = [_absolute_entry(entry) for entry in given]
    if isinstance(start := from_json("start", recipe.settings["start"]), dict):
        changed["start"] = salt_config.with_absolute_paths(_as_recipe(start)).settings
    given = {k: changed.get(k, v) for k, v in recipe.given.items()}
    return Recipe({**recipe.settings, **changed}, given, recipe.types)


def paths_inside(recipe: Recipe) -> dict[str, str]:
    """Every local path an annotator or `start` names and that is there, by its key."""
    named: dict[str, Any] = {}
    for key in ("annotators", "held_out_annotators"):
        for place, entry in enumerate(recipe.settings[key] or []):
            for name, value in entry.items() if isinstance(entry, dict) else ():
                if name not in _path_keys(entry):
                    continue
                many = isinstance(value, list)
                for number, one in enumerate(value if many else [value]):
                    at = f"{key}[{place}].{name}" + (f"[{number}]" if many else "")
                    file, colon, _ = str(one).partition(".py:")
                    named[at] = f"{file}.py" if colon else file
    start = named_paths(_as_recipe(recipe.settings["start"] or {}), salt_config.PATH_KEYS)
    named |= {f"start.{key}": value for key, value in start.items()}
    return {k: v for k, v in named.items() if isinstance(v, str) and Path(v).expanduser().exists()}


def _as_recipe(start: dict[str, Any]) -> Recipe:
    return Recipe(start, start, salt_config.TYPES)


def _absolute_entry(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    found = {}
    for key, value in entry.items():
        if key not in _path_keys(entry):
            found[key] = value
        elif key in NEW_PATHS and isinstance(value, str) and value:
            found[key] = str(Path(value).expanduser().absolute())
        elif isinstance(value, list):
            found[key] = [_absolute(one) for one in value]
        else:
            found[key] = _absolute(value)
    return found


def _path_keys(entry: dict[str, Any]) -> tuple[str, ...]:
    """The keys of an annotator that may be paths; a server's model is a name of its own."""
    return NEW_PATHS if entry.get("type") == "server" else OLD_PATHS + NEW_PATHS


def answer_settings(entries: Any) -> Any:
    """Annotators as far as they decide answers: without addresses, budgets and patience."""
    if not isinstance(entries, list):
        return entries
    return [
        {k: v for k, v in one.items() if k not in NOT_ANSWERS} if isinstance(one, dict) else one
        for one in entries
    ]


def _absolute(value: Any) -> Any:
    """A path that exists, or one of `file.py:function`, made absolute; else what was given."""
    if not isinstance(value, str) or not value or "\n" in value:
        return value
    file, _, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    if not Path(file).expanduser().exists():
        return value
    whole = str(Path(file).expanduser().absolute())
    return f"{whole}:{function}" if function else whole


def start_recipe(policy: PolicyConfig, output_dir: str) -> Recipe:
    """The SALT recipe under `start`, with a folder of its own."""
    assert isinstance(policy.start, dict)
    for key in NOT_STARTS:
        if key in policy.start:
            raise RecipeError.of(f"start.{key}", policy.start[key], "belongs to the run itself")
    settings = {**policy.start, "output_dir": output_dir}
    return salt_config.with_absolute_paths(inner_recipe(settings, salt_config.TYPES, "start"))


def check_recipe(recipe: Recipe) -> None:
    """Everything that can be refused without reading data or weights; RecipeError, HubError."""
    _, policy, sampling, annotators, offline, loop, training = recipe.build()
    _check_policy(policy)
    given = bool(offline.preference_dataset)
    if given and loop.iterations > 1 and "iterations" in recipe.given:
        raise RecipeError.of(
            "iterations",
            loop.iterations,
            f"a preference file ({offline.preference_dataset}) is regressed on once",
            "leave iterations out",
            "name annotators and prompts instead of preference_dataset",
        )
    if not given and not annotators.annotators:
        raise RecipeError.of(
            "annotators",
            None,
            "nobody says which response is better",
            'annotators: [{type: rule, function: "my_rule.py:score"}]',
            "preference_dataset: FILE regresses on pairs that were judged already",
        )
    if not given and sampling.num_responses < 2:
        raise RecipeError.of(
            "num_responses", sampling.num_responses, "two responses are needed to make a pair"
        )
    if not given and sampling.top_k == 1:
        raise RecipeError.of(
            "top_k", 1, "leaves one token to draw: no two responses differ", "0 is off"
        )
    held_out_annotators(annotators, loop)
    if training.push_to_hub:
        check_hub(training.hub_model_id, training.hub_token)


def _check_policy(policy: PolicyConfig) -> None:
    if bool(policy.start) == bool(policy.model_name_or_path):
        raise RecipeError.of(
            "model_name_or_path",
            policy.model_name_or_path,
            "and start exclude each other" if policy.start else "no policy is named",
            "model_name_or_path: a Hub id or folder of an instruct model",
            "start: {...} pretrains a small one first",
        )
    if policy.start:
        if not isinstance(policy.start, dict):
            raise RecipeError.of("start", policy.start, "must be a mapping, a recipe of llmkd salt")
        try:
            salt_config.check_recipe(start_recipe(policy, "unused"))
        except LlmkdError as error:
            text = str(error)
            raise type(error)(text if text.startswith("start.") else f"start.{text}") from error


def held_out_annotators(annotators: AnnotatorConfig, loop: LoopConfig) -> AnnotatorConfig:
    """The annotators of the held-out win rate: those named for it, or the loop's own."""
    if not loop.held_out_annotators:
        return annotators
    try:
        return replace(annotators, annotators=loop.held_out_annotators)
    except LlmkdError as error:
        raise type(error)(f"held_out_{error}") from error
