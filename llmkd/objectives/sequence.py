"""Log-probabilities of given tokens, with gradients, from logits or from hidden states and a head.

What a loss over whole responses is made of: it wants the sum over a response before it knows what
any of its tokens' gradients weigh, so the gradient cannot be made in the forward pass as
`fused.FusedLinearKD` does. `token_log_probs` on `head(hidden)` is the definition.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkd.errors import RecipeError
from llmkd.objectives.fused import (
    CACHE_BYTES,
    LogitBuffers,
    add_product,
    apply_head,
    chunk_rows,
    product_dtype,
    untraced,
)
from llmkd.objectives.kernels import softmax_
from llmkd.objectives.targets import wide
from llmkd.types import Head

BLOCK, OWNER = "logits", "owner"  # the buffer, and the pass whose probabilities lie in it


def token_log_probs(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """log q(id) in nats, [N], float32 (float64 for float64): the plain form."""
    return F.log_softmax(wide(logits_NV), dim=-1).gather(-1, ids_N[:, None]).squeeze(-1)


@untraced
def fused_token_log_probs(
    hidden_NH: Tensor,
    head: Head,
    ids_N: Tensor,
    memory_mib: int = 192,
    blocks: dict[str, Any] | None = None,
) -> Tensor:
    """`token_log_probs(head(hidden), ids)` without ever holding [N, V] logits.

    `memory_mib` bounds the buffer for logits; the rows that fit keep their probabilities until the
    backward pass, the others are projected again there. A head that does not train (LoRA) is
    projected once and gets no gradient. `blocks` keeps the buffer from one call to the next.
    Differentiable once, in hidden states, weight and bias. Products run in the autocast dtype where
    autocast is on, else in the hidden states' own; softmax and the weight's gradient are float32
    (float64 for float64 states). RecipeError where memory_mib is below 1.
    """
    if memory_mib < 1:
        raise RecipeError.of("head_memory_mib", memory_mib, "must be at least 1")
    product = product_dtype(hidden_NH)
    job = _Job(head, ids_N, product, memory_mib << 20, {} if blocks is None else blocks)
    found: Any = _LogProbs.apply(hidden_NH, head.weight, head.bias, job)
    return found


@dataclass
class _Job:
    """Everything a pass needs beside what is differentiated."""

    head: Head
    ids_N: Tensor
    product: torch.dtype
    budget: int
    blocks: dict[str, Any]
    token: object = field(default_factory=object)

    def __post_init__(self) -> None:
        # The tensors are saved by autograd; only the shape of the head is wanted here.
        empty = self.head.weight.new_empty(0)
        self.entries = self.head.weight.shape[0]
        self.head = replace(self.head, weight=empty, bias=None)

    def buffers(self, hidden_NH: Tensor) -> LogitBuffers:
        """One block for as many rows as fit, and no more than there are."""
        work = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        rows = min(chunk_rows(None, self.entries, self.budget, work), max(len(hidden_NH), 1))
        return LogitBuffers(self.blocks, rows, work, self.product, hidden_NH.device)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: _Job
    ) -> Tensor:
        wants = ctx.needs_input_grad
        ctx.job, ctx.frozen = job, wants[0] and not (wants[1] or wants[2])
        with torch.autocast(hidden_NH.device.type, enabled=False):
            slope_NH = torch.empty_like(hidden_NH) if ctx.frozen else None
            log_q_N = _log_probs(hidden_NH, weight_VH, bias_V, job, slope_NH)
        if slope_NH is not None:
            ctx.save_for_backward(slope_NH)
        else:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        return log_q_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer_N: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.frozen:
            (slope_NH,) = ctx.saved_tensors
            return (slope_NH * outer_N.to(slope_NH.dtype)[:, None], None, None, None)
        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        with torch.autocast(hidden_NH.device.type, enabled=False):
            grads = _gradients(hidden_NH, weight_VH, bias_V, ctx.job, outer_N, ctx.needs_input_grad)
        return (*grads, None)


@torch.no_grad()
def _log_probs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    job: _Job,
    slope_NH: Tensor | None,
) -> Tensor:
    """[N] nats; fills `slope_NH` with d log q / d hidden where it is given."""
    buffers = job.buffers(hidden_NH)
    hidden, weight = hidden_NH.to(job.product), weight_VH.to(job.product)
    log_q_N = torch.empty(len(hidden), dtype=buffers.work, device=hidden.device)
    # Whoever owned the block has lost it, even if this pass fails half-way.
    job.blocks.pop(OWNER, None)
    for start in range(0, len(hidden), buffers.rows):
        rows = slice(start, start + buffers.rows)
        z_CV = buffers.logits(BLOCK, hidden[rows], weight)
        for some in _in_cache(z_CV):
            z_cV, ids_c = z_CV[some], job.ids_N[rows][some]
            cap_cV = apply_head(z_cV, bias_V, job.head)
            own_c = z_cV.gather(-1, ids_c[:, None]).squeeze(-1)
            log_q_N[rows][some] = own_c - softmax_(z_cV)
            if slope_NH is not None:
                _to_slopes(z_cV, ids_c, torch.ones_like(own_c), cap_cV, job.head)
        if slope_NH is not None:
            slope_NH[rows] = (z_CV.to(job.product) @ weight).to(slope_NH.dtype)
    if slope_NH is None and job.head.softcap is None:
        job.blocks[OWNER] = job.token  # the last rows' probabilities stay where they are
    return log_q_N


@torch.no_grad()
def _gradients(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    job: _Job,
    outer_N: Tensor,
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum(outer * log q), beginning with the rows whose probabilities are there."""
    buffers = job.buffers(hidden_NH)
    hidden, weight = hidden_NH.to(job.product), weight_VH.to(job.product)
    outer_N = outer_N.to(buffers.work)
    options = {"dtype": buffers.work, "device": hidden.device}
    grad_hidden = torch.empty_like(hidden_NH) if wants[0] else None
    grad_weight = torch.zeros(weight_VH.shape, **options) if wants[1] else None
    grad_bias = torch.zeros(job.entries, **options) if wants[2] else None
    held = job.blocks.pop(OWNER, None) is job.token
    starts = range(0, len(hidden), buffers.rows)
    for place, start in enumerate(reversed(starts)):
        rows = slice(start, min(start + buffers.rows, len(hidden)))
        fresh, held = not held, False
        count = rows.stop - start
        if fresh:
            z_CV = buffers.logits(BLOCK, hidden[rows], weight)
        else:
            z_CV = job.blocks[BLOCK][: count * job.entries].view(count, job.entries)
        for some in _in_cache(z_CV):
            z_cV, cap_cV = z_CV[some], None
            if fresh:
                cap_cV = apply_head(z_cV, bias_V, job.head)
                torch.softmax(z_cV, dim=-1, out=z_cV)
            _to_slopes(z_cV, job.ids_N[rows][some], outer_N[rows][some], cap_cV, job.head)
        slope_CV = z_CV.to(job.product)
        if grad_hidden is not None:
            grad_hidden[rows] = (slope_CV @ weight).to(grad_hidden.dtype)
        if grad_weight is not None:
            add_product(grad_weight, slope_CV.T, hidden[rows], first=place == 0)
        if grad_bias is not None:
            grad_bias += z_CV.sum(0)
    grad_weight = None if grad_weight is None else grad_weight.to(weight_VH.dtype)
    if grad_bias is not None and bias_V is not None:
        grad_bias = grad_bias.to(bias_V.dtype)
    return grad_hidden, grad_weight, grad_bias


def _to_slopes(
    p_cV: Tensor, ids_c: Tensor, outer_c: Tensor, cap_cV: Tensor | None, head: Head
) -> None:
    """Turn probabilities into outer * d log q(id) / d (h W^T + b), in place."""
    p_cV.mul_(-outer_c[:, None])
    p_cV.scatter_add_(-1, ids_c[:, None], outer_c[:, None])
    if cap_cV is not None:
        p_cV.mul_(cap_cV)
    if head.scale != 1.0:
        p_cV.mul_(head.scale)


def _in_cache(z_CV: Tensor) -> list[slice]:
    """Rows a kernel works on at once: few on a processor, all on a GPU."""
    step = max(1, CACHE_BYTES // (z_CV.shape[1] * z_CV.element_size()))
    if z_CV.is_cuda:
        step = max(len(z_CV), 1)
    return [slice(first, first + step) for first in range(0, len(z_CV), step)]
