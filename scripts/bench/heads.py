"""The contestants of kd_head.py: tensors, one step of each, and the float64 answer.

A step makes the loss and the gradients of the student's hidden states and head weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rivals import IGNORE, RIVALS, Case, Peer, liger
from torch import Tensor

from llmkd.objectives.fused import FusedLinearKD
from llmkd.types import Head, HiddenTarget, SparseTarget, Target

TOP_K, DRAWS = 64, 50
TRUTH_ROWS = 64  # rows in float64 at once


@dataclass(frozen=True)
class Size:
    """Tokens, vocabulary entries, hidden sizes of student and teacher."""

    tokens: int
    vocab: int
    student: int
    teacher: int

    def __str__(self) -> str:
        return f"N={self.tokens} V={self.vocab} Hs={self.student} Ht={self.teacher}"


SIZES = (Size(512, 32_768, 512, 1_024), Size(512, 151_936, 256, 512))
SMALL = (Size(64, 2_048, 64, 128), Size(64, 4_096, 32, 64))
TINY = Size(16, 128, 8, 8)  # warms up the libraries and nothing else


@dataclass(frozen=True)
class Inputs:
    """The live teacher's case and, for cached labels, a sparse target (or None)."""

    case: Case
    sparse: SparseTarget | None = None


@dataclass(frozen=True)
class Contestant:
    """`build` turns inputs into a step; `label` is what it learns from: kl, ce, topk, sampled, or
    none for the bare products.
    """

    build: Callable[[Inputs], Callable[[], Tensor | None]]
    label: str = "kl"
    full_warm_up: bool = False


def make(size: Size, label: str) -> Inputs:
    """The tensors of a size; always the same ones. Cached labels come without the teacher."""
    random = torch.Generator().manual_seed(0)

    def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, width, generator=random) * scale

    student, teacher = normal(size.tokens, size.student), normal(size.tokens, size.teacher)
    heads = [normal(size.vocab, width, 2 * width**-0.5) for width in (size.student, size.teacher)]
    labels = torch.randint(0, size.vocab, (1, size.tokens), generator=random)
    labels[0, torch.randperm(size.tokens, generator=random)[: size.tokens // 10]] = IGNORE
    sparse = sparse_target(teacher, heads[1], label) if label in ("topk", "sampled") else None
    if label != "kl":
        teacher, heads[1] = teacher[:, :1], heads[1][:1, :1].clone()
    case = Case(
        student=student[None].requires_grad_(),
        teacher=teacher[None],
        student_weight=heads[0].requires_grad_(),
        teacher_weight=heads[1],
        labels=labels,
    )
    return Inputs(case, sparse)


def sparse_target(teacher_NH: Tensor, weight_VH: Tensor, label: str) -> SparseTarget:
    """The teacher's top 64 with the rest as one event, or RS-KD's 50 draws of it."""
    random = torch.Generator().manual_seed(1)
    all_ids, all_probs = [], []
    for rows_NH in teacher_NH.split(TRUTH_ROWS):
        p = (rows_NH @ weight_VH.T).softmax(-1)
        if label == "topk":
            probs, ids = p.topk(min(TOP_K, p.shape[1]))
        else:
            drawn, _ = p.multinomial(DRAWS, replacement=True, generator=random).sort(-1)
            first = torch.ones_like(drawn, dtype=torch.bool)
            first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
            place = first.cumsum(-1) - 1
            ids = torch.zeros_like(drawn).scatter_(-1, place, drawn)
            probs = torch.zeros(drawn.shape).scatter_add_(
                -1, place, torch.full(drawn.shape, 1 / DRAWS)
            )
        all_ids.append(ids)
        all_probs.append(probs)
    ids, probs = torch.cat(all_ids)[None], torch.cat(all_probs)[None]
    tail = "bucket" if label == "topk" else "renorm"
    return SparseTarget(ids, probs, shared=len(weight_VH), tail=tail)


def floor(inputs: Inputs, live: bool = True) -> Callable[[], None]:
    """The products over the unmasked rows, into buffers that are there already: student forward,
    two gradients and, with a live teacher, its forward.
    """
    case = inputs.case
    student_weight, teacher_weight = (w.detach() for w in case.heads())
    h, t = (x.detach()[case.mask].contiguous() for x in (case.student, case.teacher))
    logits, teacher = (h.new_empty(len(h), len(student_weight)) for _ in range(2))
    grad_h, grad_w = torch.empty_like(h), torch.empty_like(student_weight)

    def step() -> None:
        torch.mm(h, student_weight.T, out=logits)
        if live:
            torch.mm(t, teacher_weight.T, out=teacher)
        torch.mm(logits, student_weight, out=grad_h)
        torch.mm(logits.T, h, out=grad_w)

    return step


def rival(load: Callable[[], Peer]) -> Callable[[Inputs], Callable[[], Tensor]]:
    """A step of another library's loss; dense losses get logits made inside the step."""

    def build(inputs: Inputs) -> Callable[[], Tensor]:
        peer, case = load(), inputs.case
        student_weight, teacher_weight = case.heads()

        def step() -> Tensor:
            now = case
            if peer.takes == "logits":
                with torch.no_grad():
                    teacher = case.teacher @ teacher_weight.T
                now = replace(case, student=case.student @ student_weight.T, teacher=teacher)
                del teacher
            loss = peer(now).loss
            loss.backward()
            return loss

        return step

    return build


def ours(inputs: Inputs) -> Callable[[], Tensor]:
    """A step of FusedLinearKD on a live teacher, a cached label or the gold tokens alone."""
    case = inputs.case
    student_weight, teacher_weight = case.heads()
    fused = FusedLinearKD()  # one for the whole run, as in a trainer: it keeps its buffers
    target: Target | None = inputs.sparse
    if target is None and case.teacher.shape[-1] > 1:
        target = HiddenTarget(case.teacher, Head(teacher_weight), len(teacher_weight))

    def step() -> Tensor:
        term = fused(  # pyright: ignore[reportCallIssue]
            case.student, Head(student_weight), target, case.mask, gold_BT=case.labels
        )
        loss = term.total / term.count
        loss.backward()
        return loss

    return step


CONTESTANTS: dict[str, Contestant] = {
    "floor: 4 products": Contestant(floor, "none"),
    "floor: 3 products": Contestant(lambda inputs: floor(inputs, live=False), "none"),
    "TRL GKD dense": Contestant(rival(RIVALS["TRL GKD"])),
    "TRL chunked": Contestant(rival(RIVALS["TRL chunked"])),
    "Liger eager": Contestant(rival(liger)),
    "Liger compiled": Contestant(rival(lambda: liger(compiled=True)), full_warm_up=True),
    "ours, live teacher": Contestant(ours),
    "ours, CE alone": Contestant(ours, "ce"),
    "ours, cached top 64": Contestant(ours, "topk"),
    "ours, cached 50 draws": Contestant(ours, "sampled"),
}
MORE = {
    name: Contestant(rival(RIVALS[name]))
    for name in ("torchtune", "torchtune chunked", "orda", "DistillKit")
}


def build(contestant: Contestant, size: Size) -> tuple[Case, Callable[[], Tensor | None]]:
    """Tensors of its own and a step that starts without gradients."""
    label = "kl" if contestant.label == "none" else contestant.label
    inputs = make(size, label)
    case, inner = inputs.case, contestant.build(inputs)

    def step() -> Tensor | None:
        case.student.grad = None
        case.heads()[0].grad = None
        return inner()

    return case, step


@dataclass(frozen=True)
class Truth:
    """KL (or CE) in nats and the teacher's entropy, mean over counted positions, and gradients of
    hidden states [N, Hs] and head [V, Hs]; all in float64.
    """

    loss: float
    entropy: float
    grad_h: Tensor
    grad_w: Tensor

    def errors(self, loss: Tensor, case: Case) -> dict[str, float]:
        """Relative errors of the loss (in KL or in cross-entropy form, whichever it is), dh, dW."""
        both = (self.loss, self.loss + self.entropy)
        found = {"loss": min(abs(loss.item() - right) / abs(right) for right in both)}
        pairs = {"dh": (case.student.grad, self.grad_h), "dW": (case.heads()[0].grad, self.grad_w)}
        for name, (grad, right) in pairs.items():
            assert grad is not None
            gap = grad.reshape(right.shape).double().sub_(right)
            found[name] = (gap.norm() / right.norm()).item()
        return found


def truth(size: Size, label: str) -> Truth:
    """The answer of a size, a few rows at a time and without llmkd's code."""
    inputs = make(size, label)
    case, sparse = inputs.case, inputs.sparse
    h, t, gold = case.student.detach()[0], case.teacher[0], case.labels[0]
    weight, teacher_weight = (w.detach().double() for w in case.heads())
    grad_h, grad_w = torch.zeros(h.shape).double(), torch.zeros_like(weight)
    sums, count = [0.0, 0.0], int((gold != IGNORE).sum())
    for rows in (gold != IGNORE).nonzero().squeeze(-1).split(TRUTH_ROWS):
        part = h[rows].double()
        z = (part @ weight.T).requires_grad_()
        entropy = z.new_zeros(())
        if label == "ce":
            loss = F.cross_entropy(z, gold[rows], reduction="sum")
        else:
            if sparse is None:
                log_p = (t[rows].double() @ teacher_weight.T).log_softmax(-1)
                log_q = z.log_softmax(-1)
            else:
                log_p, log_q = _events(z, sparse, rows)
            p = log_p.exp()
            entropy = -torch.where(p > 0, p * log_p, 0.0).sum()
            loss = -torch.where(p > 0, p * log_q, 0.0).sum() - entropy
        (slope,) = torch.autograd.grad(loss, z)
        sums[0] += loss.item()
        sums[1] += entropy.item()
        grad_h[rows] = slope @ weight / count
        grad_w.addmm_(slope.T, part, alpha=1 / count)
    return Truth(sums[0] / count, sums[1] / count, grad_h, grad_w)


def _events(z: Tensor, sparse: SparseTarget, rows: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q over the listed tokens and, for a top k, "any other"."""
    ids, probs = sparse.ids_BTK[0, rows], sparse.probs_BTK[0, rows].double()
    log_q = z.log_softmax(-1)
    if sparse.tail == "renorm":
        return (probs / probs.sum(-1, keepdim=True)).log(), log_q.gather(-1, ids)
    others = log_q.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    p = torch.cat((probs, 1 - probs.sum(-1, keepdim=True)), -1)
    return p.log(), torch.cat((log_q.gather(-1, ids), others), -1)
