"""A run folder describes itself: what made it, how far it came, what it cost."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from llmkd import __version__
from llmkd.errors import MissingFileError, RunFolderError
from llmkd.files import digest, read_json, write_json, write_text
from llmkd.labels.config import WRITING_KEYS

LOCK = ".lock"  # in a run's folder: whoever holds it works there
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed")
# Keys that decide where and how a run is written down, not what it computes.
NOT_THE_RESULT = (
    "output_dir logging_dir logging_steps logging_first_step logging_strategy disable_tqdm "
    "report_to run_name project push_to_hub hub_token hub_private_repo hub_model_id hub_strategy "
    "hub_always_push hub_revision save_steps save_strategy save_total_limit save_only_model "
    "resume_from_checkpoint overwrite_run log_level log_level_replica dataloader_num_workers "
    "do_train do_eval do_predict arms local_rank trackio_space_id general_stages teacher_floor"
).split() + list(WRITING_KEYS)


def result_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a result, secrets and book-keeping left out."""
    return {key: value for key, value in settings.items() if key not in NOT_THE_RESULT}


def settings_key(settings: dict[str, Any], *facts: Any) -> str:
    """Hash of the settings that decide a result, and of further `facts` (data, teacher)."""
    return digest([result_settings(settings), *facts])


class RunFolder:
    """One model's folder; only the main process writes."""

    def __init__(self, path: Path, *, main: bool) -> None:
        self.path = path
        self.main = main
        self._began = time.monotonic()

    def facts(self) -> dict[str, Any] | None:
        """`run.json`, or None where no run began."""
        return read_json(self.path / "run.json")

    def finished(self, key: str) -> bool:
        """Whether this very run stands here, done."""
        facts = self.facts()
        return bool(facts and facts["status"] == "done" and facts["key"] == key)

    def finished_ever(self) -> bool:
        """Whether some run stands here, done."""
        return (self.facts() or {}).get("status") == "done"

    def claim(self, key: str | None, settings: dict[str, Any], *, rows: str | None = None) -> None:
        """Refuse a folder that holds another run or other files; RunFolderError says what differs.

        Before the teacher is known `key` is None, and the settings and, once it is known, the text
        (`rows`, its fingerprint) are compared. Safe on every rank: nothing is written.
        """
        facts = self.facts()
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError.of("output_dir", str(self.path), "is a file", "name a folder")
        if facts is None:
            strangers = (
                [p.name for p in self.path.glob("*.safetensors")] if self.path.is_dir() else []
            )
            if strangers:
                raise RunFolderError.of(
                    "output_dir",
                    str(self.path),
                    f"holds a model that no llmkd run wrote ({strangers[0]})",
                    "choose another --output_dir",
                )
            return
        old, new = facts.get("settings", {}), json.loads(json.dumps(settings, default=str))
        changed = [name for name in {*old, *new} if old.get(name) != new.get(name)]
        changed = sorted(name for name in changed if name not in NOT_THE_RESULT)
        same_rows = rows is None or facts["data"]["fingerprint"] == rows
        if facts["key"] == key or (key is None and not changed and same_rows):
            return
        shown = [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in changed[:4]]
        if not same_rows:
            was = facts["data"]["fingerprint"]
            shown.append(f"rows (text, tokenizer and packing): {was!r} -> {rows!r}")
        raise RunFolderError.of(
            "output_dir",
            str(self.path),
            f"holds another recipe's run ({', '.join(shown) or _not_settings(facts)})",
            "choose another --output_dir",
            "--overwrite_run true replaces the old run",
        )

    def begin(self, key: str, facts: dict[str, Any], recipe: dict[str, Any]) -> None:
        """Write `recipe.yaml` and `run.json` with status running; keeps the wall time of earlier
        parts.
        """
        self._began = time.monotonic()
        if not self.main:
            return
        before = self.facts() or {}
        same = before.get("key") == key
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
        self._write(
            {
                "schema": 1,
                "status": "running",
                "key": key,
                **facts,
                "versions": versions(),
                "git": git_revision(),
                "command": " ".join(Path(a).name if i == 0 else a for i, a in enumerate(command())),
                "wall_seconds": before.get("wall_seconds", 0.0) if same else 0.0,
                "resumed": before.get("resumed", 0) + 1 if same else 0,
            }
        )

    def clear(self, named: Mapping[str, str]) -> None:
        """Delete an old run (only after `claim` refused it and overwrite_run was set). The folder
        itself stays, and with it the lock of whoever deletes.

        RunFolderError, on every rank and before anything is deleted, where something `named` (key
        to path) that the new run reads would go with it.
        """
        check_outside(self.path, named)
        PartialState().wait_for_everyone()  # all have looked before anything is gone
        if self.main and self.path.is_dir():
            for path in [path for path in self.path.iterdir() if path.name != LOCK]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder; RunFolderError, on every rank, where another process does."""
        handle, free = None, True
        if self.main:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / LOCK).open("w")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        try:
            if not broadcast_object_list([free])[0]:
                raise RunFolderError.of(
                    "output_dir",
                    str(self.path),
                    "another process works on a run in this folder now",
                    "wait for it",
                    "choose another --output_dir",
                )
            yield
        finally:
            if handle is not None:
                handle.close()

    def keep_time(self) -> None:
        """Write down the wall time so far, so that a killed part of a run counts too."""
        if self.main:
            self._write(self._timed())
            self._began = time.monotonic()

    def end(self, **facts: Any) -> None:
        """Add what the run cost and mark it done."""
        if self.main:
            self._write({**self._timed(), **facts, "status": "done"})

    def _timed(self) -> dict[str, Any]:
        known = self.facts() or {}
        seconds = known.get("wall_seconds", 0.0) + time.monotonic() - self._began
        return {
            **known,
            "wall_seconds": round(seconds, 1),
            "peak_memory_bytes": max(peak_memory(), known.get("peak_memory_bytes", 0)),
        }

    def _write(self, facts: dict[str, Any]) -> None:
        write_json(self.path / "run.json", facts)


def _not_settings(facts: dict[str, Any]) -> str:
    """What else makes another run, as the one in the folder had it."""
    teacher, student = facts.get("teacher") or {}, facts.get("student") or {}
    known = {
        "rows": (facts.get("data") or {}).get("fingerprint"),
        "teacher": teacher.get("fingerprint"),
        "student": student.get("source"),
        "rows of a step": (facts.get("schedule") or {}).get("batch_rows"),
        "selected rows": (facts.get("data") or {}).get("selected_rows"),
    }
    had = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
    return f"of the same settings, but not of the same models, rows or ranks; it had {had}"


def check_outside(folder: Path, named: Mapping[str, str]) -> None:
    """RunFolderError where a path in `named` (key to path) lies in a folder that is to be deleted,
    as it is written or once links are followed.
    """
    for key, name in named.items():
        for place, path in (
            (Path(os.path.abspath(folder)), Path(os.path.abspath(Path(name).expanduser()))),
            (folder.resolve(), Path(name).expanduser().resolve()),
        ):
            if path.is_relative_to(place):
                raise RunFolderError.of(
                    key,
                    name,
                    f"lies in output_dir {str(folder)!r}, which overwrite_run would delete with it",
                    "move it out of there",
                    "choose another --output_dir",
                )


def check_writable(key: str, folder: Path) -> None:
    """RunFolderError where `folder` is a file or nothing can be written there; leaves nothing."""
    place = folder.absolute()
    try:
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            what = "is a file" if place == folder.absolute() else f"lies below a file ({place})"
            raise RunFolderError.of(key, str(folder), what, "name a folder")
        with tempfile.TemporaryFile(dir=place):
            pass
    except RunFolderError:
        raise
    except OSError as error:
        problem = f"cannot be written to ({place}: {error.strerror or error})"
        raise RunFolderError.of(key, str(folder), problem, "choose another folder") from error


def recipe_to_resume(folder: str) -> tuple[str, list[str]]:
    """The kind of run in a folder and the command line that goes on with it; an arm's folder, a
    teacher's, a stage's or an iteration's means the run it belongs to. MissingFileError where there
    is none.
    """
    path = Path(folder).absolute()
    if path.parent.name == "stages" and (path.parent.parent / "recipe.yaml").is_file():
        path = path.parent.parent
    if path.name == "model" and path.parent.name.startswith("iteration-"):
        path = path.parent
    parent = read_json(path.parent / "run.json") or {}
    if parent.get("kind") == "irepo" and (path.name == "start" or path.name[:10] == "iteration-"):
        path = path.parent
    if (
        path.name in [*parent.get("arms", []), "teacher", "shuffled"]
        and (path.parent / "recipe.yaml").is_file()
    ):
        path = path.parent
    facts = read_json(path / "run.json") or {}
    if not (path / "recipe.yaml").is_file():
        raise MissingFileError.of("folder", folder, "holds no recipe.yaml", "name a run folder")
    kind = facts.get("kind", "salt")
    if kind == "stage":
        raise MissingFileError.of(
            "folder", folder, "is a stage that several runs may share", "name the folder of a run"
        )
    return kind, [str(path / "recipe.yaml"), "--output_dir", str(path)]


def peak_memory() -> int:
    """Largest memory of this process so far in bytes: the GPU's where there is one, else
    resident.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def versions() -> dict[str, str]:
    """Installed versions of what decides a result."""
    found = {"llmkd": __version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Revision of the checkout llmkd runs from, with + where it was changed; None for a wheel."""
    here = Path(__file__).resolve().parent.parent.parent
    if not (here / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> list[str]:
    """The command line without any token's value."""
    words, hidden = [], False
    for word in sys.argv:
        words.append("***" if hidden else word.split("=")[0] + "=***" if _secret(word) else word)
        hidden = word.lstrip("-").replace("-", "_") == "hub_token"
    return words


def _secret(word: str) -> bool:
    return "=" in word and word.lstrip("-").replace("-", "_").startswith("hub_token=")


def check_room(folder: Path, needed: int) -> None:
    """RunFolderError where the disk below `folder` has less than `needed` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise RunFolderError.of(
            "output_dir", str(folder), f"cannot be written to ({place})", "choose another folder"
        )
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RunFolderError.of(
            "output_dir",
            str(folder),
            f"has {free / 2**30:.1f} GiB free, the run needs about {needed / 2**30:.1f} GiB for "
            f"its "
            "model and checkpoints",
            "choose a folder on a larger disk",
            "lower save_total_limit, or set save_strategy to no",
        )
