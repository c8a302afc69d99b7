"""A labelled task as rows of token ids: read, checked, split, sampled, tokenized."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from llmkd.data.augment import augmented_rows
from llmkd.data.prepare import token_counts
from llmkd.data.task_config import REGRESSION, SINGLE, TOKEN, TaskConfig
from llmkd.data.task_labels import LabelSet, read_task_labels
from llmkd.data.task_source import Table, check_kind, check_texts, find_kind, read_tables
from llmkd.data.task_split import held_out_places, of_each_class, some
from llmkd.data.tokenizer import tokenizer_digest
from llmkd.errors import DataError, RecipeError
from llmkd.files import digest, digest_texts
from llmkd.objectives.token import IGNORE

logger = logging.getLogger(__name__)
FORMAT = 1  # raise it when rows change, so that runs on older ones are told apart


@dataclass(frozen=True)
class TaskRows:
    """A task's rows and what is known of them.

    Rows have `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them,
    `labels` and `row`, their number within the split. Labels are ints, floats (regression), C
    zeros and ones as floats (multi_label) or an int for each token (token; -100 on special tokens
    and on all but the first token of a word). `texts` holds `same_text` of every text of the
    training split, sampled or not, and of `held_out`. `augmented` are extra training rows, numbered
    on from those of `train`; None without any.
    """

    train: Dataset
    held_out: Dataset
    kind: str
    label_names: tuple[str, ...]
    fingerprint: str
    texts: frozenset[str] = field(default=frozenset(), repr=False)
    augmented: Dataset | None = None
    augmented_fingerprint: str | None = None

    @property
    def labels(self) -> int:
        """Outputs of a model for this task: the classes, or 1 for regression."""
        return 1 if self.kind == REGRESSION else len(self.label_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """A name for each output: the classes, or LABEL_0 as transformers calls a regression's."""
        return ("LABEL_0",) if self.kind == REGRESSION else self.label_names

    @property
    def taught(self) -> Dataset:
        """Rows of a teacher's stages: the training rows, then the augmented ones."""
        return self.train if self.augmented is None else self._all

    @cached_property
    def _all(self) -> Dataset:
        assert self.augmented is not None
        return concatenate_datasets([self.train, self.augmented])

    @property
    def taught_fingerprint(self) -> str:
        """Hash of `taught`."""
        if self.augmented_fingerprint is None:
            return self.fingerprint
        return digest([self.fingerprint, self.augmented_fingerprint])


@dataclass(frozen=True)
class _Half:
    """Rows with `text` (or words) and maybe `pair`, and their encoded labels."""

    rows: Dataset
    labels: list[Any]

    def pick(self, places: list[int]) -> _Half:
        return _Half(self.rows.select(places), [self.labels[place] for place in places])

    def texts(self) -> Iterator[tuple[str, ...]]:
        """Text, or text and pair, of each row; words are joined by blanks."""
        for batch in self.rows.iter(1000):
            columns = [cast(Any, batch)[name] for name in ("text", "pair") if name in batch]
            for row in zip(*columns, strict=True):
                yield tuple(text if isinstance(text, str) else " ".join(text) for text in row)


def load_task(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None] = logger.info,
    *,
    augment: str | None = None,
    seed: int = 0,
) -> TaskRows:
    """Read, check, split, sample and tokenize the task a recipe names.

    `augment` is `module:function`, called with the training rows that are kept and `seed`; see
    `llmkd.data.augment`.

    Raises MissingFileError for a path that leads nowhere; DataError for columns and labels that
    are no task, rows without text or label, held-out labels unknown to training, and rows longer
    than `task_max_length` unless they may be cut; RecipeError for keys that do not go with the
    task's type.
    """
    found, train, held_out = _read(config, say)
    kind = found.kind
    known = frozenset(
        same_text(t) for half in (train, held_out) for row in half.texts() for t in row
    )
    train = _sampled(train, config, found, say)
    _warn_of_leaks(train, held_out, say)
    say(
        f"task: {kind}, {len(train.labels)} training rows, {len(held_out.labels)} held out"
        + (f", {len(found.names)} classes" if found.names else "")
    )
    window = (config.task_max_length, config.task_truncate)
    facts = [_facts(half) for half in (train, held_out)]
    key = digest([FORMAT, kind, found.names, window, tokenizer_digest(tokenizer), facts])
    rows = TaskRows(
        _tokenized(train, tokenizer, config, kind, f"{key}-train", say),
        _tokenized(held_out, tokenizer, config, kind, f"{key}-held-out", say),
        kind,
        found.names,
        key,
        known,
    )
    extra = None if augment is None else _augmented(augment, train, found, seed, say)
    if extra is not None:
        _warn_of_leaks(extra, held_out, say)
        own = digest([key, _facts(extra)])
        made = _tokenized(extra, tokenizer, config, kind, f"{own}-more", say, len(rows.train))
        rows = replace(rows, augmented=made, augmented_fingerprint=own)
    return rows


def _facts(half: _Half) -> list[Any]:
    texts = (t for row in half.texts() for t in (str(len(row)), *row))
    return [digest_texts(texts), half.labels]


def _augmented(
    name: str, train: _Half, found: LabelSet, seed: int, say: Callable[[str], None]
) -> _Half | None:
    """The rows that the user's function adds; None where it adds none."""
    names = {"text": "text", "pair": "text_pair"}
    columns = {
        name: train.rows[column][:]
        for column, name in names.items()
        if column in train.rows.column_names
    }
    labels = map(found.decode, train.labels)
    given = [
        {**dict(zip(columns, values, strict=True)), "label": label}
        for *values, label in zip(*columns.values(), labels, strict=True)
    ]
    made = augmented_rows(name, given, seed, found, pairs="text_pair" in columns)
    say(f"task: {name} adds {len(made)} training rows to {len(train.labels)}")
    if not made:
        return None
    kept = {own: [row[name] for row in made] for own, name in names.items() if name in columns}
    return _Half(Dataset.from_dict(kept), [row["label"] for row in made])


def _read(config: TaskConfig, say: Callable[[str], None]) -> tuple[LabelSet, _Half, _Half]:
    """What the labels are, and both splits, checked; the training split not sampled yet."""
    table, held_table = read_tables(config)
    kind = find_kind(config, table)
    config.check_type(kind)
    check_texts(config, table)
    if held_table is not None:
        check_kind(config, held_table, kind)
        check_texts(config, held_table)
    found, labels, held_labels = read_task_labels(config, kind, table, held_table, say)
    train = _Half(table.rows.remove_columns("label"), labels)
    if held_table is None:
        train, held_out = _split(train, table, config, kind)
    else:
        assert held_labels is not None
        held_out = _Half(held_table.rows.remove_columns("label"), held_labels)
    kept = some(len(held_out.labels), config.max_task_eval_examples, config.task_split_seed)
    return found, train, held_out.pick(kept)


def same_text(text: str) -> str:
    """Hash that texts share which differ in case and white space only."""
    return digest_texts([" ".join(text.casefold().split())])


def _split(half: _Half, table: Table, config: TaskConfig, kind: str) -> tuple[_Half, _Half]:
    fraction, seed = config.task_eval_fraction, config.task_split_seed
    held_out = held_out_places(half.labels, kind, fraction, seed)
    if not held_out:
        raise DataError.of(
            "task_eval_fraction",
            fraction,
            f"no row of {table.value} ({len(half.labels)} rows) can be held out: too few, or "
            "each has a label of its own",
            "name a held-out split: --task_eval_split or --task_eval_dataset",
        )
    kept = sorted(set(range(len(half.labels))) - set(held_out))
    return half.pick(kept), half.pick(held_out)


def _sampled(
    train: _Half, config: TaskConfig, found: LabelSet, say: Callable[[str], None]
) -> _Half:
    """The training rows that are kept, in the order they were read."""
    count, seed = config.task_examples_per_class, config.task_sample_seed
    if count is not None:
        places, short = of_each_class(train.labels, count, seed)
        train = train.pick(places)
        if short:
            names = ", ".join(f"{found.names[label]} {has}" for label, has in short.items())
            say(f"task: fewer than {count} training rows, all of them kept: {names}")
    if config.max_task_examples is not None:
        train = train.pick(some(len(train.labels), config.max_task_examples, seed))
    if found.kind == SINGLE and len(set(train.labels)) < 2:
        raise DataError.of(
            "max_task_examples", config.max_task_examples, "keeps rows of one class only"
        )
    return train


def _warn_of_leaks(train: _Half, held_out: _Half, say: Callable[[str], None]) -> None:
    seen = {tuple(map(same_text, row)) for row in train.texts()}
    leaks = sum(tuple(map(same_text, row)) in seen for row in held_out.texts())
    if leaks:
        say(
            f"warning: {leaks} of {len(held_out.labels)} held-out rows are training rows too (same "
            "text): scores on them are too good; remove the copies from one of the splits"
        )


def _tokenized(
    half: _Half,
    tokenizer: PreTrainedTokenizerBase,
    config: TaskConfig,
    kind: str,
    key: str,
    say: Callable[[str], None],
    first: int = 0,
) -> Dataset:
    limit = config.task_max_length
    rows = _encoded(half, tokenizer, kind, key, None, first)
    lengths = token_counts(rows)
    if not min(lengths):
        row = lengths.index(0)
        raise DataError.of(
            "task_text_column", config.task_text_column, f"row {row} used makes no token"
        )
    long = sum(length > limit for length in lengths)
    if not long:
        return rows
    if not config.task_truncate:
        raise DataError.of(
            "task_max_length",
            limit,
            f"{long} of {len(lengths)} rows are longer, the longest {max(lengths)} tokens",
            f"--task_max_length {max(lengths)} holds them all, if the model's window does",
            "--task_truncate true cuts them",
        )
    say(f"task: {long} of {len(lengths)} rows cut to {limit} tokens (longest {max(lengths)})")
    return _encoded(half, tokenizer, kind, f"{key}-cut", limit, first)


def _encoded(
    half: _Half,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    key: str,
    limit: int | None,
    first: int,
) -> Dataset:
    """Rows of ids, cut to `limit` tokens unless that is None, numbered from `first` on."""
    if kind == TOKEN and not tokenizer.is_fast:
        raise RecipeError.of(
            "tokenizer_name_or_path",
            tokenizer.name_or_path,
            "a slow tokenizer cannot tell which word a token came from",
            "name a model that has a tokenizer.json",
        )
    blank = " " if kind == TOKEN and _joins_words(tokenizer) else ""

    def encode(batch: dict[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
        texts = batch["text"]
        if blank:
            texts = [[words[0], *(blank + word for word in words[1:])] for words in texts]
        made = tokenizer(
            texts,
            batch.get("pair"),
            truncation=limit is not None,
            max_length=limit,
            is_split_into_words=kind == TOKEN,
            return_attention_mask=True,
            verbose=False,
        )
        labels = [half.labels[place] for place in places]
        if kind == TOKEN:
            labels = [_aligned(label, made.word_ids(i)) for i, label in enumerate(labels)]
        names = ("input_ids", "attention_mask", "token_type_ids")
        ids = {name: made[name] for name in names if name in made}
        return {**ids, "labels": labels, "row": [first + place for place in places]}

    return half.rows.map(
        encode,
        with_indices=True,
        batched=True,
        remove_columns=half.rows.column_names,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=key,  # saves hashing the labels and the tokenizer
        desc="tokenizing",
    )


def _joins_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a list of words loses the blanks between them (a byte-level BPE made for text)."""
    words = tokenizer([["a", "a"]], is_split_into_words=True)["input_ids"]
    return words != tokenizer(["a a"])["input_ids"]


def _aligned(labels: list[int], words: list[int | None]) -> list[int]:
    """A label for each token: its word's on the word's first token, else -100."""
    before = [None, *words[:-1]]
    return [
        IGNORE if word is None or word == last else labels[word]
        for word, last in zip(words, before, strict=True)
    ]
