"""Random batches, a peer's answer to them, the naive float64 one, and how far the two lie apart.

`truth` is written out from the definitions, on purpose without a line of llmkd: whole matrices and
autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rivals import IGNORE, Case, Peer
from torch import Tensor

V = 97  # entries where nothing else is said


@dataclass(frozen=True)
class Run:
    """A loss (nats) and its gradients: of the logits, or of hidden states and head weight."""

    loss: float
    grads: tuple[Tensor, ...]


@dataclass(frozen=True)
class Truth(Run):
    """The same in float64. `entropy` is the teacher's share of the loss without a gradient, nats:
    what a loss in cross-entropy form reports on top.
    """

    entropy: float = 0.0


def make(
    peer: Peer,
    *,
    rows: int = 4,
    length: int = 8,
    vocab: int = V,
    teacher_vocab: int | None = None,
    hidden: tuple[int, int] = (16, 24),
    dtype: torch.dtype = torch.float32,
    mask: bool = True,
) -> Case:
    """A random batch; logits of standard deviation 2, three positions in ten masked."""
    random = torch.Generator().manual_seed(0)
    widths = (*hidden, vocab, teacher_vocab or vocab)
    student, teacher = (torch.randn(rows, length, width, generator=random) for width in hidden)
    heads = [
        torch.randn(entries, width, generator=random) * 2 / math.sqrt(width)
        for width, entries in zip(widths[:2], widths[2:], strict=True)
    ]
    labels = torch.randint(0, min(widths[2:]), (rows, length), generator=random)
    if mask:
        labels[torch.rand(rows, length, generator=random) < 0.3] = IGNORE
    if peer.takes == "logits":
        pair = (x @ w.T for x, w in zip((student, teacher), heads, strict=True))
        student, teacher = (logits.to(dtype) for logits in pair)
        return Case(student=student, teacher=teacher, labels=labels, divergence=peer.divergence)
    return Case(
        student=student.to(dtype),
        teacher=teacher.to(dtype),
        student_weight=heads[0].to(dtype),
        teacher_weight=heads[1].to(dtype),
        labels=labels,
        divergence=peer.divergence,
    )


def run(peer: Peer, case: Case) -> Run:
    """The peer's loss and gradients."""
    leaves = [case.student.detach().clone().requires_grad_()]
    weight = None
    if case.student_weight is not None:
        weight = case.student_weight.detach().clone().requires_grad_()
        leaves.append(weight)
    answer = peer(replace(case, student=leaves[0], student_weight=weight))
    answer.loss.backward()
    grads = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return Run(answer.loss.item(), grads)


def truth(case: Case) -> Truth:
    """The case's loss and gradients in float64.

    KL(p || q) over the positions with a label, mean (or by `tokens`); no T**2 unless `t2`. Where
    the heads differ in width p lies on the shared leading entries and q on the student's whole.
    """
    leaves, (student, teacher) = _leaves(case)
    mask = case.mask
    z, t = student[mask], teacher.detach()[mask]
    shared = min(z.shape[-1], t.shape[-1])
    log_q = F.log_softmax(z / case.temperature, -1)
    log_p = F.log_softmax(t[:, :shared] / case.temperature, -1)
    p = F.pad(log_p.exp(), (0, z.shape[-1] - shared))
    log_p = F.pad(log_p, (0, z.shape[-1] - shared))  # 0 where p is 0: the product is 0 anyway
    if case.divergence == "js":
        m = (p + log_q.exp()) / 2
        rows = ((p * (log_p - m.log())).sum(-1) + (log_q.exp() * (log_q - m.log())).sum(-1)) / 2
        entropy = rows.detach() * 0
    else:
        rows = (p * (log_p - log_q)).sum(-1)
        entropy = -(p * log_p).sum(-1)
    if case.t2:
        rows, entropy = rows * case.temperature**2, entropy * case.temperature**2
    ce = F.cross_entropy(z, case.labels[mask], reduction="none")
    rows = (1 - case.kd_weight) * ce + case.kd_weight * rows
    if case.token_weights is not None:
        rows = rows * case.token_weights[mask]
        entropy = entropy * case.token_weights[mask]
    count = case.tokens or max(int(mask.sum()), 1)
    loss = rows.sum() / count
    grads = torch.autograd.grad(loss, leaves)
    share = case.kd_weight * entropy.sum().item() / count
    return Truth(loss.item(), grads, share)


def _leaves(case: Case) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    leaves = [case.student.detach().double().requires_grad_()]
    if case.student_weight is None or case.teacher_weight is None:
        return leaves, (leaves[0], case.teacher.double())
    leaves.append(case.student_weight.detach().double().requires_grad_())
    teacher = case.teacher.double() @ case.teacher_weight.double().T
    return leaves, (leaves[0] @ leaves[1].T, teacher)


def apart(found: float, right: float) -> float:
    """Relative error of a number; absolute where the right one is 0."""
    return abs(found - right) / (abs(right) or 1.0)


def grads_apart(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """Largest relative error (Frobenius norm) over the gradients; NaN stays NaN."""
    errors = []
    for a, b in zip(found, right, strict=True):
        error, size = (a.double() - b.double()).norm(), b.double().norm()
        errors.append((error / size if size > 0 else error).item())
    return max(errors, key=lambda error: float("inf") if error != error else error)
