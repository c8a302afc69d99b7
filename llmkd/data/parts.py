"""A long job in numbered parts: JSON Lines files, whole or absent, so that a kill costs a part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from llmkd.errors import DataError, RunFolderError
from llmkd.files import read_json, write_json, write_text

FORMAT = "llmkd-parts"
META = "meta.json"
AGAIN = "delete it and run the same command again: the other parts are kept"
Row = dict[str, Any]


class Parts:
    """`folder` with `meta.json` and `part-00000.jsonl`, ...: `parts` files of JSON rows.

    `key` is a hash of all that decides the rows: a folder with another key is refused, never mixed.
    Ranks may write different parts at the same time; each file is written aside and renamed.
    """

    def __init__(self, folder: str | Path, parts: int, key: str) -> None:
        if parts < 0:
            raise ValueError(f"{parts} parts")
        self.folder, self.parts, self.key = Path(folder), parts, key

    def claim(self) -> None:
        """Make the folder this job's, or find that it is; every rank may call it.

        RunFolderError where it holds another job's parts or other files, or is a file; a claim of
        which no part came is taken over.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise RunFolderError.of("folder", str(self.folder), "is a file, not a folder")
        found = _read_meta(self.folder)
        wanted = {"format": FORMAT, "version": 1, "key": self.key, "parts": self.parts}
        if found is None:
            if strangers := sorted(self.folder.glob("*.jsonl")):
                problem = f"holds {strangers[0].name} but no {META}: nobody knows what made it"
                raise RunFolderError.of("folder", str(self.folder), problem, "move it away")
            write_json(self.folder / META, wanted)
        elif found != wanted and not any(self.folder.glob("part-*.jsonl")):
            write_json(self.folder / META, wanted)  # claimed, but nothing came of it
        elif found != wanted:
            was = f"key {found.get('key')} in {found.get('parts')} parts"
            raise RunFolderError.of(
                "folder",
                str(self.folder),
                f"holds another job's parts ({was}; this one: key {self.key} in {self.parts})",
                "delete it to do this part of the run anew",
                "choose another --output_dir",
            )

    def path(self, part: int) -> Path:
        """The file of one part."""
        if not 0 <= part < self.parts:
            raise ValueError(f"part {part} of {self.parts}")
        return self.folder / f"part-{part:05d}.jsonl"

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there, ascending."""
        return [part for part in range(self.parts) if not self.path(part).is_file()]

    @property
    def done(self) -> bool:
        """Whether every part is there."""
        return not self.missing()

    def write(self, part: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put one part down, whole. TypeError, and no file, for what JSON cannot hold."""
        write_text(self.path(part), "".join(_line(row) for row in rows))

    def rows(self) -> Iterator[Row]:
        """All rows, part by part; DataError where a part is missing or damaged."""
        if missing := self.missing():
            raise DataError.of(
                "folder",
                str(self.folder),
                f"{len(missing)} of {self.parts} parts are missing (the first: {missing[0]})",
                "run the same command again: only these are made",
            )
        for part in range(self.parts):
            yield from _read_part(self.path(part))


def read_parts(folder: str | Path) -> Iterator[Row]:
    """All rows of a finished job's folder, whatever its key; DataError where it is no such folder,
    or not whole.
    """
    found = _read_meta(Path(folder))
    if found is None:
        raise DataError.of("folder", str(folder), f"has no {META}: no job wrote parts there")
    yield from Parts(folder, found["parts"], found["key"]).rows()


def run_parts(
    parts: Parts,
    make: Callable[[int], Sequence[Mapping[str, Any]]],
    *,
    rank: int = 0,
    world: int = 1,
    label: str = "parts",
    say: Callable[[str], None] | None = None,
    quiet: bool = False,
) -> None:
    """Make the missing parts of this rank with `make(part) -> rows`: the i-th missing one is rank
    i % world's. All ranks must call it; it returns when this rank's are written, so a barrier
    before `parts.rows()` is the caller's.

    What `make` raises comes out as it is; parts written before stay. `quiet` shows no bar.
    """
    missing = parts.missing()
    if world > 1:  # all have looked before anybody writes, so all share one list
        _wait()
    mine = missing[rank::world]
    there = parts.parts - len(missing)
    if say is not None and there and missing:
        say(f"{label}: {there} of {parts.parts} parts are there already")
    # only a bar that is hidden says so: `disable=False` would overrule TQDM_DISABLE
    hidden: Any = {"disable": True} if quiet or rank or not mine else {}
    with tqdm(total=len(mine), desc=label, unit="part", **hidden) as bar:
        for part in mine:
            parts.write(part, make(part))
            bar.update(1)


def _wait() -> None:
    PartialState().wait_for_everyone()


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    if not text.isprintable():  # half surrogates, and characters that some readers end a line at
        text = json.dumps(row)
    return text + "\n"


def _read_meta(folder: Path) -> dict[str, Any] | None:
    path = folder / META
    try:
        found = read_json(path)
    except ValueError as error:
        raise DataError.of("folder", str(path), f"is damaged: {error}", "delete the folder") from (
            error
        )
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise RunFolderError.of(
            "folder", str(path), "was not written by llmkd", "choose another --output_dir"
        )
    return found


def _read_part(path: Path) -> Iterator[Row]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError.of("part", str(path), f"is not UTF-8 text: {error}", AGAIN) from error
    if text and not text.endswith("\n"):
        raise DataError.of("part", str(path), "is cut off: its last line has no end", AGAIN)
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            problem = f"line {number} is not JSON: {error}"
            raise DataError.of("part", str(path), problem, AGAIN) from error
        if not isinstance(row, dict):
            raise DataError.of("part", str(path), f"line {number} is no row: {line[:60]}", AGAIN)
        yield row
