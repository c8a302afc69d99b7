"""A WordPiece tokenizer of a few words and files of labelled rows, for tests of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import WORDS
from transformers import BertTokenizer

SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
# "cats" is cat ##s and "running" is run ##n ##ing
VOCABULARY = [*SPECIAL, *WORDS, *"##s ##n ##ing good bad great poor film".split()]
PAD, UNK, CLS, SEP = range(4)


def bert_tokenizer() -> BertTokenizer:
    """[CLS] ... [SEP], token types, no end-of-text token: like an encoder's."""
    return BertTokenizer(vocab={word: place for place, word in enumerate(VOCABULARY)})


def ids(text: str) -> tuple[int, ...]:
    """Ids of blank-separated entries of the vocabulary."""
    return tuple(VOCABULARY.index(word) for word in text.split())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
