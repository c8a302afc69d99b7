"""From the label a recipe names to level targets; what people said, as a distribution."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkd.data.levels import LevelConfig
from llmkd.data.score_config import ScoreDataConfig
from llmkd.data.score_rows import stds_of
from llmkd.errors import DataError, LlmkdError, RecipeError
from llmkd.labels.score import SCORE_BUILDERS, ScoreBuilder, histogram
from llmkd.labels.score_stats import pool_sigma
from llmkd.objectives.registry import near_names

if TYPE_CHECKING:
    from llmkd.methods.deqa_config import TargetConfig

Rows = Sequence[Mapping[str, Any]]
SCALE_OPTIONS = ("low", "high")  # the scale is a key of the data
UNIFORM = 1e-6


@dataclass
class LevelTarget:
    """A builder of level targets with its options: rows in, [N, L] out, in the levels' order."""

    builder: ScoreBuilder
    options: dict[str, Any]
    values: list[float]
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, target: TargetConfig, levels: LevelConfig) -> LevelTarget:
        """That of a recipe; RecipeError for a label or option there is not."""
        if target.label not in SCORE_BUILDERS:
            ways = near_names(target.label, SCORE_BUILDERS)
            raise RecipeError.of("label", target.label, "there is no such label", *ways)
        builder, options = SCORE_BUILDERS[target.label], dict(target.label_options or {})  # type: ignore[arg-type]
        known = [name for name in builder.options if name not in SCALE_OPTIONS]
        for name in options:
            if name not in known:
                problem = f"{target.label} has no such option"
                way = f"known: {', '.join(known)}" if known else "it has none"
                raise RecipeError.of(f"label_options.{name}", options[name], problem, way)
        return cls(builder, options, list(levels.level_values))  # type: ignore[arg-type]

    def check(self, data: ScoreDataConfig) -> None:
        """RecipeError for options and levels the builder refuses, asked of one made-up row, and for
        a label these data cannot have.
        """
        if self.builder.wants == "ratings" and data.mean_column is not None:
            problem = "needs single ratings, not their mean"
            way = "label: gauss_tilt keeps mean and spread"
            raise RecipeError.of("label", self.builder.name, problem, "ratings_column", way)
        low, high = min(self.values), max(self.values)
        mean, std = low + 0.3 * (high - low), 0.2 * (high - low)
        row = {"mean": mean, "std": std, "ratings": [low, mean, high], "probs": None}
        try:
            self([row])
        except LlmkdError as error:
            raise type(error)(self._with_key(str(error))) from error
        except (TypeError, ValueError, KeyError) as error:
            raise RecipeError.of("label_options", self.options, str(error)) from error
        self.counts = {}

    def _with_key(self, message: str) -> str:
        """A builder's own words with the keys of a recipe."""
        if message.split(":")[0] in self.options:
            return f"label_options.{message}"
        return message.replace("target:", "label:", 1)

    def fitted(self, train: Rows) -> LevelTarget:
        """With what must come from the training rows taken from them: the pooled spread or base."""
        options = dict(self.options)
        if self.builder.name == "pooled_sigma" and options.get("sigma") is None:
            known = [row["std"] for row in train if row["std"] is not None]
            if not known:
                problem = "no training row has a spread to pool"
                way = "label: two_token keeps the mean alone"
                raise DataError.of("label", "pooled_sigma", problem, way)
            options["sigma"] = pool_sigma(known)
        if options.get("base") == "pooled":
            rated = [row for row in train if row["ratings"] is not None]
            if rated:
                shares_NL = histogram([row["ratings"] for row in rated], self.values).probs_NL
                options["base"] = shares_NL.mean(0).tolist()
        return LevelTarget(self.builder, options, self.values)

    def __call__(self, rows: Rows) -> np.ndarray:
        """[N, L]; adds to `counts`. Rows given as probabilities are their own histogram."""
        if self.builder.wants == "ratings":
            if all(row["probs"] is not None for row in rows):
                return np.array([row["probs"] for row in rows])
            made = self.builder.function(
                [row["ratings"] for row in rows], self.values, **self.options
            )
        else:
            given: list[Any] = [np.array([row["mean"] for row in rows], dtype=np.float64)]
            if self.builder.wants == "std":
                given.append(stds_of(rows))
            made = self.builder.function(*given, self.values, **self.options)
        for name, count in made.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        if self.builder.name == "gauss_deqa":
            even = int((np.ptp(made.probs_NL, axis=1) < UNIFORM).sum())
            self.counts["uniform"] = self.counts.get("uniform", 0) + even
        return made.probs_NL

    @property
    def words(self) -> str:
        """The label with its options, as a call."""
        defaults = inspect.signature(self.builder.function).parameters
        shown = [
            f"{name}={value!r}"
            for name, value in self.options.items()
            if name in defaults and value != defaults[name].default
        ]
        return f"{self.builder.name}({', '.join(shown)})" if shown else self.builder.name


def people(rows: Rows, values: Sequence[float]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What people said of rows beyond the mean: stds [N] and distributions [N, L], each None where
    it is not known of every row.
    """
    stds = [row["std"] for row in rows]
    std_N = None if None in stds or not rows else np.array(stds, dtype=np.float64)
    if rows and all(row["probs"] is not None for row in rows):
        return std_N, np.array([row["probs"] for row in rows])
    if rows and all(row["ratings"] is not None for row in rows):
        return std_N, histogram([row["ratings"] for row in rows], values).probs_NL
    return std_N, None
