"""The fused linear head: hidden states and head weights in, loss and gradients out.

Logits exist for a few rows at a time, in buffers that are used again; the gradient is made in the
forward pass, so that nothing is projected twice; rows outside the mask are never projected. What
stays in memory is what any backward pass must leave behind: the gradients of the hidden states and
of the weight. `token.ce_kd` on `head(hidden)` is the definition.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.objectives.chunked import ce_kd_chunked
from llmkd.objectives.divergences import find_divergence
from llmkd.objectives.kernels import RowValues, Settings, ce_and_gradient, mix_and_gradient
from llmkd.objectives.targets import chosen_rows
from llmkd.types import DenseLogits, Head, HiddenTarget, LossTerm, MixtureTarget, Target

CACHE_BYTES = 2 << 20  # rows a kernel works on at once: they stay in a core's cache
LEAST_ROWS = 16  # below that a matrix product reads the whole weight for next to no work
WEIGHT_ROWS = 2048  # of a head's weight in one CPU product: packed, they fit the cache
# torch.compile breaks its graph here and goes on behind: chunks and masks depend on the data.
untraced: Any = torch.compiler.disable


@dataclass(frozen=True, kw_only=True)
class FusedLinearKD:
    """(1 - w) CE + w KD from hidden states, in nats, equal to `ce_kd` on the logits they make.

    `target` may be a teacher's hidden states with its head, dense logits, a sparse label, a mixture
    of these, or None for CE alone. `memory_mib` bounds the buffers for logits (student's and
    teacher's together); fewer rows at a time when it is small, never fewer than 16.

    Differentiable in the hidden states, the head's weight and its bias; one backward pass only.
    Matrix products run in the autocast dtype where autocast is on, else in the hidden states' own;
    softmax, sums and the weight's gradient are float32 (float64 for float64 input).
    """

    divergence: str = "forward_kl"
    kd_weight: float = 1.0
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    t2_scale: bool = False
    options: dict[str, float] = field(default_factory=dict)
    memory_mib: int = 192
    _blocks: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        find_divergence(self.divergence)
        if self.memory_mib < 1:
            raise RecipeError.of("head_memory_mib", self.memory_mib, "must be at least 1")

    @untraced
    def __call__(
        self,
        hidden_BTH: Tensor,
        head: Head,
        target: Target | None,
        mask_BT: Tensor,
        *,
        gold_BT: Tensor,
        weights_BT: Tensor | None = None,
    ) -> LossTerm:
        """Sum in nats over the masked-in positions; see `ce_kd` for metrics and weights.

        `hidden_BTH` [..., H] lies on the token it predicts, as `gold_BT` and `mask_BT` [...] do.
        """
        settings = self.settings
        if target is not None:
            find_divergence(self.divergence).check(target, self.options)
        rows_N = chosen_rows(mask_BT)
        job = _Job(
            settings=settings,
            head=replace(head, weight=head.weight.detach(), bias=None),
            target=None if target is None else target.take(rows_N),
            gold_N=gold_BT.reshape(-1).index_select(0, rows_N),
            weights_N=None
            if weights_BT is None
            else weights_BT.reshape(-1).index_select(0, rows_N),
            budget=self.memory_mib << 20,
            blocks=self._blocks,
        )
        hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, rows_N)
        total, *sums = _Fused.apply(hidden_NH, head.weight, head.bias, job)
        named = dict(zip(settings.names, sums, strict=True))
        return LossTerm(total, mask_BT.sum(), named if target is not None else {"ce": named["ce"]})

    def of_logits(
        self, student_BTV: Tensor, target: Target | None, mask_BT: Tensor, *, gold_BT: Tensor
    ) -> LossTerm:
        """The same loss of logits that are there, for heads that are no plain linear map."""
        return ce_kd_chunked(student_BTV, target, mask_BT, gold_BT=gold_BT, settings=self.settings)

    @property
    def settings(self) -> Settings:
        """What the kernels read."""
        return Settings(
            self.kd_weight,
            self.divergence,
            self.teacher_temperature,
            self.student_temperature,
            self.t2_scale,
            self.options,
        )


@dataclass
class _Job:
    """Everything a pass needs beside what is differentiated."""

    settings: Settings
    head: Head
    target: Target | None
    gold_N: Tensor
    weights_N: Tensor | None
    budget: int
    blocks: dict[str, Tensor]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: _Job
    ) -> tuple[Tensor, ...]:
        wants = ctx.needs_input_grad
        with torch.autocast(hidden_NH.device.type, enabled=False):
            sums_4, grads = _pass(hidden_NH, weight_VH, bias_V, job, wants[:3])
        # Not `save_for_backward`: the buffers are ours alone, so backward may scale them in place.
        ctx.grads = grads
        parts = sums_4.unbind()
        ctx.mark_non_differentiable(*parts[1:])
        return parts

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("FusedLinearKD keeps its gradient for one backward pass only")
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(outer[0]) for g in grads), None)


@torch.no_grad()
def _pass(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    job: _Job,
    wants: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Sums (total, ce, divergence, entropy) and the gradients of hidden states, weight, bias."""
    work = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    product = product_dtype(hidden_NH)
    weight, hidden = weight_VH.detach().to(product), hidden_NH.detach().to(product)
    vocab = weight_VH.shape[0]
    device = hidden_NH.device
    grad_hidden = torch.empty_like(hidden_NH) if wants[0] else None
    grad_weight = torch.empty(weight_VH.shape, dtype=work, device=device) if wants[1] else None
    grad_bias = torch.zeros(vocab, dtype=work, device=device) if bias_V is not None else None
    sums_4 = torch.zeros(4, dtype=torch.float64, device=device)
    chunk = chunk_rows(job.target, vocab, job.budget, work)
    # never all rows at once, however few: half of them cost next to nothing more
    parts = max(-(-len(hidden) // chunk), 2)
    chunk = max(-(-len(hidden) // parts), min(LEAST_ROWS, len(hidden)), 1)
    buffers = LogitBuffers(job.blocks, chunk, work, product, device)
    taught = None if job.target is None else _cast_heads(job.target, buffers)
    if grad_weight is not None and not len(hidden):
        grad_weight.zero_()
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        z_CV = buffers.logits("student", hidden[rows], weight)
        target = None if taught is None else _chunk(taught, rows, buffers)
        sums_4 += _rows_in_cache(z_CV, bias_V, target, job, start)
        slope_CV = z_CV if z_CV.dtype == product else z_CV.to(product)
        if grad_hidden is not None:
            torch.mm(slope_CV, weight, out=grad_hidden[rows]) if (
                grad_hidden.dtype == product
            ) else grad_hidden[rows].copy_(slope_CV @ weight)
        if grad_weight is not None:
            add_product(grad_weight, slope_CV.T, hidden[rows], first=start == 0)
        if grad_bias is not None:
            grad_bias += z_CV.sum(0)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight_VH.dtype)
    if grad_bias is not None and bias_V is not None:
        grad_bias = grad_bias.to(bias_V.dtype) if wants[2] else None
    return sums_4.to(work), (grad_hidden, grad_weight, grad_bias)


def _rows_in_cache(
    z_CV: Tensor, bias_V: Tensor | None, target: Target | None, job: _Job, start: int
) -> Tensor:
    """Turn a chunk's bare products into gradients in place, a few rows at a time; returns sums."""
    sums_4 = torch.zeros(4, dtype=torch.float64, device=z_CV.device)
    step = max(1, CACHE_BYTES // (z_CV.shape[1] * z_CV.element_size()))
    if z_CV.is_cuda:
        step = len(z_CV)  # a GPU wants few, large launches
    for first in range(0, len(z_CV), step):
        z_cV = z_CV[first : first + step]
        last = first + len(z_cV)
        gold_c = job.gold_N[start + first : start + last]
        slope_cV = apply_head(z_cV, bias_V, job.head)
        if target is None:
            values = ce_and_gradient(z_cV, gold_c)
        else:
            values = mix_and_gradient(z_cV, _slice(target, first, last), gold_c, job.settings)
        if slope_cV is not None:
            z_cV.mul_(slope_cV)
        if job.head.scale != 1.0:
            z_cV.mul_(job.head.scale)
        if job.weights_N is not None:
            weights_c = job.weights_N[start + first : start + last].to(z_cV.dtype)
            z_cV.mul_(weights_c[:, None])
            values = RowValues(values.total * weights_c, *values[1:])
        sums_4 += torch.stack(values).sum(-1, dtype=torch.float64)
    return sums_4


def apply_head(z_cV: Tensor, bias_V: Tensor | None, head: Head) -> Tensor | None:
    """Bias, scale and soft cap in place; returns the cap's derivative where there is one."""
    if bias_V is not None:
        z_cV.add_(bias_V.to(z_cV.dtype))
    if head.scale != 1.0:
        z_cV.mul_(head.scale)
    if head.softcap is None:
        return None
    z_cV.div_(head.softcap).tanh_()
    slope_cV = 1.0 - z_cV * z_cV
    z_cV.mul_(head.softcap)
    return slope_cV


def add_product(total_VH: Tensor, slope_VC: Tensor, hidden_CH: Tensor, *, first: bool) -> None:
    """total += slope @ hidden in the total's own precision; the first one sets it."""
    if slope_VC.dtype != total_VH.dtype:
        product = slope_VC @ hidden_CH
        total_VH.copy_(product) if first else total_VH.add_(product)
    elif first:
        torch.mm(slope_VC, hidden_CH, out=total_VH)
    else:
        total_VH.addmm_(slope_VC, hidden_CH)


@dataclass
class LogitBuffers:
    """Memory for logits: one block for each head, taken once and used for every chunk and step.

    What `logits` and `project` return is overwritten by their next call under the same name.
    """

    blocks: dict[str, Tensor]
    rows: int
    work: torch.dtype
    product: torch.dtype
    device: torch.device

    @classmethod
    def for_budget(cls, hidden: Tensor, entries: int, memory_mib: int) -> LogitBuffers:
        """Buffers for states like `hidden` [..., H]; `rows` of them fit into `memory_mib`."""
        work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = chunk_rows(None, entries, memory_mib << 20, work)
        return cls({}, rows, work, product_dtype(hidden), hidden.device)

    def cast(self, head: Head, states: torch.dtype) -> Head:
        """A head that does not train, cast once for all its products with hidden states of that
        dtype.

        Where both are in the work dtype already, the product is made in it; see `logits`.
        """
        weight = head.weight.detach()
        if not states == weight.dtype == self.work:
            weight = weight.to(self.product)
        return replace(head, weight=weight)

    def project(self, hidden_CH: Tensor, head: Head, entries: int) -> Tensor:
        """The head's leading `entries` logits [C, entries] in float32, C at most `rows`."""
        with torch.autocast(self.device.type, enabled=False):
            out_CV = self.logits("head", hidden_CH.to(self.product), head.weight[:entries])
            apply_head(out_CV, None if head.bias is None else head.bias[:entries], head)
        return out_CV

    def logits(self, name: str, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """hidden @ weight.T in the work dtype, in the block called `name`."""
        count, entries = len(hidden_CH), weight_VH.shape[0]
        block = self.blocks.get(name)
        fits = block is not None and (block.dtype, block.device) == (self.work, self.device)
        if block is None or not fits or block.numel() < count * entries:
            self.blocks.pop(name, None)
            block = torch.empty(self.rows * entries, dtype=self.work, device=self.device)
            self.blocks[name] = block
        out_CV = block[: count * entries].view(count, entries)
        if hidden_CH.is_cuda or self.product != self.work:
            if hidden_CH.dtype == weight_VH.dtype == self.work:
                return torch.mm(hidden_CH, weight_VH.T, out=out_CV)
            return out_CV.copy_(hidden_CH.to(self.product) @ weight_VH.to(self.product).T)
        hidden_CH, weight_VH = hidden_CH.to(self.work), weight_VH.to(self.work)
        for first in range(0, entries, WEIGHT_ROWS):
            some = slice(first, first + WEIGHT_ROWS)
            torch.mm(hidden_CH, weight_VH[some].T, out=out_CV[:, some])
        return out_CV


def _cast_heads(target: Target, buffers: LogitBuffers) -> Target:
    """Teachers' heads as the product reads them: once for a pass, not once for every chunk."""
    if isinstance(target, MixtureTarget):
        return replace(target, parts=tuple(_cast_heads(part, buffers) for part in target.parts))
    if not isinstance(target, HiddenTarget):
        return target
    return replace(target, head=buffers.cast(target.head, target.hidden_BTH.dtype))


def _chunk(target: Target, rows: slice, buffers: LogitBuffers, name: str = "teacher") -> Target:
    """A target's rows, hidden states projected: what the kernels take."""
    if isinstance(target, MixtureTarget):
        parts = [
            _chunk(part, rows, buffers, f"{name}.{place}")
            for place, part in enumerate(target.parts)
        ]
        return replace(target, parts=tuple(parts))
    if not isinstance(target, HiddenTarget):
        return _slice(target, rows.start, rows.stop)
    head = target.head
    weight = head.weight[: target.shared]
    t_CS = buffers.logits(name, target.hidden_BTH[rows], weight)
    apply_head(t_CS, None if head.bias is None else head.bias[: target.shared], head)
    return DenseLogits(t_CS, target.shared)


def _slice(target: Target, first: int, last: int) -> Target:
    """Rows first to last of a target that holds rows only, as views."""
    if isinstance(target, MixtureTarget):
        return replace(target, parts=tuple(_slice(part, first, last) for part in target.parts))
    if isinstance(target, DenseLogits):
        logits = target.logits_BTV[first:last]
        wanted = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return DenseLogits(logits.to(wanted), target.shared)
    if isinstance(target, HiddenTarget):
        return replace(target, hidden_BTH=target.hidden_BTH[first:last])
    ids, probs = target.ids_BTK[first:last], target.probs_BTK[first:last]
    return replace(target, ids_BTK=ids, probs_BTK=probs)


def chunk_rows(target: Target | None, vocab: int, budget: int, work: torch.dtype) -> int:
    """Rows projected at once so that the logits' buffers stay within `budget` bytes."""
    size = 8 if work == torch.float64 else 4
    return max(budget // (size * (vocab + _projected(target))), LEAST_ROWS)


def _projected(target: Target | None) -> int:
    if isinstance(target, MixtureTarget):
        return sum(_projected(part) for part in target.parts)
    return target.shared if isinstance(target, HiddenTarget) else 0


@untraced
def head_scores(
    hidden_NH: Tensor, head: Head, gold_N: Tensor, *, memory_mib: int = 192
) -> tuple[Tensor, Tensor]:
    """-log q(gold) in nats and whether gold is the argmax, [N] each, without whole logits.

    No gradient.
    """
    hidden_NH = hidden_NH.detach()
    buffers = LogitBuffers.for_budget(hidden_NH, len(head.weight), memory_mib)
    head = buffers.cast(head, buffers.product)  # what `project` makes of the states
    buffers.rows = min(buffers.rows, max(len(hidden_NH), 1))
    nats = hidden_NH.new_empty(len(hidden_NH), dtype=buffers.work)
    hits = torch.empty_like(gold_N, dtype=torch.bool)
    for start in range(0, len(hidden_NH), buffers.rows):
        rows = slice(start, start + buffers.rows)
        z_CV = buffers.project(hidden_NH[rows], head, len(head.weight))
        gold_C = gold_N[rows]
        hits[rows] = z_CV.argmax(-1) == gold_C
        nats[rows] = torch.logsumexp(z_CV, -1) - z_CV.gather(-1, gold_C[:, None]).squeeze(-1)
    return nats, hits


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What matrix products run in: the autocast dtype where it is on, else the states' own."""
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype
