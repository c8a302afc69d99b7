"""Documents to packed rows of token ids, made once and kept in the datasets cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import datasets.config
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from llmkd.data.config import DataConfig
from llmkd.data.sources import Documents
from llmkd.data.tokenizer import tokenizer_digest
from llmkd.errors import DataError
from llmkd.files import digest, digest_texts, read_json, whole_folder, write_json

logger = logging.getLogger(__name__)
FORMAT = 2  # raise it when rows change, so that older cache entries are not taken for new ones


@dataclass(frozen=True)
class TokenRows:
    """Packed rows and what is known of them. Counts are None for a stream.

    `train` rows have `input_ids`, `seq_lengths` and `row`, their number.
    `eval_tokens` and `eval_bytes` are those of the held-out documents that made `held_out`.
    """

    train: Dataset | IterableDataset
    held_out: Dataset
    fingerprint: str
    train_tokens: int | None
    eval_tokens: int
    eval_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of held-out text for each of its tokens, end marks included."""
        return self.eval_bytes / max(self.eval_tokens, 1)


def prepare_rows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    say: Callable[[str], None] = logger.info,
) -> TokenRows:
    """Tokenize and pack both halves, or take them from the cache if text, tokenizer and settings
    agree.

    Raises DataError for rows that do not fit `max_length` when neither packed nor cut.
    """
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": config.max_length,
        "packing": config.packing_strategy if config.packing else None,
        "truncate": config.truncate,
        "datasets": datasets.__version__,
    }
    held_out, eval_facts = _cached(documents.held_out, tokenizer, config, settings, say, "held-out")
    if config.max_eval_rows is not None:
        held_out = held_out.select(range(min(config.max_eval_rows, len(held_out))))
    if isinstance(documents.train, IterableDataset):
        packed = _pack(_encode(documents.train, tokenizer), config)
        train: Dataset | IterableDataset = packed.map(number, with_indices=True)
        key, tokens = digest([config.source, settings]), None
    else:
        train, facts = _cached(documents.train, tokenizer, config, settings, say, "train")
        key, tokens = facts["key"], facts["tokens"]
    return TokenRows(
        train=train,
        held_out=held_out,
        fingerprint=digest([key, eval_facts["key"], config.max_eval_rows]),
        train_tokens=tokens,
        eval_tokens=eval_facts["tokens"],
        eval_bytes=eval_facts["bytes"],
    )


def _cached(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    settings: dict[str, Any],
    say: Callable[[str], None],
    what: str,
) -> tuple[Dataset, dict[str, Any]]:
    key = digest([text_digest(rows), settings])

    def make() -> tuple[Dataset, dict[str, Any]]:
        encoded = cast(Dataset, _encode(rows, tokenizer))
        packed = cast(Dataset, _pack(encoded, config))
        packed = packed.add_column("row", list(range(len(packed))))
        # Before anything is cut: bits per byte needs the tokens of all the bytes.
        tokens = sum(token_counts(encoded))
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in rows["text"])
        return packed, {"tokens": tokens, "bytes": size, "documents": len(rows)}

    return cached_rows(key, make, say, what, "same text, tokenizer and packing")


def cached_rows(
    key: str,
    make: Callable[[], tuple[Dataset, dict[str, Any]]],
    say: Callable[[str], None],
    what: str,
    why: str,
) -> tuple[Dataset, dict[str, Any]]:
    """Rows and facts kept under `key` in the datasets cache, or made and kept there now.

    `key` must name everything that decides the rows. The facts come back with `key` among them.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "llmkd" / f"rows-{key}"
    facts = read_json(folder / "llmkd.json")
    if facts is not None:
        say(f"{what} rows: reused from the cache ({why}, key {key})")
        return Dataset.load_from_disk(str(folder)), facts
    rows, made = make()
    facts = {"key": key, **made}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as aside:
        rows.save_to_disk(str(aside))
        write_json(aside / "llmkd.json", facts)
    return Dataset.load_from_disk(str(folder)), facts


def number(row: dict[str, Any], place: int) -> dict[str, int]:
    """Number the rows of a stream as they come, so that what is stored for a row is found."""
    return {"row": place}


def token_counts(rows: Dataset) -> list[int]:
    """Tokens of each row."""
    # By batches of arrow: a column read row by row costs more than the tokenizer.
    batches: Any = rows.select_columns(["input_ids"]).with_format("arrow").iter(1000)
    chunks = (chunk for table in batches for chunk in table["input_ids"].chunks)
    return [count for chunk in chunks for count in chunk.value_lengths().to_pylist()]


def text_digest(rows: Dataset) -> str:
    """Hash of the texts in order."""
    # Not datasets' own fingerprint: it changes when a file is merely touched.
    return digest_texts(text for batch in rows.iter(1000) for text in cast(Any, batch)["text"])


def _encode(
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset | IterableDataset:
    end = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # verbose=False: "longer than the model's maximum" does not apply to text that is packed
        ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [[*row, cast(int, end)] for row in cast(list[list[int]], ids)]}

    stream = isinstance(rows, IterableDataset)
    bar: dict[str, Any] = {} if stream else {"desc": "tokenizing", "load_from_cache_file": False}
    columns = rows.column_names or ["text"]
    return rows.map(encode, batched=True, batch_size=64, remove_columns=columns, **bar)


def _pack(tokens: Dataset | IterableDataset, config: DataConfig) -> Dataset | IterableDataset:
    limit, stream = config.max_length, isinstance(tokens, IterableDataset)
    if config.packing:
        bar: dict[str, Any] = {} if stream else {"desc": "packing", "load_from_cache_file": False}
        return pack_dataset(cast(Any, tokens), limit, config.packing_strategy, map_kwargs=bar)
    if config.truncate:
        return tokens.map(lambda row: {"input_ids": row["input_ids"][:limit]})
    if isinstance(tokens, Dataset):
        long = [i for i, ids in enumerate(tokens["input_ids"]) if len(ids) > limit]
        if long:
            raise DataError.of(
                "max_length",
                limit,
                f"{len(long)} of {len(tokens)} rows are longer (the first is row {long[0]})",
                "--packing true splits them without losing tokens",
                "--truncate true cuts them",
                "set max_length higher, up to the model's window",
            )
    return tokens
