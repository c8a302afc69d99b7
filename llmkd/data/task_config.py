"""Recipe keys that say which labelled task is learned."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkd.data.config import STDLIB
from llmkd.errors import RecipeError

AUTO = "auto"
SINGLE, MULTI, REGRESSION, TOKEN = "single_label", "multi_label", "regression", "token"
TASK_TYPES = (AUTO, SINGLE, MULTI, REGRESSION, TOKEN)
DEFAULT_METRICS = {
    SINGLE: "accuracy",
    MULTI: "micro_f1",
    REGRESSION: "pearson",
    TOKEN: "token_accuracy",
}
TASK_METRICS = (*DEFAULT_METRICS.values(), "macro_f1", "f1", "matthews", "spearman")
# [CLS], a token of each text of a pair, [SEP]: nothing shorter can hold a row.
SHORTEST_WINDOW = 4


@dataclass(kw_only=True)
class TaskConfig:
    """Labelled rows, their columns and what is measured on them."""

    task_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Labelled task: Hub id, local file or folder (jsonl, json, parquet, csv, each "
            "also .gz)."
        },
    )
    task_dataset_config: str | None = field(
        default=None,
        metadata={
            "help": "Configuration (subset) of a task on the Hub, e.g. sst2 of nyu-mll/glue."
        },
    )
    task_dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a task on the Hub."}
    )
    task_train_split: str = field(default="train", metadata={"help": "Split the task trains on."})
    task_eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Labelled split the task is scored on; by default `task_eval_fraction` is "
            "split off."
        },
    )
    task_eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Local file or folder, or Hub id, that the task is scored on."},
    )
    task_eval_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of rows held out where no split is named; in (0, 0.5]. Single labels "
            "keep their shares."
        },
    )
    task_split_seed: int = field(
        default=0, metadata={"help": "Seed of the held-out split and of `max_task_eval_examples`."}
    )
    task_text_column: str = field(
        default="text",
        metadata={"help": "Column of the text; for token tasks of the list of words."},
    )
    task_text_pair_column: str | None = field(
        default=None, metadata={"help": "Column of the second text of a pair."}
    )
    task_label_column: str = field(
        default="label",
        metadata={"help": "Column of the label; a list for multi_label and token tasks."},
    )
    task_type: str = field(
        default=AUTO,
        metadata={
            "help": "auto, single_label, multi_label, regression or token; auto reads it from the "
            "columns."
        },
    )
    task_max_length: int = field(
        default=128, metadata={"help": "Longest row of the task in tokens, special ones included."}
    )
    task_truncate: bool = field(
        default=False,
        metadata={"help": "Cut rows longer than task_max_length instead of refusing them."},
    )
    task_examples_per_class: int | None = field(
        default=None,
        metadata={"help": "Keep this many random training rows of each class (single_label)."},
    )
    task_sample_seed: int = field(
        default=0,
        metadata={
            "help": "Seed of the training rows that task_examples_per_class and max_task_examples "
            "keep."
        },
    )
    max_task_examples: int | None = field(
        default=None, metadata={"help": "Keep this many random training rows."}
    )
    max_task_eval_examples: int | None = field(
        default=None, metadata={"help": "Keep this many random held-out rows."}
    )
    task_metric: str | None = field(
        default=None,
        metadata={
            "help": "What the task is scored by: accuracy, macro_f1, f1, matthews, micro_f1, "
            "token_accuracy, pearson or spearman; by default accuracy, or the task type's own."
        },
    )

    def __post_init__(self) -> None:
        if self.task_dataset == STDLIB or self.task_eval_dataset == STDLIB:
            key = "task_dataset" if self.task_dataset == STDLIB else "task_eval_dataset"
            raise RecipeError.of(key, STDLIB, "has no labels", "name a labelled file or Hub id")
        if not 0 < self.task_eval_fraction <= 0.5:
            raise RecipeError.of(
                "task_eval_fraction",
                self.task_eval_fraction,
                "must lie in (0, 0.5]",
                "0.1 is usual",
            )
        for key, known in (("task_type", TASK_TYPES), ("task_metric", TASK_METRICS)):
            value = getattr(self, key)
            if value not in known and (key, value) != ("task_metric", None):
                raise RecipeError.of(key, value, "unknown", f"known: {', '.join(known)}")
        for key, least in (
            ("task_max_length", SHORTEST_WINDOW),
            ("task_examples_per_class", 1),
            ("max_task_examples", 1),
            ("max_task_eval_examples", 1),
        ):
            value = getattr(self, key)
            if value is not None and value < least:
                raise RecipeError.of(key, value, f"must be at least {least}")
        self._check_columns()
        self._check_split()
        if self.task_type != AUTO:
            self.check_type(self.task_type)

    def _check_columns(self) -> None:
        taken: dict[str, str] = {}
        for key in ("task_text_column", "task_text_pair_column", "task_label_column"):
            column = getattr(self, key)
            if column is None:
                continue
            if column in taken:
                raise RecipeError.of(key, column, f"is {taken[column]} already")
            taken[column] = key

    def _check_split(self) -> None:
        if self.task_eval_dataset is None and self.task_eval_split == self.task_train_split:
            raise RecipeError.of(
                "task_eval_split",
                self.task_eval_split,
                "is the split that is trained on",
                "leave it out: task_eval_fraction is split off",
            )

    def check_type(self, kind: str) -> None:
        """RecipeError where a key does not go with the task type `kind`."""
        if self.task_examples_per_class is not None and kind != SINGLE:
            raise RecipeError.of(
                "task_examples_per_class",
                self.task_examples_per_class,
                f"needs a single_label task; this one is {kind}",
                "--max_task_examples keeps a number of rows of any task",
            )
        if self.task_text_pair_column is not None and kind == TOKEN:
            raise RecipeError.of(
                "task_text_pair_column",
                self.task_text_pair_column,
                "a token task has one list of words, no pair",
            )

    def metric(self, kind: str) -> str:
        """What a task of type `kind` is scored by: `task_metric`, or the type's default."""
        return self.task_metric or DEFAULT_METRICS[kind]
