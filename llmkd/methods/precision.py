"""bf16 where it pays: not on a CPU without kernels for it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

X86 = ("x86_64", "amd64", "i386", "i686")


def slow_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 far slower than float32: x86 without AVX-512, where
    torch has a plain loop for it (AMD EPYC with AVX2, torch 2.13: 1.2 against 72 GFLOPS).
    """
    return platform.machine().lower() in X86 and "AVX512" not in _capability()


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a recipe with `bf16` off where it would train on a CPU that is slow at it."""
    on_cpu = settings.get("use_cpu") or not torch.accelerator.is_available()
    if not (settings.get("bf16") and on_cpu and slow_bf16()):
        return dict(settings)
    _say_once()
    return {**settings, "bf16": False}


@cache
def _say_once() -> None:
    if os.environ.get("RANK", "0") == "0":
        problem = "this CPU has no AVX-512, and torch would take tens of times as long"
        print(f"bf16: true: {problem}; training in float32", file=sys.stderr)
