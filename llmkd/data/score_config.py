"""Recipe keys that say what is rated, by whom, and on which scale."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from llmkd.data.config import from_json
from llmkd.errors import RecipeError

HOLE = re.compile(r"\{(\w+)\}")
LABELS = ("ratings_column", "mean_column", "probs_column", "logits_column")
INPUTS = ("text_column", "text_pair_column", "text_template", "messages_column", "image_column")


@dataclass(kw_only=True)
class ScoreDataConfig:
    """Rated rows: inputs, ratings, their scale, and how they are split."""

    score_dataset: str | None = field(
        default=None,
        metadata={"help": "Rated rows: Hub id, local file or folder (jsonl, json, csv, parquet)."},
    )
    score_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration (subset) of score_dataset on the Hub."}
    )
    score_dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of score_dataset on the Hub."}
    )
    score_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    score_eval_split: str | None = field(
        default=None,
        metadata={"help": "Split held out; by default `eval_fraction` is split off."},
    )
    score_eval_dataset: str | None = field(
        default=None, metadata={"help": "File, folder or Hub id of rated rows that is held out."}
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column of the text; `text` where no other input is named."},
    )
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column of the second text of a pair."}
    )
    text_template: str | None = field(
        default=None,
        metadata={
            "help": "What the model reads, with columns in braces: 'Text: {text}'. {text} and "
            "{text_pair} also stand for text_column and text_pair_column."
        },
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Column of chat messages ({role, content}) to rate."}
    )
    image_column: str | None = field(
        default=None,
        metadata={"help": "Column of an image or a list of them: paths, bytes or Image features."},
    )
    image_root: str | None = field(
        default=None,
        metadata={"help": "Folder that relative image paths start at; default: the file's own."},
    )
    ratings_column: str | None = field(
        default=None, metadata={"help": "Column of a list: what each rater said."}
    )
    mean_column: str | None = field(default=None, metadata={"help": "Column of the mean rating."})
    std_column: str | None = field(
        default=None, metadata={"help": "Column of the ratings' standard deviation."}
    )
    n_column: str | None = field(default=None, metadata={"help": "Column of the rater count."})
    probs_column: str | None = field(
        default=None, metadata={"help": "Column of one probability a level, in the levels' order."}
    )
    logits_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of a judge's level logits, in the levels' order; a list of several is "
            "averaged in probability."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column of what makes rows comparable: pairs stay inside a group."},
    )
    score_low: float | None = field(
        default=None,
        metadata={
            "help": "The raters' lowest score, which becomes the lowest level; default: the "
            "lowest of the training rows."
        },
    )
    score_high: float | None = field(
        default=None, metadata={"help": "The raters' highest score; default as for score_low."}
    )
    score_scales: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Scales of groups: {tweets: [-4, 4], reviews: [1, 10]}."},
    )
    scale_per_group: bool = field(
        default=False, metadata={"help": "Read an own scale off the training rows of each group."}
    )
    std_ddof: int = field(
        default=1, metadata={"help": "Std of ratings: 1 (sample; unbiased variance) or 0."}
    )
    raters_kept: int | None = field(
        default=None,
        metadata={"help": "Keep this many random ratings of each training row; others keep all."},
    )
    raters_seed: int = field(default=0, metadata={"help": "Seed of raters_kept."})
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Keep this many random training rows."}
    )
    eval_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of inputs held out where no split is named; in (0, 0.5]."},
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the training inputs set aside to tune on; in [0, 0.5]."},
    )
    split_seed: int = field(
        default=0, metadata={"help": "Seed of the splits and of max_train_rows."}
    )

    def __post_init__(self) -> None:
        self.score_scales = from_json("score_scales", self.score_scales)
        if not 0 < self.eval_fraction <= 0.5:
            problem = "must lie in (0, 0.5]"
            raise RecipeError.of("eval_fraction", self.eval_fraction, problem, "0.1 is usual")
        if not 0 <= self.validation_fraction <= 0.5:
            problem = "must lie in [0, 0.5]"
            raise RecipeError.of("validation_fraction", self.validation_fraction, problem)
        if self.std_ddof not in (0, 1):
            raise RecipeError.of("std_ddof", self.std_ddof, "must be 0 or 1", "default: 1")
        for key in ("raters_kept", "max_train_rows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise RecipeError.of(key, value, "must be at least 1")
        if self.score_eval_dataset is None and self.score_eval_split == self.score_train_split:
            problem = "is the split that is trained on"
            way = "leave it out: eval_fraction is split off"
            raise RecipeError.of("score_eval_split", self.score_eval_split, problem, way)
        if self.score_dataset is not None:
            self._check_labels()
        self._check_inputs()
        self._check_scale()

    def _check_labels(self) -> None:
        named = [key for key in LABELS if getattr(self, key) is not None]
        if len(named) != 1:
            given = {key: getattr(self, key) for key in named} or None
            problem = "name one of them" if named else "the rows have no ratings"
            ways = ("ratings_column: ratings", "mean_column: mos and std_column: std")
            raise RecipeError.of(" | ".join(LABELS), given, problem, *ways)
        for key in ("std_column", "n_column"):
            if getattr(self, key) is not None and self.mean_column is None:
                problem = f"goes with mean_column, not with {named[0]}"
                raise RecipeError.of(key, getattr(self, key), problem, "leave it out")
        if self.raters_kept is not None and self.ratings_column is None:
            problem = f"needs single ratings, not {named[0]}"
            raise RecipeError.of("raters_kept", self.raters_kept, problem, "ratings_column")

    def _check_inputs(self) -> None:
        if self.messages_column is not None:
            for key in ("text_column", "text_pair_column", "text_template", "image_column"):
                if getattr(self, key) is not None:
                    problem = "stands beside messages_column, which is the whole input"
                    raise RecipeError.of(key, getattr(self, key), problem, "leave one of them out")
        if self.text_template is not None and not HOLE.search(self.text_template):
            problem = "has no column in braces"
            raise RecipeError.of("text_template", self.text_template, problem, '"Text: {text}"')

    def _check_scale(self) -> None:
        known = (self.score_low is not None, self.score_high is not None)
        if known[0] != known[1]:
            key = "score_high" if known[0] else "score_low"
            raise RecipeError.of(key, None, "a scale has two ends", f"{key}: give it as well")
        if any(known):
            check_ends("score_low, score_high", [self.score_low, self.score_high])
        if self.score_scales is not None and not isinstance(self.score_scales, dict):
            problem = "must map groups to [low, high]"
            raise RecipeError.of("score_scales", self.score_scales, problem)
        for group, ends in self.scales.items():
            check_ends(f"score_scales.{group}", ends)
        per_group = self.scale_per_group or bool(self.scales)
        key = "scale_per_group" if self.scale_per_group else "score_scales"
        if per_group and self.group_column is None:
            raise RecipeError.of(key, getattr(self, key), "needs group_column")
        if self.scale_per_group and any(known):
            problem = "stands beside score_low, the scale of all groups"
            raise RecipeError.of(key, True, problem, "leave one of them out")

    @property
    def scales(self) -> dict[str, list[float]]:
        """`score_scales`, with groups as text; empty where none is named."""
        return {str(key): ends for key, ends in dict(self.score_scales or {}).items()}  # type: ignore[arg-type]

    @property
    def labelled(self) -> bool:
        """Whether a column of ratings is named."""
        return any(getattr(self, key) is not None for key in LABELS)

    @property
    def label_column(self) -> str:
        """The key of the column that ratings come from."""
        return next(key for key in LABELS if getattr(self, key) is not None)

    @property
    def source(self) -> str:
        """The dataset's name, with its configuration."""
        tail = f"/{self.score_dataset_config}" if self.score_dataset_config else ""
        return f"{self.score_dataset}{tail}"


@dataclass(kw_only=True)
class ScoreInputConfig(ScoreDataConfig):
    """Rows to score, which people may have rated or not."""

    def _check_labels(self) -> None:
        if self.labelled:
            super()._check_labels()


def check_ends(key: str, ends: Any) -> None:
    """RecipeError unless `ends` are two finite numbers, the lower first."""
    pair = isinstance(ends, list | tuple) and len(ends) == 2
    good = pair and all(isinstance(e, int | float) and math.isfinite(e) for e in ends)
    if not good or not ends[0] < ends[1]:
        problem = "is no scale to rate on: two numbers, the lower first"
        raise RecipeError.of(key, ends, problem, "[1, 5]")
