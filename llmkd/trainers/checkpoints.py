"""Which checkpoints are whole. A kill in the middle of a save must not spoil a resume."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from llmkd.files import fsync_tree, write_json

MARK = "llmkd_complete.json"
NAME = re.compile(r"checkpoint-(\d+)$")


def mark_complete(folder: Path, step: int) -> None:
    """Flush a checkpoint folder to the disk, then say in it that it is whole."""
    fsync_tree(folder)
    write_json(folder / MARK, {"step": step})


def checkpoints(folder: Path) -> list[Path]:
    """`checkpoint-N` folders by N, whole or not."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := NAME.search(p.name))]
    return [path for _, path in sorted(found)]


def last_whole_checkpoint(folder: Path, *, clean: bool = False) -> Path | None:
    """The newest checkpoint that was saved to its end; `clean` deletes the ones that were not."""
    whole = None
    for path in checkpoints(folder):
        if (path / MARK).is_file():
            whole = path
        elif clean:
            shutil.rmtree(path, ignore_errors=True)
    return whole


def cut_metrics(path: Path, step: int) -> None:
    """Drop what a killed run logged after `step`, and a half-written last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
