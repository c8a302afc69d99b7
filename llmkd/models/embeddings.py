"""A narrow student's first embeddings: the teacher's, in the directions where they differ most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkd.errors import RecipeError


@torch.no_grad()
def take_embeddings(student: Any, teacher: Any) -> Tensor:
    """Write the teacher's embeddings, cut to the student's width, into `student`; returns the basis
    B [D_student, D_teacher] with orthonormal rows.

    B holds the leading principal directions of the teacher's word embeddings (not centred, all
    entries alike). Every embedding table of the same name and length (words, positions, types)
    becomes table B^T, scaled to the size of the student's own first weights; a projection whose
    weight begins as B^T carries them back. Ours, not the paper's. RecipeError for a student that is
    wider than the teacher, or has other tables.
    """
    words = teacher.get_input_embeddings().weight
    width, wide = student.get_input_embeddings().weight.shape[1], words.shape[1]
    if width > wide:
        raise RecipeError.of(
            "student_embeddings",
            "pca",
            f"the student's {width} dimensions are more than the teacher's {wide}",
            "--student_embeddings random",
        )
    wanted = words.to(torch.float64)
    _, directions = torch.linalg.eigh(wanted.T @ wanted)  # ascending
    basis = directions[:, -width:].flip(-1).T
    scale = float(student.get_input_embeddings().weight.std()) / float((wanted @ basis.T).std())
    theirs = {name: table.weight for name, table in _tables(teacher)}
    cut: dict[str, Tensor] = {}
    for name, table in _tables(student):
        source = theirs.get(name)
        if source is None or source.shape != (len(table.weight), wide):
            found = "missing" if source is None else tuple(source.shape)
            raise RecipeError.of(
                "student_embeddings",
                "pca",
                f"{name} is {tuple(table.weight.shape)}, the teacher's {found}",
                "--student_embeddings random",
            )
        cut[name] = source.to(torch.float64) @ basis.T * scale
    for name, table in _tables(student):  # only once all are known to fit
        if (pad := table.padding_idx) is not None:
            cut[name][pad] = 0.0
        table.weight.copy_(cut[name].to(table.weight.dtype))
    return basis.to(words.dtype)


def _tables(model: Any) -> list[tuple[str, Any]]:
    """Embedding tables of a body, by name."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
