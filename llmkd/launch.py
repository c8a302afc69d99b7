"""`--accelerate_config NAME`: the same command again, under `accelerate launch`."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path

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
