"""The splits of a labelled task as they are read: columns, task type, texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from datasets import ClassLabel, Dataset

from llmkd.data.sources import read_table
from llmkd.data.task_config import AUTO, MULTI, REGRESSION, SINGLE, TOKEN, TaskConfig
from llmkd.errors import DataError, LlmkdError, RecipeError

COLUMNS = {
    "text": "task_text_column",
    "pair": "task_text_pair_column",
    "label": "task_label_column",
}


@dataclass(frozen=True)
class Table:
    """One split: `rows` with `text`, `label` and, of pairs, `pair`; and the recipe key that
    names the split, with its value.
    """

    rows: Dataset
    key: str
    value: str

    def refuse(self, config: TaskConfig, column: str, problem: str, *ways: str) -> LlmkdError:
        """The DataError about `column` (text, pair or label) of this split."""
        key = COLUMNS[column]
        return DataError.of(key, getattr(config, key), f"{self.value}: {problem}", *ways)

    @property
    def many_labels(self) -> bool:
        """Whether each row has a list of labels."""
        return element(self.rows.features["label"]) is not None

    @property
    def words(self) -> bool:
        """Whether each row has a list of words instead of a text."""
        return element(self.rows.features["text"]) is not None


def element(feature: Any) -> Any:
    """What a list column holds; None for a column of single values."""
    return getattr(feature, "feature", None)


def read_tables(config: TaskConfig) -> tuple[Table, Table | None]:
    """The training split and, where one is named, the split that is held out.

    Raises MissingFileError for a path that leads nowhere, DataError for what cannot be read, for a
    missing column and for a split without rows.
    """
    if config.task_dataset is None:
        raise RecipeError.of("task_dataset", None, "no task is named", "--task_dataset FILE or ID")
    train = _read(config, config.task_dataset, config.task_train_split, "task_train_split")
    if config.task_eval_dataset is not None:
        split = config.task_eval_split or "train"
        return train, _read(config, config.task_eval_dataset, split, "task_eval_dataset")
    if config.task_eval_split is not None:
        return train, _read(config, config.task_dataset, config.task_eval_split, "task_eval_split")
    return train, None


def _read(config: TaskConfig, name: str, split: str, key: str) -> Table:
    own = name == config.task_dataset  # a revision is one repository's
    rows = read_table(
        name,
        split,
        subset=config.task_dataset_config,
        revision=config.task_dataset_revision if own else None,
        key="task_eval_dataset" if key == "task_eval_dataset" else "task_dataset",
        split_key="task_train_split" if key == "task_train_split" else "task_eval_split",
    )
    assert isinstance(rows, Dataset)
    value = name if key == "task_eval_dataset" else split
    if not len(rows):
        raise DataError.of(key, value, f"{name} has no rows")
    names: dict[str, str] = {}
    for column, its_key in COLUMNS.items():
        wanted = getattr(config, its_key)
        if wanted is None:
            continue
        if wanted not in rows.column_names:
            raise DataError.of(
                its_key,
                wanted,
                f"{name} ({split}) has no such column; it has {', '.join(rows.column_names)}",
                *(f"--{its_key} {other}" for other in rows.column_names[:4]),
            )
        names[wanted] = column
    return Table(rows.select_columns(list(names)).rename_columns(names), key, value)


def find_kind(config: TaskConfig, table: Table) -> str:
    """The task type: what the recipe says, if the columns agree, or what the columns say.

    Raises DataError where the columns are no task, or not the task the recipe names.
    """
    kind = config.task_type
    if kind == AUTO:
        if table.many_labels:
            kind = TOKEN if table.words else MULTI
        else:
            kind = REGRESSION if _dtype(table, "label").startswith("float") else SINGLE
    check_kind(config, table, kind)
    return kind


def check_kind(config: TaskConfig, table: Table, kind: str) -> None:
    """DataError where the columns of `table` cannot be those of a task of type `kind`."""
    for column in table.rows.column_names:
        if column == "label":
            continue
        listed = element(table.rows.features[column]) is not None
        if listed and kind != TOKEN:
            raise table.refuse(
                config, column, f"holds lists; a {kind} task has one text in each row"
            )
        if not listed and kind == TOKEN:
            raise table.refuse(config, column, "holds no list of words, as a token task needs")
        if (dtype := _dtype(table, column)) not in ("string", "large_string"):
            raise table.refuse(config, column, f"holds {dtype}, not text")
    many = kind in (MULTI, TOKEN)
    if table.many_labels != many:
        held, needed = ("a list", "one label") if table.many_labels else ("one label", "a list")
        raise table.refuse(
            config,
            "label",
            f"holds {held} in each row; a {kind} task needs {needed}",
            "--task_type auto goes by the columns",
        )
    dtype = _dtype(table, "label")
    if dtype == "null":
        raise table.refuse(config, "label", "every row is without a label")
    text = dtype in ("string", "large_string")
    if not text and not dtype.startswith(("int", "uint", "float", "bool")):
        raise table.refuse(config, "label", f"holds {dtype}; labels are text or numbers")
    if text and kind == REGRESSION:
        raise table.refuse(config, "label", "holds text; a regression task needs numbers")


def _dtype(table: Table, column: str) -> str:
    feature = table.rows.features[column]
    return str(getattr(element(feature) or feature, "dtype", type(feature).__name__))


def class_names(table: Table) -> list[str] | None:
    """The names a ClassLabel column declares; None for any other."""
    feature = table.rows.features["label"]
    inner = element(feature) or feature
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def check_texts(config: TaskConfig, table: Table) -> None:
    """DataError that names the first row without text."""
    columns = [column for column in table.rows.column_names if column != "label"]
    for column in columns:
        for row, value in enumerate(values(table.rows, column)):
            if table.words:
                if not value:
                    raise table.refuse(config, column, f"row {row} has no words")
                if None in value:
                    raise table.refuse(config, column, f"row {row} has a word that is None")
            elif value is None or not value.strip():
                raise table.refuse(
                    config, column, f"row {row} has no text ({value!r})", "remove such rows"
                )


def values(rows: Dataset, column: str):
    """The values of one column, read in batches of 1,000."""
    for batch in rows.select_columns([column]).iter(1000):
        yield from cast(Any, batch)[column]
