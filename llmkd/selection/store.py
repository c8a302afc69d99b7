"""Scores as a column on disk, so that a selection is made once and can be looked at."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset

from llmkd.errors import DataError, MissingFileError


def save_scores(path: Path, scores: np.ndarray, fingerprint: str, selection: str = "") -> None:
    """Write `row`, `score`, the name of the selection and the fingerprint of the rows they belong
    to, whole or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    table = Dataset.from_dict(
        {
            "row": np.arange(len(scores)),
            "score": scores.astype(np.float64),
            "rows_fingerprint": [fingerprint] * len(scores),
            "selection": [selection] * len(scores),
        }
    )
    table.to_parquet(str(aside))
    with aside.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(aside, path)


def read_scores(path: Path, rows: int, fingerprint: str, selection: str = "") -> np.ndarray:
    """Scores in row order; DataError where they belong to other rows or another selection.

    A file without names of selections, or a call without one, is not asked for it.
    """
    if not path.is_file():
        raise MissingFileError.of(
            "selection_scores", str(path), "no such file", "make it with `llmkd select RECIPE`"
        )
    table = load_dataset("parquet", data_files=str(path), split="train")
    marks = set(table.unique("rows_fingerprint")) if len(table) else set()
    if marks != {fingerprint} or len(table) != rows:
        raise DataError.of(
            "selection_scores",
            str(path),
            f"{len(table)} scores for rows {sorted(marks)}, but this run has {rows} rows "
            f"{fingerprint}: text, tokenizer or packing differ",
            "make them anew with `llmkd select RECIPE`",
        )
    names = set(table.unique("selection")) if "selection" in table.column_names else {""}
    if selection and not names <= {"", selection}:
        raise DataError.of(
            "selection_scores",
            str(path),
            f"holds scores of {', '.join(sorted(names))}, but this run selects by {selection}",
            f"make them anew with `llmkd select RECIPE --selection {selection}`",
        )
    return np.asarray(table["score"], dtype=np.float64)


def histogram(scores: np.ndarray, kept: np.ndarray, bins: int = 12, width: int = 40) -> str:
    """Scores as text bars; `#` are rows that were kept, `.` the others."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return "no row has a score"
    edges = np.histogram_bin_edges(finite, bins=bins)
    everyone, _ = np.histogram(finite, edges)
    chosen, _ = np.histogram(scores[kept], edges)
    tallest = max(everyone.max(), 1)
    lines = []
    for low, high, count, mine in zip(edges, edges[1:], everyone, chosen, strict=False):
        bar = round(width * count / tallest)
        marks = round(width * mine / tallest)
        lines.append(
            f"{low:7.3f} to {high:7.3f}  {'#' * marks}{'.' * (bar - marks)}  {count} ({mine} kept)"
        )
    lines.append(f"{len(scores) - len(finite)} of {len(scores)} rows have no score")
    return "\n".join(lines)
