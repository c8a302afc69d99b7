"""`--accelerate_config NAME`: the same command again, under `accelerate launch`; how ranks end."""

from __future__ import annotations

import atexit
import difflib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

from llmkd.errors import RecipeError
from llmkd.shipped import accelerate_configs


def split_launch(words: list[str]) -> tuple[str | None, str | None, list[str]]:
    """Take `--accelerate_config X` and `--num_processes N` (or `=`) out of a command line."""
    found: dict[str, str | None] = {"--accelerate_config": None, "--num_processes": None}
    rest: list[str] = []
    place = 0
    while place < len(words):
        name, _, value = words[place].partition("=")
        if name in found:
            if not value:
                place += 1
                if place >= len(words):
                    raise RecipeError(f"{name} needs a value")
                value = words[place]
            found[name] = value
        else:
            rest.append(words[place])
        place += 1
    return found["--accelerate_config"], found["--num_processes"], rest


def relaunch(verb: str, words: list[str], config: str | None, processes: str | None) -> int:
    """Start `accelerate launch` with a shipped config's name or a path; returns its exit code."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config is not None:
        command += ["--config_file", str(config_path(config))]
    if processes is not None:
        command += ["--num_processes", processes]
    command += ["-m", "llmkd.cli", verb, *words]
    return subprocess.run(command).returncode


def leave(code: int) -> NoReturn:
    """End this process with an exit code; a rank of a process group ends without finalization.

    Threads of gloo outlive `destroy_process_group` wherever something (DeepSpeed does) still holds
    a group. One that lets go of a collective's tensors while the interpreter is finalized dies by
    SIGABRT ("terminate called without an active exception", pytorch/pytorch#179291), and the
    launcher fails a run whose work is all done.
    """
    distributed = sys.modules.get("torch.distributed")
    if not (distributed and distributed.is_available() and distributed.is_initialized()):
        sys.exit(code)
    if code == 0:  # after a mistake other ranks may be anywhere: nothing collective
        distributed.destroy_process_group()
    # as the interpreter's own end, and as multiprocessing's children do: pushes in the background
    # are waited for, trackers and temporary folders end
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def config_path(name: str) -> Path:
    """A path as given, or a shipped config by name; RecipeError lists the names."""
    if Path(name).is_file():
        return Path(name)
    known = accelerate_configs()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    raise RecipeError.of(
        "accelerate_config",
        name,
        "neither a file nor a shipped config",
        *(f"did you mean {match!r}?" for match in near),
        f"shipped: {', '.join(known)}",
    )
