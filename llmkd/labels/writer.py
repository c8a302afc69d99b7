"""Writing a store: one writer, whole shards, and a run that was killed goes on where it stood."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llmkd.errors import LlmkdError, RunFolderError
from llmkd.files import read_json, write_json, write_text
from llmkd.labels import manifest as manifests
from llmkd.labels.card import card
from llmkd.labels.heads import NAME as HEAD
from llmkd.labels.heads import head_facts, read_fit, write_head
from llmkd.labels.hidden import LowRank
from llmkd.labels.lowrank import LowRankFit
from llmkd.labels.manifest import StorePlan
from llmkd.labels.shards import disk_errors, shard_path, shard_problem, write_shard_file
from llmkd.types import Head

logger = logging.getLogger(__name__)
LOCK = ".lock"
OURS = ("data", HEAD, "head.json", "README.md", "recipe.yaml", manifests.NAME)


class StoreWriter:
    """A context in which shards of one store may be written.

    With several ranks exactly one has `main=True`; the others enter after it (a barrier is the
    caller's) and only write shards. The main one locks the folder for as long as it is open.

    Entering raises RunFolderError where another process writes the same store (naming folder and
    pid), where the folder holds a store of other settings (naming each) or something else
    altogether, and where the disk is full. `overwrite` deletes a store of other settings first,
    never a folder of another kind. Leaving by an error keeps whole shards.
    """

    sums_up_to = 1 << 32  # bytes of a finished store whose hashes are read again: some 4 s

    def __init__(
        self, folder: str | Path, plan: StorePlan, *, main: bool = True, overwrite: bool = False
    ) -> None:
        self.folder, self.plan = Path(folder), plan
        self.main, self.overwrite = main, overwrite
        self._lock: IO[str] | None = None

    def __enter__(self) -> StoreWriter:
        if not self.main:
            found = self._stored()
            if found is None:
                raise ValueError("the main writer must be open before the others enter")
            self._check_same_plan(found)
            return self
        check_folder(self.folder)
        with disk_errors(self.folder / manifests.NAME):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._claim()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def missing_shards(self, sums: bool = True) -> list[int]:
        """Numbers of the shards still to do. One counts as done only if its file and JSON agree
        in size and, with `sums`, SHA-256 (about a second a gigabyte; not those of a finished store
        that is larger than `sums_up_to`)."""
        sums = sums and self.reads_sums
        missing = []
        for number in range(self.plan.shards):
            problem = shard_problem(self.folder, number, self.plan.key, sums)
            if problem and shard_path(self.folder, number).exists():
                logger.warning("%s; it is made anew", problem)
            if problem:
                missing.append(number)
        return missing

    @property
    def done(self) -> bool:
        """Whether the manifest says that everything was written."""
        found = self._stored()
        return found is not None and found["status"] == "done"

    @property
    def reads_sums(self) -> bool:
        """Whether hashes are worth their time: a large finished store is for `label verify`."""
        found = self._stored()
        if found is None or found["status"] != "done":
            return True
        return found["bytes"] <= self.sums_up_to

    @property
    def has_head(self) -> bool:
        """Whether `head.safetensors` is there and whole."""
        return head_facts(self.folder) is not None

    def put_head(self, head: Head | None = None, *, fit: LowRankFit | None = None) -> None:
        """Write the head that `hidden` (`head`) and `lowrank` (`fit`) need, before any shard.

        Nothing happens where it is there already: the plan's key says it is the same teacher's,
        and shards made with the first fit need the first fit.
        """
        if self.has_head:
            return
        if len(self.missing_shards(sums=False)) < self.plan.shards and fit is not None:
            raise RunFolderError.of(
                "label_store",
                str(self.folder / HEAD),
                "is missing or damaged, but shards made with it are there; a new fit is not theirs",
                "restore it from a copy",
                "--overwrite_labels true writes the store anew",
            )
        if head is None and fit is None:
            raise ValueError("a head or a fit")
        write_head(self.folder, head if fit is None else fit.head, fit)  # type: ignore[arg-type]

    def lowrank(self) -> LowRank:
        """The `lowrank` encoding with the stored fit: what every shard must be encoded with."""
        return read_fit(self.folder, self.plan.encoding)

    def write_shard(self, number: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Write shard `number`: dicts `row`, `tokens` (`row_digest`), `length` and the encoding's
        columns, for exactly `plan.shard_rows(number)` in that order (ValueError otherwise).

        Returns file, rows, tokens, bytes, sha256. RunFolderError on a full disk: the shard is
        then absent, the others are whole.
        """
        wanted = self.plan.shard_rows(number).tolist()
        if [int(row["row"]) for row in rows] != wanted:
            raise ValueError(f"shard {number} holds rows {wanted[:3]}..., in that order")
        return write_shard_file(
            self.folder, number, rows, self.plan.encoding.columns, self.plan.key
        )

    def finish(self) -> dict[str, Any]:
        """Check that every shard is there, write the card and, last, the manifest; returns it.

        Main rank only, after the others are through. RunFolderError naming what is missing.
        """
        if not self.main:
            raise ValueError("only the main writer finishes a store")
        found = (
            shard_problem(self.folder, n, self.plan.key, False) for n in range(self.plan.shards)
        )
        problems = [problem for problem in found if problem]
        head = head_facts(self.folder)
        if self.plan.encoding.needs == "hidden" and head is None:
            problems.append(f"{self.folder / HEAD} is missing or damaged")
        if problems:
            raise RunFolderError.of(
                "label_store",
                str(self.folder),
                f"is not whole: {problems[0]} ({len(problems)} such files)",
                "run the same command again: what is whole is kept",
            )
        paths = [shard_path(self.folder, n).with_suffix(".json") for n in range(self.plan.shards)]
        whole = manifests.finished(self.plan, [read_json(path) for path in paths], head)
        with disk_errors(self.folder / "README.md"):
            write_text(self.folder / "README.md", card(whole))
        with disk_errors(self.folder / manifests.NAME):
            write_json(self.folder / manifests.NAME, whole)
        return whole

    def _stored(self) -> dict[str, Any] | None:
        return manifests.read_manifest(self.folder)

    def _claim(self) -> None:
        """Make the folder this plan's, or find that it is."""
        manifest = self.folder / manifests.NAME
        if not manifest.exists() and (strangers := _strangers(self.folder, self.plan.key)):
            raise _foreign(self.folder, f"holds something else: {', '.join(strangers[:5])}")
        with _as_foreign(self.folder):
            found = self._stored()
        if found is not None and found["key"] != self.plan.key and self.overwrite:
            self._empty()
            found = None
        self._check_same_plan(found)
        for left in self.folder.rglob(".*.part"):  # of a process that was killed: we hold the lock
            left.unlink(missing_ok=True)
        (self.folder / "data").mkdir(exist_ok=True)
        if found is None:
            write_json(manifest, manifests.begun(self.plan))

    def _check_same_plan(self, found: dict[str, Any] | None) -> None:
        if found is None or found["key"] == self.plan.key:
            return
        raise _other_settings(self.folder, manifests.differences(found, self.plan.settings))

    def _empty(self) -> None:
        # The manifest last: until then a second try still knows that the folder is ours.
        for name in OURS:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        handle = (self.folder / LOCK).open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                logger.warning("%s cannot be locked here (%s): start one writer only", LOCK, error)
                self._lock = handle
                return
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            handle.close()
            raise RunFolderError.of(
                "label_store",
                str(self.folder),
                f"is being written by another process ({owner})",
                "wait for it, or end it and run the same command again: whole shards are kept",
                "name another folder with --label_store",
            ) from None
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        self._lock = handle

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()  # closing unlocks
            self._lock = None


def check_folder(
    folder: Path, known: Mapping[str, Any] | None = None, *, overwrite: bool = False
) -> None:
    """What entering a `StoreWriter` would refuse and can be seen before a plan is made: a file, a
    folder of another kind and, unless `overwrite`, a store whose settings differ from those
    `known` already. RunFolderError; nothing is written.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise _foreign(folder, "is a file")
    with _as_foreign(folder):
        found = manifests.read_manifest(folder)
    if found is None and (strangers := _strangers(folder)):
        raise _foreign(folder, f"holds something else: {', '.join(strangers[:5])}")
    if found is not None and not overwrite:
        lines = manifests.differences(found, known or {})
        if lines:
            raise _other_settings(folder, lines)


def _strangers(folder: Path, key: str | None = None) -> list[str]:
    """What a folder without a manifest holds; nothing if its shards are those of the plan with
    `key` (somebody deleted a damaged manifest), or of any plan without one."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    inside = [path for path in folder.glob("data/*") if path.name[0] != "."]
    shards = sorted(folder.glob("data/shard-*.json"))
    if names == {"data"} and not inside:
        return []
    if names <= set(OURS) and shards and all(p.name.startswith("shard-") for p in inside):
        try:
            if key is None or read_json(shards[0]).get("key") == key:
                return []
        except (ValueError, AttributeError):
            pass
    return sorted(names)


def _other_settings(folder: Path, lines: Sequence[str]) -> LlmkdError:
    return RunFolderError.of(
        "label_store",
        str(folder),
        "holds labels of other settings:\n    " + "\n    ".join(lines),
        "name another folder with --label_store",
        "--overwrite_labels true deletes them first",
    )


@contextmanager
def _as_foreign(folder: Path) -> Iterator[None]:
    """A manifest that is not ours, or unreadable, is a folder not to write into."""
    try:
        yield
    except RunFolderError:
        raise
    except LlmkdError as error:
        raise _foreign(folder, str(error)) from error


def _foreign(folder: Path, why: str) -> LlmkdError:
    return RunFolderError.of(
        "label_store",
        str(folder),
        why,
        "name an empty or a new folder with --label_store; nothing here is deleted",
    )
