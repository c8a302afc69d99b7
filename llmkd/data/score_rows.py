"""Rated rows from what a recipe names: inputs, ratings on the scale of the levels, splits.

A row is a mapping: `row` (its number in its table), `text` (or None), `messages` (or None),
`images` (a list or None), `group` (text or None), and on the levels' scale `mean`, `std` (None
where nobody knows), `n`, `ratings`, `probs`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image

from llmkd.data.score_config import HOLE, ScoreDataConfig
from llmkd.data.score_images import as_images, check_images, image_key
from llmkd.data.score_labels import (
    Reader,
    Said,
    Scale,
    Tally,
    find_scales,
    keep_raters,
    on_levels,
)
from llmkd.data.sources import read_table
from llmkd.data.task import same_text
from llmkd.data.task_split import some
from llmkd.errors import DataError, LlmkdError, RecipeError
from llmkd.files import digest

Row = dict[str, Any]
Say = Callable[[str], None]
INPUT_KEYS = ("text", "messages", "images")


@dataclass(frozen=True)
class ScoreRows:
    """Rows to train on, held-out ones and, where asked for, ones to tune on.

    `scales` has the raters' scale of each group (None: of rows without one; none at all for
    probabilities). `counts` may hold `clipped`, `one_rater`, `all_agree` (several raters, std 0),
    `no_std`, `fewer_raters` (than raters_kept), `left_out` (training rows beyond max_train_rows)
    and `held_out_in_train` (held-out inputs that are trained on too).
    """

    train: list[Row]
    held_out: list[Row]
    validation: list[Row]
    scales: dict[str | None, Scale]
    counts: dict[str, int]
    fingerprint: str


@dataclass(frozen=True)
class _Raw:
    row: int
    inputs: dict[str, Any]
    group: str | None
    said: Said
    reader: Reader

    @property
    def key(self) -> str:
        return input_key(self.inputs)


def load_score_rows(config: ScoreDataConfig, say: Say, *, values: Sequence[float]) -> ScoreRows:
    """Read, check, split and rescale the rows a recipe names; `values` are those of the levels, in
    the levels' order.

    The lowest of `values` is the lower end of the raters' scale, the highest the upper end,
    whatever their order. Inputs that occur several times fall into one split. Raises
    MissingFileError for a path that leads nowhere, DataError naming row and column for what is no
    input, rating or image, RecipeError for a scale without extent.
    """
    if config.score_dataset is None:
        way = "--score_dataset FILE or ID"
        raise RecipeError.of("score_dataset", None, "no rated rows are named", way)
    tally = Tally()
    train = _read(config, "score_dataset", len(values))
    if config.score_eval_dataset is not None or config.score_eval_split is not None:
        key = "score_eval_dataset" if config.score_eval_dataset is not None else "score_eval_split"
        held_out = _read(config, key, len(values))
    else:
        train, held_out = _split(train, config.eval_fraction, [config.split_seed, 0])
    validation: list[_Raw] = []
    if config.validation_fraction:
        train, validation = _split(train, config.validation_fraction, [config.split_seed, 1])
    train = _fewer(train, config, tally)
    _report_shared(train, held_out, tally, say)
    parts = (train, held_out, validation)
    groups = {raw.group for part in parts for raw in part if raw.said.probs is None}
    scales = find_scales(config, [(raw.group, raw.said) for raw in train], groups)
    _check_all_images([raw for part in parts for raw in part], config, say)
    made = [[_row(raw, scales, values, config, tally) for raw in part] for part in parts]
    print_ = digest([[_stable(row) for row in part] for part in made])
    found = ScoreRows(made[0], made[1], made[2], scales, tally.counts, print_)
    _report(found, config, say)
    return found


def load_rows_to_score(
    config: ScoreDataConfig, say: Say, *, values: Sequence[float]
) -> tuple[list[Row], dict[str, int]]:
    """All rows of `score_dataset` in order, and counts as in `ScoreRows`. Where the config names no
    label (see `ScoreInputConfig`), `mean` and all of it is None; where it does, its scale must be
    known, since nothing is read off the rows one is measured on. Errors as in `load_score_rows`.
    """
    tally = Tally()
    raws = _read(config, "score_dataset", len(values))
    _check_all_images(raws, config, say)
    if not config.labelled:
        none = dict.fromkeys(("mean", "std", "n", "ratings", "probs"))
        return [{"row": raw.row, **raw.inputs, "group": raw.group, **none} for raw in raws], {}
    groups = {raw.group for raw in raws if raw.said.probs is None}
    scales = find_scales(config, [], groups)
    return [_row(raw, scales, values, config, tally) for raw in raws], tally.counts


def stds_of(rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """[N] standard deviations on the levels' scale, 0 for rows without one (builders then keep the
    mean alone); None where no row has one.
    """
    if all(row["std"] is None for row in rows):
        return None
    return np.array([row["std"] or 0.0 for row in rows], dtype=np.float64)


def input_key(row: Mapping[str, Any]) -> str:
    """Hash that rows share whose inputs are the same but for case and white space."""
    messages = row.get("messages")
    said = messages and [[turn["role"], same_text(turn["content"])] for turn in messages]
    text = row.get("text")
    images = [image_key(image) for image in row.get("images") or []]
    return digest([text and same_text(text), said, images])


def _read(config: ScoreDataConfig, key: str, levels: int) -> list[_Raw]:
    train = key == "score_dataset"
    name = config.score_dataset if key != "score_eval_dataset" else config.score_eval_dataset
    assert name is not None
    split = config.score_train_split if train else config.score_eval_split or "train"
    table = read_table(
        name,
        split,
        subset=config.score_dataset_config,
        revision=config.score_dataset_revision if name == config.score_dataset else None,
        key="score_eval_dataset" if key == "score_eval_dataset" else "score_dataset",
        split_key="score_train_split" if train else "score_eval_split",
    )
    assert isinstance(table, Dataset)
    if not len(table):
        raise DataError.of(key, name, "has no rows")
    columns = _columns(config)
    for column, its_key in columns.items():
        if column not in table.column_names:
            where = f"{name} ({split})" if key != "score_eval_dataset" else f"{name} ({key})"
            problem = f"{where} has no such column; it has {', '.join(table.column_names)}"
            near = difflib.get_close_matches(column, table.column_names, n=1)
            raise DataError.of(its_key, column, problem, *(f"did you mean {n!r}?" for n in near))
    table = _undecoded(table.select_columns(list(columns)), config)
    reader = Reader(config, levels, key, name)
    place = Path(name).expanduser()
    own = [place if place.is_dir() else place.parent] if place.exists() else []
    roots = [Path(config.image_root).expanduser()] if config.image_root else [*own, Path.cwd()]
    inputs = _Inputs(config, reader, roots)
    found = []
    for number, row in enumerate(table):
        assert isinstance(row, dict)
        group = None if config.group_column is None else row[config.group_column]
        group = None if group is None else str(group)
        found.append(_Raw(number, inputs(number, row), group, reader(number, row), reader))
    return found


def _columns(config: ScoreDataConfig) -> dict[str, str]:
    """The columns that are needed, and the key that names each."""
    keys = "text_column text_pair_column messages_column image_column ratings_column mean_column"
    keys += " std_column n_column probs_column logits_column group_column"
    named = {getattr(config, key): key for key in keys.split()}
    named.pop(None, None)
    own = {"text": text_column(config), "text_pair": config.text_pair_column}
    for hole in HOLE.findall(config.text_template or ""):
        named.setdefault(own.get(hole) or hole, "text_template")
    if text_column(config) == "text" and config.text_template is None:
        named.setdefault("text", "text_column")
    return named


def text_column(config: ScoreDataConfig) -> str | None:
    """Column of the text: named, or `text` where no other input is."""
    given = (config.text_column, config.messages_column, config.image_column, config.text_template)
    return "text" if given == (None, None, None, None) else config.text_column


def _undecoded(table: Dataset, config: ScoreDataConfig) -> Dataset:
    """Image features as bytes and paths: decoded, thousands would not fit in memory."""
    column = config.image_column
    if column is None:
        return table
    feature: Any = table.features[column]
    inner = getattr(feature, "feature", None)
    if isinstance(feature, Image):
        return table.cast_column(column, Image(decode=False))
    if isinstance(inner, Image):
        return table.cast_column(column, type(feature)(Image(decode=False)))
    return table


class _Inputs:
    """The input of a row: `text`, `messages` and `images`, each or None."""

    def __init__(self, config: ScoreDataConfig, reader: Reader, roots: list[Path]) -> None:
        self.config, self.reader, self.roots = config, reader, roots
        self.own = {"text": text_column(config), "text_pair": config.text_pair_column}

    def __call__(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config
        found: dict[str, Any] = dict.fromkeys(INPUT_KEYS)
        if config.text_template is not None:
            found["text"] = HOLE.sub(
                lambda hole: self._text(number, self.own.get(hole[1]) or hole[1], row),
                config.text_template,
            )
        elif self.own["text"] is not None or self.own["text_pair"] is not None:
            columns = [column for column in self.own.values() if column is not None]
            found["text"] = "\n\n".join(self._text(number, column, row) for column in columns)
        if (column := config.messages_column) is not None:
            found["messages"] = self._messages(number, column, row[column])
        if (column := config.image_column) is not None:

            def refuse(value: Any, problem: str, *ways: str) -> LlmkdError:
                return self.reader.refuse(number, column, value, problem, *ways)

            found["images"] = as_images(row[column], self.roots, refuse)
        return found

    def _text(self, number: int, column: str, row: Mapping[str, Any]) -> str:
        value = row[column]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{value}"
        if not isinstance(value, str) or not value.strip():
            raise self.reader.refuse(number, column, value, "has no text", "drop the row")
        return value

    def _messages(self, number: int, column: str, value: Any) -> list[dict[str, str]]:
        turns = value if isinstance(value, list) else []
        for turn in turns:
            said = [turn.get(k) if isinstance(turn, dict) else None for k in ("role", "content")]
            if not all(isinstance(part, str) for part in said):
                turns = []
                break
        if not turns or not any(turn["content"].strip() for turn in turns):
            problem = "is no chat: a list of {role, content}"
            raise self.reader.refuse(number, column, value, problem)
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _split(raws: list[_Raw], fraction: float, seed: list[int]) -> tuple[list[_Raw], list[_Raw]]:
    """`fraction` of the different inputs, with all their rows, behind the others."""
    keys = list(dict.fromkeys(raw.key for raw in raws))
    if len(keys) < 2:
        problem = f"{len(keys)} different input(s); at least 2 are needed to hold one out"
        raise DataError.of("score_dataset", len(raws), problem, "score_eval_dataset: FILE")
    count = min(max(1, round(len(keys) * fraction)), len(keys) - 1)
    order = np.random.default_rng(seed).permutation(len(keys))[:count].tolist()
    out = {keys[place] for place in order}
    return [r for r in raws if r.key not in out], [r for r in raws if r.key in out]


def _fewer(train: list[_Raw], config: ScoreDataConfig, tally: Tally) -> list[_Raw]:
    kept = [train[p] for p in some(len(train), config.max_train_rows, config.split_seed)]
    if len(kept) < len(train):
        tally.add("left_out", len(train) - len(kept))
    if (most := config.raters_kept) is None:
        return kept
    for raw in kept:
        if raw.said.ratings is not None and len(raw.said.ratings) < most:
            tally.add("fewer_raters")
    seed = config.raters_seed
    return [replace(raw, said=keep_raters(raw.said, most, seed, raw.row)) for raw in kept]


def _report_shared(train: list[_Raw], held_out: list[_Raw], tally: Tally, say: Say) -> None:
    known = {raw.key for raw in train}
    shared = [raw.row for raw in held_out if raw.key in known]
    if shared:
        tally.add("held_out_in_train", len(shared))
        say(
            f"warning: {len(shared)} of {len(held_out)} held-out inputs are trained on too "
            f"(held-out row {shared[0]} is the first): results on them say little"
        )


def _check_all_images(raws: list[_Raw], config: ScoreDataConfig, say: Say) -> None:
    if (column := config.image_column) is None:
        return

    def refuser(raw: _Raw) -> Any:
        return lambda value, problem, *ways: raw.reader.refuse(
            raw.row, column, value, problem, *ways
        )

    pairs = [(raw.inputs["images"], refuser(raw)) for raw in raws]
    check_images(pairs, sum(len(images) for images, _ in pairs), say)


def _row(
    raw: _Raw,
    scales: Mapping[str | None, Scale],
    values: Sequence[float],
    config: ScoreDataConfig,
    tally: Tally,
) -> Row:
    column = getattr(config, config.label_column)

    def refuse(value: Any, problem: str) -> LlmkdError:
        way = "score_low and score_high: the scale that the raters saw"
        return raw.reader.refuse(raw.row, column, value, problem, way, "drop the row")

    scale = scales.get(raw.group)
    label = on_levels(raw.said, scale, values, config.std_ddof, tally, refuse)
    return {"row": raw.row, **raw.inputs, "group": raw.group, **label}


def _stable(row: Row) -> Row:
    images = row["images"] and [image_key(image) for image in row["images"]]
    return {**row, "images": images}


def _report(found: ScoreRows, config: ScoreDataConfig, say: Say) -> None:
    tune = f", {len(found.validation)} to tune on" if found.validation else ""
    counts = ", ".join(f"{name} {count}" for name, count in found.counts.items())
    tail = f" ({counts})" if counts else ""
    say(
        f"rated rows: {len(found.train)} to train on{tune} and {len(found.held_out)} held out, "
        f"from {config.source}{tail}"
    )
    alike = len(set(found.scales.values())) == 1
    for group, scale in [*found.scales.items()][: 1 if alike else None]:
        all_of = " of every group" if alike and len(found.scales) > 1 else f" of {group}"
        where = "" if group is None else all_of
        how = "given" if scale.known else "read off the training rows"
        say(f"raters' scale{where}: {scale.low:g} to {scale.high:g}, {how}")
