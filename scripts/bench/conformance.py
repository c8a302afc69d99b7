"""The same questions to every library's public distillation loss, and to ours.

    python scripts/bench/conformance.py [--distillkit PATH] [--json FILE] [--only NAME ...]

Every cell comes from a run on small random tensors on one CPU thread. A cell is "yes", "NO: what
came out instead", or "n/a: what the call has no argument for". Tolerances are the constants below;
errors are relative, of gradients in the Frobenius norm, against the float64 form in reference.py.
The exit code is 1 if one of our own cells says NO.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from reference import Run, Truth, V, apart, grads_apart, make, run, truth
from rivals import IGNORE, INSTALL, Case, NotOffered, Peer, installed, ours

SAME = 1e-5  # two float32 routes to one number: sums of parts, shifts, padding side
ZERO = 1e-6  # "no loss", "no gradient", in nats
FLOAT32 = 2e-6  # float32 against float64
FLOAT64 = 1e-12  # float64 inputs against float64
BF16_LOSS, BF16_GRAD = 1e-3, 5e-3  # bf16 inputs; a bf16 number alone is only good to 4e-3


@dataclass(frozen=True)
class Cell:
    """What stands in the table; `good` is None where there is nothing to judge."""

    text: str
    good: bool | None = None


Question = Callable[[Peer], Cell]
QUESTIONS: dict[str, Question] = {}


def question(title: str) -> Callable[[Question], Question]:
    """Enter a function as a row of the table."""

    def enter(function: Question) -> Question:
        QUESTIONS[title] = function
        return function

    return enter


def ask(peer: Peer, function: Question) -> Cell:
    """One cell; whatever the peer raises is its answer."""
    try:
        return function(peer)
    except NotOffered as error:
        return Cell(f"n/a: no {error}")
    except Exception as error:
        return Cell(f"NO: {type(error).__name__}", False)


def loss_error(found: Run, right: Truth) -> tuple[float, str]:
    """Relative error of the loss and its form: "", or "CE form" (teacher's entropy left in)."""
    plain, whole = apart(found.loss, right.loss), apart(found.loss, right.loss + right.entropy)
    return (plain, "") if plain <= whole else (whole, "CE form")


def judged(fine: bool, fault: str, remark: str = "") -> Cell:
    """yes (remark) or NO: fault."""
    return Cell("yes" + (f" ({remark})" if remark else ""), True) if fine else no(fault)


def no(fault: str) -> Cell:
    """NO: fault."""
    return Cell(f"NO: {fault}", False)


def against_truth(peer: Peer, case: Case, loss_limit: float, grad_limit: float) -> Cell:
    """Loss and gradient of a case within their limits of the float64 form."""
    found, right = run(peer, case), truth(case)
    error, form = loss_error(found, right)
    slope = grads_apart(found.grads, right.grads)
    form = form and f"; {form}"
    fine = error <= loss_limit and slope <= grad_limit
    return judged(
        fine, f"loss {error:.0e}, grad {slope:.0e}{form}", f"{max(error, slope):.0e}{form}"
    )


@question("says whether it shifts labels")
def shift(peer: Peer) -> Cell:
    """Which alignment the number belongs to, and whether a docstring in reach says so."""
    case = make(peer)
    found = run(peer, case)
    moved = replace(
        case,
        student=case.student[:, :-1],
        teacher=case.teacher[:, :-1],
        labels=case.labels[:, 1:],
    )
    errors = [loss_error(found, truth(c))[0] for c in (case, moved)]
    if min(errors) > SAME:
        return no("fits neither")
    does = "does not shift" if errors[0] < errors[1] else "shifts"
    texts = [inspect.getdoc(x) or "" for x in peer.documents]
    texts += [inspect.getdoc(inspect.getmodule(x)) or "" for x in peer.documents]
    said = any(re.search(r"\bshift|\balign|they predict|it predicts", text) for text in texts)
    return judged(said, f"{does}, not said", does)


@question("mask: NaN under it changes nothing")
def nan_under_mask(peer: Peer) -> Cell:
    """Student, teacher at masked positions become NaN; loss and gradients must not move."""
    case = make(peer)
    hole = ~case.mask[..., None]
    nan = float("nan")
    student, teacher = (x.masked_fill(hole, nan) for x in (case.student, case.teacher))
    clean, found = run(peer, case), run(peer, replace(case, student=student, teacher=teacher))
    if math.isnan(found.loss):
        return no("loss NaN")
    if any(bool(grad.isnan().any()) for grad in found.grads):
        return no("gradient NaN")
    same = apart(found.loss, clean.loss) <= SAME
    return judged(same and grads_apart(found.grads, clean.grads) <= SAME, "changes")


@question("padding side changes nothing")
def padding_side(peer: Peer) -> Cell:
    """Sequences of 5, 8, 3 and 6 tokens padded on the right, then on the left."""
    case = make(peer, mask=False)
    lengths = (5, 8, 3, 6)
    labels = case.labels.clone()
    for row, count in enumerate(lengths):
        labels[row, count:] = IGNORE
    right = replace(case, labels=labels)

    def left(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.roll(8 - n, 0) for part, n in zip(x, lengths, strict=True)])

    moved = replace(
        case, student=left(case.student), teacher=left(case.teacher), labels=left(labels)
    )
    first, second = run(peer, right), run(peer, moved)
    expected = (left(first.grads[0]), *first.grads[1:])
    error = max(apart(second.loss, first.loss), grads_apart(second.grads, expected))
    return judged(error <= SAME, f"{error:.0e}")


def nothing(peer: Peer, case: Case) -> Cell:
    """Loss 0 and gradients 0 where no position counts; else, whether a given count mends it."""
    cell = ask(peer, lambda peer: _zero(run(peer, case)))
    if cell.good is False and "tokens" in peer.offers:
        mended = ask(peer, lambda peer: _zero(run(peer, replace(case, tokens=32)))).good
        cell = replace(cell, text=cell.text + (" (0 if given the count)" if mended else ""))
    return cell


def _zero(found: Run) -> Cell:
    if math.isnan(found.loss):
        return no("loss NaN")
    if any(bool(grad.isnan().any()) for grad in found.grads):
        return no("gradient NaN")
    return judged(found.loss == 0 and not any(bool(g.any()) for g in found.grads), "not 0")


@question("empty batch: 0, backward works")
def empty_batch(peer: Peer) -> Cell:
    """No sequences at all."""
    case = make(peer, mask=False)
    empty = {name: getattr(case, name)[:0] for name in ("student", "teacher", "labels")}
    return nothing(peer, replace(case, **empty))


@question("all masked: 0, backward works")
def all_masked(peer: Peer) -> Cell:
    """Every label is -100."""
    case = make(peer)
    return nothing(peer, replace(case, labels=torch.full_like(case.labels, IGNORE)))


def parts_against_whole(peer: Peer, counts: tuple[int, ...]) -> Cell:
    """One sequence per part with so many labels each, against one batch of all of them.

    Where the call takes a count to divide by it gets the whole's, else the parts' means are
    averaged, which is what accumulation and DDP do with a local mean.
    """
    case = make(peer, rows=len(counts), mask="mask" not in peer.offers)
    scale = torch.tensor([3.0, 1.0, 0.5, 1.0])[: len(counts), None, None]
    labels = case.labels.clone()
    for row, count in enumerate(counts):
        labels[row, count:] = IGNORE
    case = replace(case, student=case.student * scale, labels=labels)
    summed = "tokens" in peer.offers
    whole = run(peer, replace(case, tokens=sum(counts) if summed else None))
    share = 1.0 if summed else 1.0 / len(counts)
    parts = []
    for row in range(len(counts)):
        at = slice(row, row + 1)
        part = replace(case, student=case.student[at], teacher=case.teacher[at], labels=labels[at])
        parts.append(run(peer, replace(part, tokens=sum(counts) if summed else None)))
    loss = share * sum(part.loss for part in parts)
    grads = [share * torch.cat([part.grads[0] for part in parts])]
    grads += [
        share * torch.stack(same).sum(0)
        for same in zip(*(part.grads[1:] for part in parts), strict=True)
    ]
    error = max(apart(loss, whole.loss), grads_apart(tuple(grads), whole.grads))
    return judged(error <= SAME, f"loss x{loss / whole.loss:.2f}")


@question("accumulation: parts add up to the whole")
def accumulation(peer: Peer) -> Cell:
    """Micro-batches of 1, 8, 4 and 7 labels."""
    return parts_against_whole(peer, (1, 8, 4, 7))


@question("ranks: any partition, one of them empty")
def partition(peer: Peer) -> Cell:
    """Four ranks with 8, 2, 5 and no labels; gradients are averaged and the world size cancels."""
    return parts_against_whole(peer, (8, 2, 5, 0))


@question("T²: multiplied in?")
def t_squared(peer: Peer) -> Cell:
    """Size of the gradient at T = 2 against the float64 form without T**2."""
    case = make(peer, mask=False)
    case = replace(case, temperature=2.0)
    found, right = run(peer, case), truth(case)
    factor = sum(grad.norm().item() for grad in found.grads)
    factor /= sum(grad.norm().item() for grad in right.grads)
    if grads_apart(found.grads, tuple(factor * grad for grad in right.grads)) > SAME:
        return no("another temperature")
    has = {1.0: "absent", 4.0: "present"}.get(round(factor, 4), f"x{factor:.2f}")
    if "t2" not in peer.offers:
        return Cell(has)
    with_it = replace(case, t2=True)
    error = grads_apart(run(peer, with_it).grads, truth(with_it).grads)
    return Cell("chosen" if error <= SAME else f"NO: {error:.0e}", error <= SAME)


@question("perfect student: loss 0, gradient 0")
def perfect(peer: Peer) -> Cell:
    """The student is the teacher."""
    case = make(peer, mask=False, hidden=(24, 24))
    case = replace(case, student=case.teacher, student_weight=case.teacher_weight)
    found = run(peer, case)
    size = max(grad.abs().max().item() for grad in found.grads)
    if not size <= ZERO:
        return no(f"gradient {size:.0e}")
    if abs(found.loss) <= ZERO:
        return Cell("yes", True)
    error, form = loss_error(found, truth(case))
    if form and error <= SAME:
        said = peer(case).kl
        if said is None or abs(said) > ZERO:
            return no(f"loss {found.loss:.2f} = entropy; gradient 0")
        return Cell(f"gradient 0, reports KL 0; loss {found.loss:.2f} = entropy", True)
    return no(f"loss {found.loss:.2g}")


@question(f"float32 within {FLOAT32:.0e} of float64")
def float32(peer: Peer) -> Cell:
    """1,024 entries, 32 tokens, float32."""
    return against_truth(peer, make(peer, vocab=1024, mask=False), FLOAT32, FLOAT32)


@question(f"float64 in, float64 out ({FLOAT64:.0e})")
def float64(peer: Peer) -> Cell:
    """The same in float64: what gradcheck needs."""
    case = make(peer, vocab=1024, mask=False, dtype=torch.float64)
    return against_truth(peer, case, FLOAT64, FLOAT64)


@question("teacher's head wider (padded)")
def teacher_wider(peer: Peer) -> Cell:
    """Five entries the student lacks; they must carry no probability."""
    return against_truth(peer, make(peer, teacher_vocab=V + 5, mask=False), SAME, SAME)


@question("teacher's head narrower")
def teacher_narrower(peer: Peer) -> Cell:
    """Five entries the teacher lacks; the student must be pushed off them."""
    return against_truth(peer, make(peer, teacher_vocab=V - 5, mask=False), SAME, SAME)


@question(f"bf16 inputs (loss {BF16_LOSS:.0e}, grad {BF16_GRAD:.0e})")
def bf16(peer: Peer) -> Cell:
    """8,192 entries, bf16 tensors; the float64 form gets the same rounded numbers."""
    case = make(peer, vocab=8192, hidden=(64, 96), mask=False, dtype=torch.bfloat16)
    return against_truth(peer, case, BF16_LOSS, BF16_GRAD)


@question("per-token weights")
def token_weights(peer: Peer) -> Cell:
    """A weight between 0 and 1 for each position."""
    case = make(peer)
    weights = torch.rand(case.labels.shape, generator=torch.Generator().manual_seed(1))
    return against_truth(peer, replace(case, token_weights=weights), SAME, SAME)


@question("0.4 CE + 0.6 KD in one call")
def mixed(peer: Peer) -> Cell:
    """CE to the labels beside the divergence."""
    return against_truth(peer, replace(make(peer), kd_weight=0.6), SAME, SAME)


@question("Jensen-Shannon, beta 0.5")
def jensen_shannon(peer: Peer) -> Cell:
    """The symmetric case of GKD's generalised form."""
    return against_truth(peer, replace(make(peer, mask=False), divergence="js"), SAME, SAME)


def markdown(peers: list[Peer], table: dict[str, dict[str, Cell]]) -> str:
    """Rows are questions, columns are peers."""
    heads = [f"**{peer.name}**" if peer.ours else f"{peer.name} {peer.version}" for peer in peers]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(peers) + 1) + "|"]
    for title, cells in table.items():
        texts = " | ".join(cells[peer.name].text for peer in peers)
        lines.append(f"| {title} | {texts} |")
    return "\n".join(lines)


def main() -> int:
    """Ask everything, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--distillkit", metavar="PATH", help="a checkout of arcee-ai/DistillKit")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="columns; default all")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found, missing = installed(args.distillkit)
    peers = [p for p in (*ours(), *found) if args.only is None or p.name in args.only]
    table = {
        title: {peer.name: ask(peer, function) for peer in peers}
        for title, function in QUESTIONS.items()
    }
    print(markdown(peers, table))
    for name, reason in missing.items():
        print(f"\nnot asked: {name} ({reason}); {INSTALL[name]}")
    if args.json:
        report = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "peers": {peer.name: peer.version for peer in peers},
            "missing": missing,
            "cells": {t: {n: asdict(c) for n, c in row.items()} for t, row in table.items()},
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    bad = [
        peer.name
        for peer in peers
        if peer.ours
        for row in table.values()
        if row[peer.name].good is False
    ]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
