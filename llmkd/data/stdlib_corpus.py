"""The corpus that is always there: the source text of Python's standard library."""

from __future__ import annotations

import platform
import random
import sysconfig
import tokenize
from pathlib import Path

from llmkd.errors import DataError

# Tests are left out because they are repetitive; the rest is not the standard library's own text.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_documents(seed: int) -> list[dict[str, str]]:
    """One row {"text", "id"} per source file, shuffled by `seed`; the id is the file's path.

    Raises DataError where Python came without its library's sources (frozen or zipped builds).
    """
    root = Path(sysconfig.get_path("stdlib"))
    rows = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root)
        if LEFT_OUT.intersection(parts.parts):
            continue
        try:
            with tokenize.open(path) as handle:  # honours PEP 263 coding lines
                text = handle.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            rows.append({"text": text, "id": f"python{platform.python_version()}/{parts}"})
    if not rows:
        raise DataError.of(
            "dataset",
            "stdlib",
            f"no Python source below {root}",
            "install a Python that ships its library's sources",
            "name a file: --dataset my.jsonl",
        )
    random.Random(seed).shuffle(rows)
    return rows
