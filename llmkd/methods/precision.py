"""A word of warning where a recipe asks a CPU for bf16 that it has no kernels for."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

X86 = ("x86_64", "amd64", "i386", "i686")
WEIGHTS = ("dtype", "teacher_dtype", "sampling_dtype")
NARROW = ("bfloat16", "bf16")


def slow_bf16(use_cpu: bool = False) -> bool:
    """Whether training here multiplies bfloat16 far slower than float32: on x86 without AVX-512,
    where torch has a plain loop for it (an AMD EPYC with AVX2, torch 2.13: 1.2 against 72 GFLOPS).
    """
    if torch.accelerator.is_available() and not use_cpu:
        return False
    return platform.machine().lower() in X86 and "AVX512" not in _capability()


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def warn_of_slow_bf16(settings: Mapping[str, Any]) -> None:
    """Say once which of a recipe's settings ask for it; nothing is changed: precision belongs to
    what a run and a label store are, and those go on wherever they were begun.
    """
    asked = {"bf16": "false"} if settings.get("bf16") else {}
    asked |= {key: "float32" for key in WEIGHTS if settings.get(key) in NARROW}
    if asked and slow_bf16(bool(settings.get("use_cpu"))):
        _say_once(tuple(asked.items()))


@cache
def _say_once(asked: tuple[tuple[str, str], ...]) -> None:
    if os.environ.get("RANK", "0") == "0":
        keys = ", ".join(key for key, _ in asked)
        ways = " ".join(f"--{key} {value}" for key, value in asked)
        print(
            f"{keys}: bfloat16 takes this CPU, which has no AVX-512, tens of times as long as "
            f"float32\n  - {ways}",
            file=sys.stderr,
        )
