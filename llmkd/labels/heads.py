"""`head.safetensors`: what makes logits of stored hidden states, kept once for a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkd.errors import DataError
from llmkd.files import read_json, write_json
from llmkd.labels.encodings import AnyEncoding
from llmkd.labels.hidden import LowRank
from llmkd.labels.lowrank import LowRankFit
from llmkd.labels.shards import disk_errors, file_sha256, room_on_disk
from llmkd.types import Head

NAME = "head.safetensors"


def write_head(folder: Path, head: Head, fit: LowRankFit | None = None) -> dict[str, Any]:
    """Write the head (of a fit: the narrower one, `encoder` and `mean` beside it), then
    `head.json` with its SHA-256, bytes, scale and softcap, which is returned."""
    head = head if fit is None else fit.head
    tensors = {"weight": head.weight.detach()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach()
    if fit is not None:
        tensors |= {"encoder": fit.encoder, "mean": fit.mean}
    path = folder / NAME
    with room_on_disk(path) as aside:
        # .contiguous(): a tied head may be a view; .cpu(): safetensors keeps no device
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, str(aside))
    facts = {
        "file": NAME,
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "scale": head.scale,
        "softcap": head.softcap,
    }
    with disk_errors(path.with_suffix(".json")):
        write_json(path.with_suffix(".json"), facts)
    return facts


def head_facts(folder: Path) -> dict[str, Any] | None:
    """`head.json` if it and the file it vouches for are there and agree; else None."""
    path = folder / NAME
    try:
        facts = read_json(path.with_suffix(".json"))
    except ValueError:
        return None
    whole = facts and path.is_file() and path.stat().st_size == facts["bytes"]
    return facts if whole and file_sha256(path) == facts["sha256"] else None


def read_head(folder: Path, facts: dict[str, Any]) -> Head:
    """The head on the CPU, in its stored type. DataError where the file is damaged."""
    tensors = _tensors(folder)
    return Head(tensors["weight"], tensors.get("bias"), facts["scale"], facts["softcap"])


def read_fit(folder: Path, encoding: AnyEncoding) -> LowRank:
    """The `lowrank` encoding with the fit that was stored, ready to encode further rows."""
    assert isinstance(encoding, LowRank)
    tensors = _tensors(folder)
    return LowRank(
        encoding.rank, encoding.shared, encoding.dtype, tensors["encoder"], tensors["mean"]
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(folder / NAME))
    except (SafetensorError, OSError) as error:
        raise DataError.of(
            "label_store",
            str(folder / NAME),
            f"cannot be read: {error}",
            "restore it from a copy, or write the store anew: every label needs it",
        ) from error
