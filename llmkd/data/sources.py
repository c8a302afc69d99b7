"""From what the recipe names to documents: rows with `text`, split into train and held out."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from datasets import Dataset, IterableDataset, Value, interleave_datasets, load_dataset

from llmkd.data.config import STDLIB, DataConfig
from llmkd.data.places import means_path, way_to
from llmkd.data.stdlib_corpus import stdlib_documents
from llmkd.errors import DataError, LlmkdError, MissingFileError

logger = logging.getLogger(__name__)

LOADERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "csv",
}


UNPACKED = (OSError, EOFError, zlib.error)  # a .gz that is none, cut off, or damaged


@dataclass(frozen=True)
class Documents:
    """Text before the tokenizer. `train` may be a stream; `held_out` never is."""

    train: Dataset | IterableDataset
    held_out: Dataset


def load_documents(config: DataConfig) -> Documents:
    """Read, check and split the text a recipe names.

    Raises MissingFileError for a path that leads nowhere, DataError for a missing, empty or
    non-text column and for too few documents to split.
    """
    if config.mixture:
        train = _mixture(config)
    else:
        train = _load(config, config.dataset, config.train_split, streaming=config.streaming)
    if config.eval_dataset or config.eval_split:
        name = config.eval_dataset or config.dataset
        split = config.eval_split or "train"
        held_out = _load(config, name, split, streaming=False)
        assert isinstance(held_out, Dataset)
        return Documents(_capped(_shuffled(train, config), config), held_out)
    if isinstance(train, Dataset):
        return _split(train, config)
    rows = max(config.max_eval_rows or 256, 1)
    logger.info("held out: the first %d documents of the stream", rows)
    kept = list(train.take(rows))
    if len(kept) < rows:
        raise DataError.of(
            "dataset",
            config.source,
            f"the stream ends after {len(kept)} documents, before the {rows} held-out ones",
            "name held-out text: --eval_split or --eval_dataset",
            "set max_eval_rows lower",
        )
    return Documents(train.skip(rows), Dataset.from_list(kept))


def _split(rows: Dataset, config: DataConfig) -> Documents:
    if len(rows) < 2:
        raise DataError.of(
            "dataset",
            config.source,
            f"{len(rows)} document(s); at least 2 are needed to hold one out",
            "for one long text file: split it into documents separated by blank lines",
            "name held-out text: --eval_dataset",
        )
    if config.mixture or config.dataset != STDLIB:  # stdlib comes shuffled
        rows = rows.shuffle(seed=config.split_seed)
    count = min(max(1, round(len(rows) * config.eval_fraction)), len(rows) - 1)
    train = rows.select(range(count, len(rows)))
    return Documents(_capped(train, config), rows.select(range(count)))


def _shuffled(rows: Dataset | IterableDataset, config: DataConfig) -> Dataset | IterableDataset:
    return rows.shuffle(seed=config.split_seed) if isinstance(rows, Dataset) else rows


def _capped(rows: Dataset | IterableDataset, config: DataConfig) -> Dataset | IterableDataset:
    if config.max_train_documents is None:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.take(config.max_train_documents)
    return rows.select(range(min(config.max_train_documents, len(rows))))


def _load(
    config: DataConfig,
    name: str,
    split: str,
    *,
    streaming: bool,
    subset: str | None = None,
    revision: str | None = None,
    column: str | None = None,
) -> Dataset | IterableDataset:
    column = column or config.text_column
    if name == STDLIB:
        rows = Dataset.from_list(stdlib_documents(config.split_seed))
        return rows.to_iterable_dataset() if streaming else rows
    rows = read_table(
        name,
        split,
        streaming=streaming,
        subset=subset or config.dataset_config,
        revision=revision or config.dataset_revision,
    )
    return _text_only(rows, column, name)


def read_table(
    name: str,
    split: str,
    *,
    streaming: bool = False,
    subset: str | None = None,
    revision: str | None = None,
    key: str = "dataset",
    split_key: str = "eval_split",
) -> Dataset | IterableDataset:
    """Rows of a local file or folder, or of a Hub dataset, with all their columns.

    Errors name the recipe's `key` and `split_key`; where these begin with "task_", so do the ways
    out.
    Raises MissingFileError for a path that leads nowhere, DataError for what cannot be read.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _local(path, split, streaming=streaming, key=key, split_key=split_key)
    if _looks_like_path(name):
        raise MissingFileError.of(
            key,
            name,
            f"no such file or folder (looked at {path.absolute()})",
            *way_to(name),
            "check the path; relative ones start at the working directory",
            "a Hub dataset is written owner/name",
        )
    return _hub(name, subset, revision, split, streaming=streaming, key=key)


def _ways_to_split(split_key: str) -> tuple[str, ...]:
    prefix = _prefix(split_key)
    if split_key.endswith("train_split"):
        return (f"leave {split_key} out: a file, or a folder of one split, is read whole",)
    return (
        f"name held-out text: --{prefix}eval_dataset",
        f"leave {prefix}eval_split out: {prefix}eval_fraction is split off",
    )


def _prefix(key: str) -> str:
    return "task_" if key.startswith("task_") else ""


def _looks_like_path(name: str) -> bool:
    # An ending we could read is a path's.
    suffixes = [suffix for suffix in Path(name).suffixes if suffix in LOADERS or suffix == ".gz"]
    return bool(suffixes) or means_path(name)


def _local(
    path: Path, split: str, *, streaming: bool, key: str, split_key: str
) -> Dataset | IterableDataset:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    named = [p for p in files if p.name.startswith(split)]
    if split != "train" or (named and len(named) < len(files)):
        if not named or not path.is_dir():
            raise DataError.of(
                split_key,
                split,
                f"{path} has no file whose name begins with {split!r}",
                *_ways_to_split(split_key),
            )
        files = named
    kinds = {_kind(file): file for file in files if _kind(file)}
    if not kinds:
        raise DataError.of(
            key, str(path), "no file llmkd can read", f"endings: {', '.join(sorted(LOADERS))}"
        )
    if len(kinds) > 1:
        names = ", ".join(str(file.name) for file in kinds.values())
        raise DataError.of(key, str(path), f"files of several kinds in one folder: {names}")
    kind = next(iter(kinds))
    readable = [file for file in files if _kind(file)]
    if kind != "text" and not any(file.stat().st_size for file in readable):
        raise _is_empty(key, path, readable)  # before a stream fails over it at its first row
    if kind == "text":
        rows = Dataset.from_list(
            [row for file in readable for row in _paragraph_documents(file, key)]
            or [{"text": "", "id": ""}]
        )
        return rows.to_iterable_dataset() if streaming else rows
    options: dict[str, Any] = {"sep": "\t"} if readable[0].suffix == ".tsv" else {}
    try:
        options |= {"data_files": {split: [str(file) for file in readable]}, "split": split}
        return load_dataset(str(kind), streaming=streaming, **options)
    except Exception as error:
        if kind in ("json", "csv") and (blank := [file for file in readable if _blank(file)]):
            raise _is_empty(key, path, blank) from error
        why = (kind == "json" and _broken_line(readable)) or _last_line(error)
        raise DataError.of(key, str(path), f"cannot be read as {kind}: {why}") from error


def _is_empty(key: str, path: Path, files: list[Path]) -> LlmkdError:
    where = "" if files == [path] else f" ({', '.join(file.name for file in files[:3])})"
    return DataError.of(key, str(path), f"is empty{where}", "name a file with rows")


def _blank(file: Path) -> bool:
    """Whether there is nothing but white space in a file, packed or not."""
    try:
        with _opened(file) as handle:
            return not any(block.strip() for block in iter(lambda: handle.read(1 << 16), b""))
    except UNPACKED:
        return False


def _opened(file: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _broken_line(files: list[Path]) -> str | None:
    """The first line that is not JSON, with its file and number; pyarrow names neither."""
    for file in files:
        try:
            if problem := _first_problem(file):
                return f"{file.name}, {problem}"
        except UNPACKED as error:
            return f"{file.name}: {error}"
    return None


def _first_problem(file: Path) -> str | None:
    first = True
    with _opened(file) as handle:
        for number, line in enumerate(handle, 1):
            try:
                json.loads(line if line.strip() else b"0")
            except (ValueError, RecursionError) as error:
                if first and line.lstrip()[:1] == b"[":  # one list over many lines
                    return _not_json(file)
                return f"line {number}: {error}: {line.strip()[:60].decode('utf-8', 'replace')!r}"
            first = first and not line.strip()
    return None


def _not_json(file: Path) -> str | None:
    try:
        with _opened(file) as handle:
            json.load(handle)
    except (ValueError, RecursionError) as error:
        return str(error)
    return None


def _kind(file: Path) -> str | None:
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    return LOADERS.get(suffix)


def _paragraph_documents(file: Path, key: str) -> list[dict[str, str]]:
    """Documents of a plain text file: its paragraphs (blank lines between), joined up to about
    8,000 characters, so that one long book can be split into train and held-out parts."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as handle:
            blocks = handle.read().split("\n\n")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError.of(key, str(file), f"is not UTF-8 text: {error}") from error
    rows: list[dict[str, str]] = []
    pending: list[str] = []
    size = 0
    for block in itertools.chain(blocks, [None]):
        if block is None or size + len(block) > 8000:
            text = "\n\n".join(pending)
            if text.strip():
                rows.append({"text": text, "id": f"{file.name}#{len(rows)}"})
            pending, size = [], 0
        if block is not None:
            pending.append(block)
            size += len(block) + 2
    return rows


def _hub(
    name: str, subset: str | None, revision: str | None, split: str, *, streaming: bool, key: str
) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, subset, revision=revision, split=split, streaming=streaming)
    except Exception as error:
        raise DataError.of(
            key,
            name,
            f"the Hub dataset (config {subset!r}, split {split!r}) cannot be loaded: "
            f"{_last_line(error)}",
            "check id, config and split on the Hub; a gated one needs `hf auth login`",
            "a local path starts with ./ or ends in .jsonl, .parquet, .txt or .csv",
            "without network: a local file"
            if _prefix(key)
            else "without network: --dataset stdlib",
        ) from error


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1][:300]


def _text_only(
    rows: Dataset | IterableDataset, column: str, name: str
) -> Dataset | IterableDataset:
    """Keep the text column as `text`; DataError where it is missing, not text, or empty all
    through.
    """
    columns = rows.column_names or list(next(iter(rows), {}))
    if column not in columns:
        raise DataError.of(
            "text_column",
            column,
            f"{name} has no such column; it has {', '.join(sorted(columns)) or 'none'}",
            *(f"--text_column {other}" for other in sorted(columns)[:3]),
        )
    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
    if (
        isinstance(rows, Dataset)
        and getattr(rows.features["text"], "dtype", None) == "large_string"
    ):
        rows = rows.cast_column("text", Value("string"))  # parts of a mixture must agree
    head = list(rows.take(100)) if isinstance(rows, IterableDataset) else rows[:100]["text"]
    head = [row["text"] if isinstance(row, dict) else row for row in head]
    wrong = [value for value in head if value is not None and not isinstance(value, str)]
    if wrong:
        raise DataError.of(
            "text_column", column, f"{name} holds {type(wrong[0]).__name__} there, not text"
        )
    rows = rows.filter(_has_text, input_columns=["text"])
    if (isinstance(rows, Dataset) and len(rows) == 0) or not any(map(_has_text, head)):
        raise DataError.of("text_column", column, f"{name} holds no text there: every row is empty")
    return rows


def _has_text(text: str | None) -> bool:
    return bool(text and text.strip())


def _mixture(config: DataConfig) -> Dataset | IterableDataset:
    parts, weights = [], []
    for part in config.mixture:
        parts.append(
            _load(
                config,
                part["id"],
                part.get("split", config.train_split),
                streaming=config.streaming,
                subset=part.get("config"),
                revision=part.get("revision"),
                column=part.get("text_column"),
            )
        )
        weights.append(float(part["weight"]))
    parts = [rows.select_columns(["text"]) for rows in parts]
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(parts, probabilities=shares, seed=config.split_seed)
