"""Recipes and accelerate configs: in the repository of a checkout, inside the package of a
wheel.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def shipped(name: str) -> Path:
    """The folder `recipes` or `accelerate_configs`, wherever this installation keeps it."""
    checkout = HERE.parent / name
    return checkout if checkout.is_dir() else HERE / "_shipped" / name


def shipped_recipes() -> list[Path]:
    """Every recipe that comes with llmkd."""
    return sorted(shipped("recipes").glob("*/*.yaml"))


def accelerate_configs() -> dict[str, Path]:
    """Name to path: `zero2`, `cpu/zero2`, ..."""
    root = shipped("accelerate_configs")
    return {str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.yaml"))}
