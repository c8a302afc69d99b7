"""Unlabelled text for encoders: documents cut into pieces, each a row with special tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from llmkd.data.prepare import cached_rows, number, text_digest, token_counts
from llmkd.data.sources import Documents
from llmkd.data.task import TaskRows, same_text
from llmkd.data.tokenizer import tokenizer_digest
from llmkd.errors import DataError, RecipeError
from llmkd.files import digest, digest_texts

logger = logging.getLogger(__name__)
FORMAT = 1  # raise it when rows change, so that older cache entries are not taken for new ones
SHORTEST = 8  # tokens; a leftover below it teaches little and costs a row
SAMPLE = 2000  # documents looked at to tell general text from the task's


@dataclass(frozen=True)
class GeneralRows:
    """Rows with `input_ids` (special tokens included) and `row`, their number; no labels.

    `train` may be a stream; then `train_tokens`, special ones included, is None.
    """

    train: Dataset | IterableDataset
    held_out: Dataset
    fingerprint: str
    train_tokens: int | None


def general_rows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_eval_rows: int | None,
    say: Callable[[str], None] = logger.info,
) -> GeneralRows:
    """Cut every document into rows of at most `max_length` tokens, special ones included, or take
    them from the cache. Documents are not joined: rows are as long as real text is.

    Raises RecipeError where the special tokens leave no room, DataError for text of no tokens.
    """
    before, after = special_tokens(tokenizer)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise RecipeError.of(
            "max_length", max_length, f"{len(before) + len(after)} special tokens leave no room"
        )

    def rows_of(texts: Dataset | IterableDataset) -> Dataset | IterableDataset:
        return _rows(texts, tokenizer, room, before, after)

    settings = {
        "format": FORMAT,
        "rows": "general",
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "shortest": SHORTEST,
        "datasets": datasets.__version__,
    }
    held_out, eval_key, _ = _cached(documents.held_out, rows_of, settings, say, "held-out")
    if max_eval_rows is not None:
        held_out = held_out.select(range(min(max_eval_rows, len(held_out))))
    if isinstance(documents.train, IterableDataset):
        stream = cast(IterableDataset, rows_of(documents.train))
        train: Dataset | IterableDataset = stream.map(number, with_indices=True)
        first = digest_texts(cast(Any, row)["text"] for row in documents.train.take(64))
        key, tokens = digest([first, settings]), None
    else:
        train, key, tokens = _cached(documents.train, rows_of, settings, say, "train")
    return GeneralRows(train, held_out, digest([key, eval_key, max_eval_rows]), tokens)


def _cached(
    texts: Dataset,
    rows_of: Callable[[Dataset], Dataset | IterableDataset],
    settings: dict[str, Any],
    say: Callable[[str], None],
    what: str,
) -> tuple[Dataset, str, int]:
    """Rows, their key and their tokens."""

    def make() -> tuple[Dataset, dict[str, Any]]:
        rows = cast(Dataset, rows_of(texts))
        if not len(rows):
            raise DataError.of("dataset", f"{len(texts)} {what} documents", "make no token at all")
        tokens = sum(token_counts(rows))
        rows = rows.add_column("row", list(range(len(rows))))  # type: ignore[call-arg]
        return rows, {"tokens": tokens, "documents": len(texts)}

    key = digest([text_digest(texts), settings])
    rows, facts = cached_rows(key, make, say, f"general {what}", "same text, tokenizer and window")
    return rows, key, facts["tokens"]


def _rows(
    texts: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    before: list[int],
    after: list[int],
) -> Dataset | IterableDataset:
    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # verbose=False: "longer than the model's maximum" does not apply to text that is cut
        ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        found = (pieces(document, room) for document in cast(list[list[int]], ids))
        return {"input_ids": [[*before, *p, *after] for p in itertools.chain.from_iterable(found)]}

    stream = isinstance(texts, IterableDataset)
    bar: dict[str, Any] = {} if stream else {"desc": "tokenizing", "load_from_cache_file": False}
    columns = texts.column_names or ["text"]
    return texts.map(cut, batched=True, batch_size=64, remove_columns=columns, **bar)


def pieces(ids: list[int], room: int) -> list[list[int]]:
    """Cut `ids` into pieces of `room` tokens. A last one below `room` and `SHORTEST` is dropped
    unless it is all there is.
    """
    found = [ids[start : start + room] for start in range(0, len(ids), room)]
    if len(found) > 1 and len(found[-1]) < min(SHORTEST, room):
        found.pop()
    return found


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids a tokenizer puts before and after a single text; empty where it puts none."""
    # Asked by an example: in transformers 5 fast tokenizers cannot build it from ids any more.
    bare = cast(list[int], tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = cast(list[int], tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise RecipeError.of(
        "tokenizer_name_or_path",
        tokenizer.name_or_path,
        f"cannot tell its special tokens from its text: 'a' is {bare}, with them {whole}",
    )


def check_not_the_task(documents: Documents, task: TaskRows, source: str) -> None:
    """DataError if the general text of `source` is the task's text, whole or line by line.

    Up to 2,000 documents are looked at, evenly (of a stream: its first). The text is the task's
    if half of the documents are: as a whole, or in half of their lines.
    """
    texts = _sample(documents.train)
    hits = sum(_is_task_text(text, task.texts) for text in texts)
    if 2 * hits >= len(texts) > 0:
        raise DataError.of(
            "dataset",
            source,
            "general text is the task's text: GED would be TAD "
            f"({hits} of {len(texts)} documents looked at are texts of the task)",
            "name text of another origin: --dataset",
        )


def _sample(rows: Dataset | IterableDataset) -> list[str]:
    if isinstance(rows, IterableDataset):
        return [cast(Any, row)["text"] for row in rows.take(SAMPLE)]
    count = min(SAMPLE, len(rows))
    places = np.linspace(0, len(rows) - 1, count).round().astype(int)
    return list(rows.select(places.tolist())["text"])


def _is_task_text(text: str, known: frozenset[str]) -> bool:
    if same_text(text) in known:
        return True
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) > 1 and 2 * sum(same_text(line) in known for line in lines) >= len(lines)
