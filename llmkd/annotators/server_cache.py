"""Answers of a server on the disk, and what they cost: a killed or stopped job pays for none twice.

Each answer is one file named by the hash of its request; the ledger of a model is one line an
answer. Several processes may share a folder.
"""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd.errors import AnnotatorError, LlmkdError, RunFolderError
from llmkd.files import digest, write_text


@dataclass(frozen=True)
class Reply:
    """An answer as it is kept: its text, the log-probabilities of its tokens (or None) and the
    tokens it cost.
    """

    text: str
    top: list[dict[str, Any]] | None
    tokens: int


class BudgetSpentError(AnnotatorError):
    """No call more; the budget can be raised."""


class Cache:
    """Replies by request; in memory alone where there is no `folder`."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: dict[str, Reply] = {}

    def get(self, key: str) -> Reply | None:
        """The reply, or None where it is not known. A file that is damaged counts as none."""
        if self.folder is None:
            return self._known.get(key)
        try:
            kept = json.loads(self._path(key).read_text(encoding="utf-8"))
            return Reply(str(kept["text"]), kept["top"], int(kept["tokens"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, reply: Reply, request: dict[str, Any]) -> None:
        """Keep a reply, with the request it answers for whoever reads the file."""
        if self.folder is None:
            self._known[key] = reply
            return
        kept = {"text": reply.text, "top": reply.top, "tokens": reply.tokens, "request": request}
        try:
            # Threads of a process never ask one question twice, and processes write aside.
            write_text(self._path(key), json.dumps(kept, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"


class Budget:
    """Calls and tokens that may be spent on a judge, by its name, together with all other processes
    and earlier runs that have this cache folder.
    """

    def __init__(
        self, folder: Path | None, judge: str, max_calls: int | None, max_tokens: int | None
    ) -> None:
        self.calls = self.tokens = 0
        self.max_calls = math.inf if max_calls is None else max_calls
        self.max_tokens = math.inf if max_tokens is None else max_tokens
        self._path = folder / f"spent-{digest(judge)}.log" if folder else None
        self._read = 0
        self._open = 0  # calls that are under way here
        self._lock = threading.Lock()

    def take(self) -> None:
        """Ask for one call; BudgetSpentError where there is none left. Calls that are under way
        count, their tokens do not: they may exceed the budget by those.
        """
        with self._lock:
            self._catch_up()
            if self.calls + self._open >= self.max_calls or self.tokens >= self.max_tokens:
                raise self.spent_error()
            self._open += 1

    def give_back(self) -> None:
        """The call failed and cost nothing."""
        with self._lock:
            self._open -= 1

    def pay(self, tokens: int) -> None:
        """The call was answered."""
        with self._lock:
            self._open -= 1
            if self._path is None:
                self.calls += 1
                self.tokens += tokens
                return
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # One write of a line, appended: whole whoever else writes at that moment.
                handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    os.write(handle, f"{tokens}\n".encode())
                finally:
                    os.close(handle)
            except OSError as error:
                raise _unwritable(self._path.parent, error) from error
            self._catch_up()

    def spent(self) -> tuple[int, int]:
        """Calls and tokens so far, everybody's."""
        with self._lock:
            self._catch_up()
            return self.calls, self.tokens

    def _catch_up(self) -> None:
        if self._path is None or not self._path.is_file():
            return
        with self._path.open("rb") as handle:
            handle.seek(self._read)
            new = handle.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = [line for line in whole.split() if line.isdigit()]
        self.calls += len(lines)
        self.tokens += sum(map(int, lines))

    def spent_error(self) -> LlmkdError:
        """What was spent, and what can be done."""
        key, value = ("max_calls", self.max_calls)
        if self.tokens >= self.max_tokens:
            key, value = ("max_tokens_spent", self.max_tokens)
        kept = "the answers are kept" if self._path else "name a cache_dir to keep the answers"
        return BudgetSpentError.of(
            key,
            value,
            f"the budget is spent: {self.calls:,} calls, {self.tokens:,} tokens",
            f"raise {key} and run the same command again; {kept}",
        )


def _unwritable(folder: Path, error: OSError) -> LlmkdError:
    problem = f"cannot be written to: {error.strerror or error}"
    return RunFolderError.of("cache_dir", str(folder), problem, "name another folder")
