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
    weight begins as B^T carries their directions back (the norm that follows loses the scale).
    Ours, not the paper's. RecipeError as `check_embeddings`, and for a student with other tables.
    """
    words = teacher.get_input_embeddings().weight
    width, wide = student.get_input_embeddings().weight.shape[1], words.shape[1]
    check_embeddings(student.config, teacher.config)
    wanted = words.to(torch.float64)
    _, directions = torch.linalg.eigh(wanted.T @ wanted)  # ascending
    basis = directions[:, -width:].flip(-1).T
    # An eigenvector's sign is the library's choice: fixed, so that all machines begin alike.
    largest = basis.abs().argmax(-1, keepdim=True)
    basis = basis * basis.gather(-1, largest).sign()
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


def check_embeddings(student: Any, teacher: Any) -> None:
    """RecipeError where the student (a config) is wider than the teacher, or one of them has
    embeddings of another width than its hidden states.
    """
    own, theirs = student.get_text_config(), teacher.get_text_config()
    problem = None
    if own.hidden_size > theirs.hidden_size:
        problem = (
            f"the student's {own.hidden_size} dimensions are more than the teacher's "
            f"{theirs.hidden_size}"
        )
    for config in (own, theirs):
        inner = getattr(config, "embedding_size", config.hidden_size)
        if inner != config.hidden_size:
            problem = f"{config.model_type} projects embeddings of {inner} to {config.hidden_size}"
    if problem:
        raise RecipeError.of("student_embeddings", "pca", problem, "--student_embeddings random")


def _tables(model: Any) -> list[tuple[str, Any]]:
    """Embedding tables of a body, by name."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
