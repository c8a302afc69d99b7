"""Files that are whole or absent: write aside, fsync, rename. And the hashes that name their
contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a crash leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; keys keep their order, odd values become their `str`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The parsed file, or None where there is none (a run that never began is not an error)."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder` to the disk, then the folders themselves."""
    for path in sorted(folder.rglob("*"), reverse=True):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    fsync_folder(folder)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it takes the place of `path` only once the block ends without
    error.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        fsync_tree(aside)
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move_into(source: Path, target: Path) -> None:
    """Rename every file of `source` into `target`, replacing files of the same name one by one."""
    target.mkdir(parents=True, exist_ok=True)
    fsync_tree(source)
    for path in sorted(source.iterdir()):
        if (target / path.name).is_dir():  # a folder cannot be replaced, only made way for
            shutil.rmtree(target / path.name)
        os.replace(path, target / path.name)
    source.rmdir()
    fsync_folder(target)


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_texts(texts: Iterable[str]) -> str:
    """First 16 hex digits of a SHA-256 over texts in order; lengths are hashed too, so that moving
    a boundary changes the result."""
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:16]
