"""Recipe keys that say who compares the responses, and the one table of kinds of annotators."""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from llmkd.annotators.base import Annotator
from llmkd.data.config import from_json
from llmkd.errors import LlmkdError, RecipeError

COMBINE = ("average", "votes", "tournament")


@dataclass(frozen=True)
class Kind:
    """A `type` of annotator: where its class is, and a line on what it asks."""

    module: str
    name: str
    about: str

    def load(self) -> type:
        """The class; imported only when a recipe names it."""
        return getattr(import_module(self.module), self.name)


# To add a type, add a line. The keys of its mapping in a recipe are its constructor's arguments;
# `seed`, `folder` and `batch_size` are filled in where the constructor takes them.
KINDS = {
    "rule": Kind("llmkd.annotators.rule", "RuleAnnotator", "a Python function of your own"),
    "reward": Kind("llmkd.annotators.reward", "RewardAnnotator", "sequence classifiers"),
    "judge": Kind("llmkd.annotators.judge", "JudgeAnnotator", "a causal LM on this machine"),
    "server": Kind("llmkd.annotators.server", "ServerAnnotator", "a model behind a server"),
    "human": Kind("llmkd.annotators.human", "HumanAnnotator", "a file that people filled in"),
    "score": Kind("llmkd.annotators.score", "ScoreAnnotator", "a scorer trained by llmkd deqa"),
}
EXAMPLE = 'annotators: [{type: rule, function: "my_rules.py:score"}]'


@dataclass(kw_only=True)
class AnnotatorConfig:
    """Who says which response is better, and what is made of several answers."""

    annotators: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "A list of mappings, each with a type and that type's keys: {type: rule, "
            "function: file.py:name}, {type: reward, models: [...]}, {type: judge, model: ...}, "
            "{type: server, url: ..., model: ...}, {type: human, file: rated.jsonl}. `name` is "
            "what reports call it."
        },
    )
    combine: str = field(
        default="average",
        metadata={
            "help": "Several annotators: average (of logits), votes (each answer one vote, Haldane "
            "1/2) or tournament (Bradley-Terry strengths fitted to the votes)."
        },
    )
    # Not flip_rate and max_logit: those are keys of the trainer's losses, in the same recipe.
    annotator_flip_rate: float = field(
        default=0.0,
        metadata={
            "help": "Share of answers that are known to be flipped, in [0, 0.5): p becomes "
            "(p - f) / (1 - 2 f) before its logit is taken."
        },
    )
    logit_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divides the combined logits; above 0. `llmkd judge` fits it on rated pairs."
        },
    )
    annotator_max_logit: float | None = field(
        default=None, metadata={"help": "Clamp combined logits to this size in nats; above 0."}
    )
    annotation_batch_size: int = field(
        default=16, metadata={"help": "Texts of one forward pass of a reward model or judge."}
    )

    def __post_init__(self) -> None:
        self.annotators = _entries(from_json("annotators", self.annotators))
        if self.combine not in COMBINE:
            raise RecipeError.of("combine", self.combine, "unknown", f"known: {', '.join(COMBINE)}")
        if not 0 <= self.flip_rate < 0.5:
            problem = "must lie in [0, 0.5): at 0.5 answers say nothing"
            raise RecipeError.of("annotator_flip_rate", self.flip_rate, problem)
        if not 0 < self.logit_temperature < math.inf:
            raise RecipeError.of("logit_temperature", self.logit_temperature, "must be above 0")
        if self.max_logit is not None and not 0 < self.max_logit < math.inf:
            raise RecipeError.of("annotator_max_logit", self.max_logit, "must be above 0")
        if self.annotation_batch_size < 1:
            raise RecipeError.of(
                "annotation_batch_size", self.annotation_batch_size, "must be at least 1"
            )

    @property
    def flip_rate(self) -> float:
        """`annotator_flip_rate`, as `labels.pairs.combine` calls it."""
        return self.annotator_flip_rate

    @property
    def max_logit(self) -> float | None:
        """`annotator_max_logit`, as `labels.pairs.combine` calls it."""
        return self.annotator_max_logit

    @property
    def annotator_entries(self) -> list[dict[str, Any]]:
        """The mappings of `annotators`; empty where none is named."""
        return list(self.annotators or [])  # type: ignore[arg-type]


def _entries(given: Any) -> list[dict[str, Any]] | None:
    """`annotators` as a list of mappings whose type and keys are known; RecipeError otherwise."""
    if given is None:
        return None
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list) or not given:
        raise RecipeError.of("annotators", given, "must be a list of mappings", EXAMPLE)
    for place, entry in enumerate(given):
        _check_entry(f"annotators[{place}]", entry)
    return given


def _check_entry(at: str, entry: Any) -> None:
    if not isinstance(entry, dict) or "type" not in entry:
        raise RecipeError.of(at, entry, "must be a mapping with a type", EXAMPLE)
    kind = KINDS.get(entry["type"]) if isinstance(entry["type"], str) else None
    if kind is None:
        known = [f"{name}: {kind.about}" for name, kind in KINDS.items()]
        raise RecipeError.of(
            f"{at}.type", entry["type"], "unknown", *_near(str(entry["type"]), KINDS), *known
        )
    known = _keys(kind)
    for key in entry:
        if key not in known and key not in ("type", "name"):
            shown = [name for name in known if name not in FILLED_IN]
            raise RecipeError.of(
                f"{at}.{key}",
                entry[key],
                f"a {entry['type']} annotator has no such key",
                *_near(str(key), known),
                f"known: {', '.join(shown)}",
            )
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in (*entry, *FILLED_IN):
            raise RecipeError.of(
                f"{at}.{key}", None, f"a {entry['type']} annotator needs it", EXAMPLE
            )


FILLED_IN = ("seed", "folder")


def _keys(kind: Kind) -> dict[str, inspect.Parameter]:
    """Arguments of a kind's constructor, by name."""
    known = dict(inspect.signature(kind.load()).parameters)
    return {key: p for key, p in known.items() if p.kind is not p.VAR_KEYWORD}


def _near(key: str, known: Any) -> list[str]:
    return [f"did you mean {near!r}?" for near in difflib.get_close_matches(key, [*known], n=1)]


def make_annotators(config: AnnotatorConfig, *, seed: int, folder: str | Path) -> list[Annotator]:
    """The annotators of a recipe, not loaded yet; their names differ.

    `seed` goes to those that draw, `folder` (of the run) to those that keep files of their own.
    RecipeError for none at all, for two of one name and for what the constructors refuse, with the
    place in the list.
    """
    if not config.annotator_entries:
        raise RecipeError.of("annotators", None, "nobody compares the responses", EXAMPLE)
    defaults = {"seed": seed, "folder": folder, "batch_size": config.annotation_batch_size}
    made: list[Annotator] = []
    for place, entry in enumerate(config.annotator_entries):
        at = f"annotators[{place}]"
        known = _keys(KINDS[entry["type"]])
        given = {key: value for key, value in defaults.items() if key in known}
        given |= {key: value for key, value in entry.items() if key in known}
        try:
            annotator = KINDS[entry["type"]].load()(**given)
        except LlmkdError as error:
            raise type(error)(f"{at}: {error}") from error
        except (TypeError, ValueError) as error:
            raise RecipeError.of(at, entry, str(error)) from error
        if "name" in entry:
            annotator.name = str(entry["name"])
        if annotator.name in {other.name for other in made}:
            raise RecipeError.of(
                f"{at}.name", annotator.name, "is another annotator's too", "name: something_else"
            )
        made.append(annotator)
    return made
