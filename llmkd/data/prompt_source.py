"""Prompts as somebody wrote them down: a column of a dataset, or the standard library's prose."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias, cast

from datasets import Dataset

from llmkd.data.prompt_config import PromptConfig
from llmkd.data.sources import LOADERS, read_table
from llmkd.data.stdlib_corpus import stdlib_documents
from llmkd.errors import DataError, LlmkdError, MissingFileError

Prompt: TypeAlias = str | list[dict[str, str]]
Numbered: TypeAlias = tuple[int, Prompt]
DOCSTRING = re.compile(r'(?ms)^[ \t]*[rR]?("""|\'\'\')(.*?)\1')
COMMENT = re.compile(r"(?m)(?:^[ \t]*#.*\n)+")
MARK = re.compile(r"(?m)^[ \t]*#+ ?")
PROSE = re.compile(r"[A-Z][A-Za-z',;:()\- ]*\Z")
LEFT = 4  # words of a paragraph that a prompt leaves to be said


def given_prompts(config: PromptConfig, key: str) -> list[Numbered]:
    """Row number and prompt of every row of the dataset under `key` (prompt_dataset or
    held_out_dataset); DataError, with the row, for one that is none, empty or no prompt.
    """
    name = getattr(config, key)
    split_key = "prompt_split" if key == "prompt_dataset" else "held_out_split"
    rows = _table(config, name, key, split_key)
    if _is_plain_text(name):
        lines = [line for text in rows["text"] for line in text.split("\n")]
        found: Iterable[Any] = [line.strip() for line in lines if line.strip()]
    else:
        found = _column(rows, config.prompt_column, name)
    return [(row, _prompt(value, row, name)) for row, value in enumerate(found)]


def stdlib_prompts(words: int) -> list[Numbered]:
    """The first `words` words of every paragraph of prose in the installed Python's docstrings and
    comments that says more than that, each once.
    """
    found: dict[str, None] = {}
    for document in sorted(stdlib_documents(0), key=lambda row: row["id"]):
        for paragraph in _paragraphs(document["text"]):
            said = paragraph.split()
            start = " ".join(said[:words])
            if len(said) >= words + LEFT and PROSE.match(start):
                found.setdefault(start)
    return list(enumerate(found))


def _paragraphs(source: str) -> Iterable[str]:
    texts = [match.group(2) for match in DOCSTRING.finditer(source)]
    texts += [MARK.sub("", match.group()) for match in COMMENT.finditer(source)]
    return (paragraph for text in texts for paragraph in re.split(r"\n[ \t]*\n", text))


def _table(config: PromptConfig, name: str, key: str, split_key: str) -> Dataset:
    try:
        rows = read_table(
            name,
            getattr(config, split_key),
            subset=config.prompt_dataset_name,
            revision=config.prompt_revision,
            key=key,
            split_key=split_key,
        )
    except MissingFileError:
        raise
    except DataError as error:  # its ways out are those of text to train on
        ways = [
            "a local path starts with ./ or ends in .jsonl, .parquet, .txt or .csv",
            f"{split_key} names a split of a Hub dataset, or how files of a folder begin",
            "without network: a local file, or leave prompt_dataset out",
        ]
        lines = [str(error).splitlines()[0], *(f"  - {way}" for way in ways)]
        raise DataError("\n".join(lines)) from error
    return cast(Dataset, rows)


def _is_plain_text(name: str) -> bool:
    path = Path(name).expanduser()
    if not path.exists():
        return False
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    names = [file.name.removesuffix(".gz") for file in files]
    kinds = {LOADERS.get(Path(one).suffix) for one in names} - {None}
    return kinds == {"text"}


def _column(rows: Dataset, path: str, name: str) -> Iterable[Any]:
    columns = rows.column_names
    first, *steps = [path] if path in columns else path.split(".")
    if first not in columns:
        raise DataError.of(
            "prompt_column",
            path,
            f"{name} has no column {first}; it has {', '.join(sorted(columns)) or 'none'}",
            *(f"--prompt_column {other}" for other in sorted(columns)[:3]),
        )
    for row, value in enumerate(rows[first]):
        for step in steps:
            value = _inside(value, step, path, row, name)
        yield value


def _inside(value: Any, step: str, path: str, row: int, name: str) -> Any:
    if isinstance(value, list) and step.lstrip("-").isdigit():
        if -len(value) <= int(step) < len(value):
            return value[int(step)]
        problem = f"a list of {len(value)} has no place {step}"
    elif isinstance(value, dict):
        if step in value:
            return value[step]
        problem = f"there is no {step}, but {', '.join(map(str, value))}"
    else:
        problem = f"{step} cannot be looked up in {type(value).__name__}"
    raise DataError.of("prompt_column", path, f"row {row} of {name}: {problem}")


def _prompt(value: Any, row: int, name: str) -> Prompt:
    """A value of the column as a prompt; DataError where it is none."""
    if isinstance(value, str):
        if not value.strip():
            raise _refuse(value, row, name, "the prompt is empty")
        return value
    if not isinstance(value, list):
        what = "there is no prompt" if value is None else f"is {type(value).__name__}"
        raise _refuse(value, row, name, f"{what}; text or a list of messages is wanted")
    if not value:
        raise _refuse(value, row, name, "the chat has no messages")
    messages = [_message(one, row, name) for one in value]
    if messages[-1]["role"] == "assistant":
        raise _refuse(
            messages[-1]["content"][:60],
            row,
            name,
            "the chat ends with the assistant's answer, so there is nothing to answer",
            "cut the last message off in your file",
            "--prompt_column messages.0.content takes the first message alone",
        )
    if not any(one["content"].strip() for one in messages if one["role"] != "system"):
        raise _refuse(value, row, name, "the chat says nothing")
    return messages


def _message(one: Any, row: int, name: str) -> dict[str, str]:
    role, content = (one.get("role"), one.get("content")) if isinstance(one, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        way = 'a message is {"role": "user", "content": "text"}'
        raise _refuse(one, row, name, "is no message with role and content as text", way)
    return {"role": role, "content": content}


def _refuse(value: Any, row: int, name: str, problem: str, *ways: str) -> LlmkdError:
    return DataError.of("prompt_dataset", value, f"row {row} of {name}: {problem}", *ways)
