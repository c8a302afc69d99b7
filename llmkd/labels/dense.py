"""All logits of a head of few classes: a classifier's answers, nothing left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.labels.base import Columns, Layout, Reduced, gather_pieces

DenseDtype = Literal["float32", "float16"]
Per = Literal["token", "row"]
MOST_CLASSES = 4096  # 16 KiB an answer; of more, a few hold all of the mass


@dataclass(frozen=True)
class Dense:
    """Logits [T, C] over C = `shared` classes, one number each.

    `float32` is kept bit for bit (of a narrower teacher too), `float16` rounded (relative error of
    a logit 2**-11 at most). `per` says how many answers a row has: one a `token` (T of them), or
    one a `row` however many tokens it has (T = 1), as sequence classifiers give. A class may have
    logit -inf, which is probability 0. The label serves every temperature.

    Raises RecipeError for more than 4,096 classes and for other dtypes.
    """

    name: ClassVar[str] = "dense"
    needs: ClassVar[Literal["logits", "hidden"]] = "logits"
    temperature: ClassVar[None] = None

    shared: int
    dtype: DenseDtype = "float32"
    per: Per = "token"

    def __post_init__(self) -> None:
        if self.dtype not in get_args(DenseDtype):
            raise RecipeError.of(
                "label_dtype", self.dtype, f"dense knows: {', '.join(get_args(DenseDtype))}"
            )
        if self.per not in get_args(Per) or self.shared < 1:
            raise ValueError(f"per={self.per!r}, {self.shared} classes")
        if self.shared > MOST_CLASSES:
            raise RecipeError.of(
                "label_encoding",
                self.name,
                f"a teacher of {self.shared:,} classes: every logit is stored, so at most "
                f"{MOST_CLASSES:,}",
                "--label_encoding topk keeps the likeliest, sampled is unbiased",
            )

    @property
    def columns(self) -> dict[str, type[np.generic]]:
        """`logits`, position by position."""
        return {"logits": np.float32 if self.dtype == "float32" else np.float16}

    def settings(self) -> dict[str, Any]:
        """The settings beside `shared`, which every store states."""
        return {"name": self.name, "dtype": self.dtype, "per": self.per}

    def reduce(self, values: Tensor, *, row: int = 0, start: int = 0) -> Reduced:
        """Logits [T, >= shared] in the stored type; `row` and `start` do not matter here."""
        if values.shape[-1] < self.shared:
            raise ValueError(f"{values.shape[-1]} logits for {self.shared} classes")
        values_TC = values.detach()[:, : self.shared]
        # a copy always: `values` may be a buffer that the next piece takes over
        kind = torch.float32 if self.dtype == "float32" else torch.float16
        logits_TC = values_TC.to(kind, copy=True)
        return {
            "logits": logits_TC,
            "finite": values_TC.amax(-1).isfinite(),  # else NaN, inf or -inf alone: no softmax
            "fits": ~(logits_TC.isinf() & values_TC.isfinite()).any(-1),
        }

    def pack(self, *pieces: Reduced) -> dict[str, np.ndarray]:
        """The row's logits, flat. RecipeError for a logit too large for the stored type."""
        whole = gather_pieces(pieces)
        if self.per == "row" and len(whole["logits"]) != 1:
            raise ValueError(f"one answer a row, not {len(whole['logits'])}")
        if not whole["fits"].all():
            raise RecipeError.of(
                "label_dtype",
                self.dtype,
                f"a logit of the teacher is beyond {np.finfo(self.dtype).max:,.0f}, the largest "
                "number of that type",
                "--label_dtype float32",
                "check the teacher: logits of a trained head are some tens",
            )
        return {"logits": whole["logits"].reshape(-1)}

    def encode(self, values: Tensor, *, row: int = 0) -> dict[str, np.ndarray]:
        """`pack(reduce(values))`: the columns of one whole row of logits [T, >= shared]."""
        return self.pack(self.reduce(values, row=row))

    def decode(self, rows: Sequence[Columns], layout: Layout) -> Tensor:
        """Logits float32 [B, width, C]; 0 on padding. ValueError where a column has not `shared`
        numbers a position, or no distribution in it (damage).
        """
        out = np.zeros((layout.batch * layout.width, self.shared), np.float32)
        for row, at in zip(rows, layout.slices(), strict=True):
            if len(row["logits"]) != (at.stop - at.start) * self.shared:
                raise ValueError("the numbers of positions, classes and logits do not fit together")
            out[at] = row["logits"].reshape(-1, self.shared)
        if not np.isfinite(out.max(-1)).all():
            raise ValueError("logits that are NaN, infinite or all -inf")
        return torch.from_numpy(out).view(layout.batch, layout.width, self.shared)


def answer_unit(settings: Mapping[str, Any]) -> str:
    """What a store's `tokens` counts, by its encoding's settings: `token`, or `answer` where a
    row of many tokens has one label.
    """
    return "answer" if settings.get("per") == "row" else "token"
