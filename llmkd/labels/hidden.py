"""The teacher's final hidden states, whole or projected: every probability at H or r numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.labels.base import Columns, Layout, Reduced, gather_pieces
from llmkd.types import Head

HiddenDtype = Literal["float32", "bfloat16", "int8"]
GROUP = 64  # numbers that share an int8 step


@dataclass(frozen=True)
class Hidden:
    """Hidden states [T, H] as the head reads them (after the final norm).

    `float32` is kept bit for bit, `bfloat16` rounded (column uint16: the bits), `int8` rounded to
    127ths of the largest magnitude among 64 neighbours, with that step as float32 in `scale` (error
    of a number: half a step at most). Not one step a token: a few channels of a final hidden state
    are 20 times the others and would set everyone's step (SmolLM2-135M: KL .015 against .003 nats).
    The label serves every temperature. Raises RecipeError for other dtypes.
    """

    name: ClassVar[str] = "hidden"
    needs: ClassVar[Literal["logits", "hidden"]] = "hidden"
    temperature: ClassVar[None] = None

    width: int
    shared: int
    dtype: HiddenDtype = "int8"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    @property
    def columns(self) -> dict[str, type[np.generic]]:
        """`hidden`, and `scale` for int8."""
        return number_columns(self.dtype)

    def settings(self) -> dict[str, Any]:
        """The settings beside `shared`, which every store states."""
        return {"name": self.name, "dtype": self.dtype, "width": self.width}

    def reduce(self, values: Tensor, *, row: int = 0, start: int = 0) -> Reduced:
        """Quantised hidden states [T, H]; `row` and `start` do not matter here."""
        return quantise(values.detach(), self.dtype)

    def pack(self, *pieces: Reduced) -> dict[str, np.ndarray]:
        """Flattened columns."""
        return flat_columns(pieces, self.columns)

    def encode(self, values: Tensor, *, row: int = 0) -> dict[str, np.ndarray]:
        """`pack(reduce(values))`: the columns of one whole row of hidden states [T, H]."""
        return self.pack(self.reduce(values, row=row))

    def decode(self, rows: Sequence[Columns], layout: Layout) -> Tensor:
        """Hidden states [B, width, H], bfloat16 where stored so, else float32; 0 on padding."""
        return restore(rows, layout, self.width, self.dtype)


@dataclass(frozen=True, eq=False)
class LowRank:
    """Hidden states projected to `rank` coefficients by `fit_lowrank`, stored as `Hidden` is.

    `encoder` [H, r] and `mean` [H] are needed to encode only; `head` is the narrower head
    [V, r] that makes logits of coefficients.
    """

    name: ClassVar[str] = "lowrank"
    needs: ClassVar[Literal["logits", "hidden"]] = "hidden"
    temperature: ClassVar[None] = None

    rank: int
    shared: int
    dtype: HiddenDtype = "int8"
    encoder: Tensor | None = None
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.rank < 1:
            raise RecipeError.of("label_rank", self.rank, "must be at least 1")

    @property
    def columns(self) -> dict[str, type[np.generic]]:
        """`hidden` (the coefficients), and `scale` for int8."""
        return number_columns(self.dtype)

    def settings(self) -> dict[str, Any]:
        """The settings beside `shared`, which every store states. Not the fit: see the head."""
        return {"name": self.name, "dtype": self.dtype, "rank": self.rank}

    def reduce(self, values: Tensor, *, row: int = 0, start: int = 0) -> Reduced:
        """Quantised coefficients (h - mean) encoder of hidden states [T, H], in float32."""
        if self.encoder is None or self.mean is None:
            raise ValueError("lowrank: encode needs the fit; see fit_lowrank and its codec()")
        values = values.detach().float() - self.mean.to(values.device, torch.float32)
        return quantise(values @ self.encoder.to(values.device, torch.float32), self.dtype)

    def pack(self, *pieces: Reduced) -> dict[str, np.ndarray]:
        """Flattened columns."""
        return flat_columns(pieces, self.columns)

    def encode(self, values: Tensor, *, row: int = 0) -> dict[str, np.ndarray]:
        """`pack(reduce(values))`: the columns of one whole row of hidden states [T, H]."""
        return self.pack(self.reduce(values, row=row))

    def decode(self, rows: Sequence[Columns], layout: Layout) -> Tensor:
        """Coefficients [B, width, r], bfloat16 where stored so, else float32; 0 on padding."""
        return restore(rows, layout, self.rank, self.dtype)


def check_dtype(dtype: str) -> None:
    """RecipeError for a dtype that is not stored."""
    if dtype not in get_args(HiddenDtype):
        raise RecipeError.of("label_dtype", dtype, f"known: {', '.join(get_args(HiddenDtype))}")


def number_columns(dtype: HiddenDtype) -> dict[str, type[np.generic]]:
    """The columns of one number a coefficient."""
    if dtype == "int8":
        return {"hidden": np.int8, "scale": np.float32}
    return {"hidden": np.float32 if dtype == "float32" else np.uint16}


def flat_columns(
    pieces: Sequence[Reduced], columns: Mapping[str, type[np.generic]]
) -> dict[str, np.ndarray]:
    """The pieces of a row, flat; bfloat16's bits, which torch calls int16, as uint16."""
    whole = gather_pieces(pieces)
    return {name: whole[name].reshape(-1).view(kind) for name, kind in columns.items()}


def quantise(values_TH: Tensor, dtype: HiddenDtype) -> Reduced:
    """`hidden` [T, H] in the stored type, `finite` [T] and, for int8, `scale` [T]."""
    finite_T = values_TH.isfinite().all(-1)
    if dtype == "float32":
        return {"hidden": values_TH.float(), "finite": finite_T}
    if dtype == "bfloat16":
        return {"hidden": values_TH.bfloat16().contiguous().view(torch.int16), "finite": finite_T}
    values_TH = values_TH.float()
    tokens, width = values_TH.shape
    padded_TG = torch.nn.functional.pad(values_TH, (0, -width % GROUP)).view(tokens, -1, GROUP)
    scale_TG = (padded_TG.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    codes_TG = (padded_TG / scale_TG[..., None]).round_().clamp_(-127, 127).to(torch.int8)
    codes_TH = codes_TG.flatten(1)[:, :width]
    return {"hidden": codes_TH, "scale": scale_TG, "finite": finite_T}


def restore(rows: Sequence[Columns], layout: Layout, width: int, dtype: HiddenDtype) -> Tensor:
    """The numbers back, [B, layout.width, width]. ValueError where columns are of odd length."""
    kind = np.int16 if dtype == "bfloat16" else np.float32
    out = np.zeros((layout.batch * layout.width, width), kind)
    for row, at in zip(rows, layout.slices(), strict=True):
        if len(row["hidden"]) != (at.stop - at.start) * width:
            raise ValueError("the numbers of tokens and coefficients do not fit together")
        numbers_TH = row["hidden"].reshape(-1, width)
        if dtype == "int8":
            _multiply(numbers_TH, row["scale"].reshape(len(numbers_TH), -1), out[at])
        else:
            out[at] = numbers_TH.view(kind)
    numbers = torch.from_numpy(out).view(layout.batch, layout.width, width)
    return numbers.view(torch.bfloat16) if dtype == "bfloat16" else numbers


def _multiply(codes_TH: np.ndarray, scale_TG: np.ndarray, out_TH: np.ndarray) -> None:
    tokens, width = codes_TH.shape
    if width % GROUP:
        np.multiply(codes_TH, np.repeat(scale_TG, GROUP, axis=1)[:, :width], out=out_TH)
    else:
        shape = (tokens, width // GROUP, GROUP)
        np.multiply(codes_TH.reshape(shape), scale_TG[..., None], out=out_TH.reshape(shape))


def wider_head(head: Head, dtype: HiddenDtype) -> Head:
    """`head` in the wider of its own type and the labels', so that their product is defined."""
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    kind = torch.promote_types(head.weight.dtype, stored)
    bias = None if head.bias is None else head.bias.to(kind)
    return Head(head.weight.to(kind), bias, head.scale, head.softcap)
