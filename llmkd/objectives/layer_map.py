"""Which teacher layer each student layer learns from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from llmkd.errors import RecipeError

LAYER_MAPS = ("uniform", "last")
KNOWN = f"known: {', '.join(LAYER_MAPS)}, or a list of teacher layers"


def check_layer_map(how: object, key: str) -> None:
    """RecipeError for what can be no map, whatever the models; the rest waits for their depths."""
    if not (isinstance(how, list | tuple) and how) and how not in LAYER_MAPS:
        raise RecipeError.of(key, how, "unknown", KNOWN)


def layer_map(
    students: int, teachers: int, how: str | Sequence[int] = "uniform", *, key: str = "layer_map"
) -> tuple[int, ...]:
    """The teacher layer, counted from 1, of each of the M = `students` layers; N = `teachers`.

    `uniform`: student layer i takes i * N / M (TinyBERT; 4 of 12: 3, 6, 9, 12), so M must divide N.
    `last`: the last M layers, N - M + 1 .. N. A list: M ascending numbers in 1..N, taken as it is.
    Raises RecipeError that names `key` for anything else, `student_layers` where M is not in 1..N.
    """
    if not 1 <= students <= teachers:
        raise RecipeError.of(
            "student_layers",
            students,
            f"must lie in 1..{teachers}, the layers of the teacher",
            f"--student_layers {teachers} or fewer",
        )
    if not isinstance(how, str | list | tuple):
        raise RecipeError.of(key, how, "unknown", KNOWN)
    if not isinstance(how, str):
        return _checked(students, teachers, how, key)
    if how == "last":
        return tuple(range(teachers - students + 1, teachers + 1))
    if how != "uniform":
        raise RecipeError.of(key, how, "unknown", KNOWN)
    if teachers % students:
        near = [(2 * i * teachers + students) // (2 * students) for i in range(1, students + 1)]
        fitting = [str(m) for m in range(1, teachers + 1) if teachers % m == 0]
        raise RecipeError.of(
            key,
            how,
            f"{teachers} teacher layers cannot be shared out evenly among {students}",
            f"an explicit list: --{key} '{near}'",
            f"the last {students}: --{key} last",
            f"a number of layers that divides {teachers}: --student_layers {', '.join(fitting)}",
        )
    return tuple(i * teachers // students for i in range(1, students + 1))


def _checked(students: int, teachers: int, layers: Sequence[int], key: str) -> tuple[int, ...]:
    layers = list(layers)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in layers)
    problem = None
    if not whole or not all(1 <= n <= teachers for n in layers):
        problem = f"teacher layers are whole numbers in 1..{teachers}"
    elif len(layers) != students:
        problem = f"names {len(layers)} layers, but the student has {students}"
    elif any(b <= a for a, b in pairwise(layers)):
        problem = "must ascend, each teacher layer once"
    if problem:
        raise RecipeError.of(
            key,
            layers,
            problem,
            f"list {students} ascending numbers in 1..{teachers}",
            f"--{key} uniform, or last",
        )
    return tuple(layers)
