"""Which r directions of a hidden state the teacher's distribution depends on most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkd.errors import RecipeError, TeacherError
from llmkd.labels.hidden import HiddenDtype, LowRank
from llmkd.types import Head

CHUNK = 1 << 25  # float32 logits made at once while fitting: 128 MB


@dataclass(frozen=True, eq=False)
class LowRankFit:
    """`encoder` [H, r], `mean` [H] and the narrower `head`: h is about mean + (what coefficients
    c = (h - mean) encoder say), its logits about `head(c)`. All float32 on the CPU.

    `expected_kl` is the second-order KL(teacher || label) in nats a token on the sample that the
    dropped directions cost, before quantisation.
    """

    encoder: Tensor
    mean: Tensor
    head: Head
    expected_kl: float

    def codec(self, shared: int, dtype: HiddenDtype = "int8") -> LowRank:
        """The encoding that uses this fit."""
        return LowRank(self.encoder.shape[1], shared, dtype, self.encoder, self.mean)


@torch.no_grad()
def fit_lowrank(
    hidden_NH: Tensor,
    head: Head,
    rank: int,
    *,
    shared: int | None = None,
    temperature: float = 1.0,
) -> LowRankFit:
    """Principal directions in the teacher's own metric, from a sample of hidden states.

    A change d of a hidden state changes the distribution by KL = d' F d / 2 nats to second order,
    with the Fisher matrix F = W' (diag p - p p') W; averaged over the sample it is
    W' diag(mean p) W - E[m m'], m = W' p. So the best r numbers of h, for the averaged metric, are
    the first r principal components B of F^(1/2) (h - mean h); encoder = F^(1/2) B, head
    weight = W F^(-1/2) B, bias = W mean + b, with the head's scale folded in. [ours]

    Sums in float64; cost 4 N V H + V H^2 operations. Raises RecipeError naming label_rank for a
    rank outside 1..min(H, N), TeacherError for a soft-capped head (not linear) and for NaN.
    """
    samples, width = hidden_NH.shape
    if not 1 <= rank <= min(width, samples):
        raise RecipeError.of(
            "label_rank",
            rank,
            f"the teacher's hidden states have {width:,} numbers and the sample {samples:,} tokens",
            f"1 to {min(width, samples):,}; 64 to 128 is usual",
        )
    if head.softcap is not None:
        raise TeacherError.of(
            "label_encoding",
            "lowrank",
            f"this teacher's head caps its logits (softcap {head.softcap}), which no narrower "
            "linear head can follow",
            "--label_encoding hidden keeps the cap and is exact to quantisation",
            "--label_encoding sampled or topk",
        )
    if not bool(hidden_NH.isfinite().all()):
        raise TeacherError.of(
            "teacher", "NaN or infinity", "in the hidden states of the sample", "check its weights"
        )
    weight_VH = head.weight.float() * head.scale
    bias_V = None if head.bias is None else head.bias.float() * head.scale
    cut = slice(0, shared or len(weight_VH))
    fisher_HH = _mean_fisher(
        hidden_NH, weight_VH[cut], None if bias_V is None else bias_V[cut], temperature
    )
    root_HH, inverse_HH = _roots(fisher_HH)
    mean_H = hidden_NH.double().mean(0)
    white_NH = (hidden_NH.double() - mean_H) @ root_HH
    spread_H, vectors_HH = torch.linalg.eigh(white_NH.T @ white_NH / samples)
    basis_Hr = vectors_HH.flip(-1)[:, :rank]
    narrow_Vr = weight_VH @ (inverse_HH @ basis_Hr).float()
    offset_V = torch.nn.functional.linear(mean_H.float(), weight_VH, bias_V)
    return LowRankFit(
        encoder=(root_HH @ basis_Hr).float().cpu().contiguous(),
        mean=mean_H.float().cpu(),
        head=Head(narrow_Vr.cpu().contiguous(), offset_V.cpu()),
        expected_kl=float(spread_H.flip(-1)[rank:].clamp(min=0).sum() / 2),
    )


def _mean_fisher(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, temperature: float
) -> Tensor:
    """F [H, H] float64, averaged over the sample."""
    width, samples = weight_VH.shape[1], len(hidden_NH)
    outer_HH = hidden_NH.new_zeros(width, width, dtype=torch.float64)
    mean_p_V = hidden_NH.new_zeros(len(weight_VH), dtype=torch.float64)
    for hidden_nH in _pieces(hidden_NH, max(1, CHUNK // len(weight_VH))):
        logits_nV = torch.nn.functional.linear(hidden_nH.float(), weight_VH, bias_V)
        p_nV = (logits_nV / temperature).softmax(-1)
        expected_nH = (p_nV @ weight_VH).double()
        outer_HH += expected_nH.T @ expected_nH
        mean_p_V += p_nV.double().sum(0)
    mean_p_V /= samples
    fisher_HH = -outer_HH / samples
    for at in range(0, len(weight_VH), 8192):  # float64 slices of W, not a second W
        slice_vH = weight_VH[at : at + 8192].double()
        fisher_HH += slice_vH.T @ (mean_p_V[at : at + 8192, None] * slice_vH)
    return fisher_HH / temperature**2


def _pieces(values: Tensor, size: int) -> Iterator[Tensor]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def _roots(fisher_HH: Tensor) -> tuple[Tensor, Tensor]:
    """F^(1/2) and its pseudo-inverse; directions that move no probability have no root."""
    values_H, vectors_HH = torch.linalg.eigh((fisher_HH + fisher_HH.T) / 2)
    # float32 inputs: what lies 1e-7 below the largest is rounding
    keep_H = values_H > 1e-9 * values_H[-1].clamp(min=1e-300)
    root_H = torch.where(keep_H, values_H.clamp(min=0).sqrt(), torch.zeros_like(values_H))
    inverse_H = torch.where(keep_H, 1 / root_H.clamp(min=1e-300), torch.zeros_like(values_H))
    return (vectors_HH * root_H) @ vectors_HH.T, (vectors_HH * inverse_H) @ vectors_HH.T
