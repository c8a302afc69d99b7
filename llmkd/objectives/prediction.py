"""Hard and soft labels of a task head: classes, several labels at once, a number, a class a token.

Letters beside the house's: C classes (1 for a number). Sequence tasks have logits [B, C], token
tasks [B, T, C]; what counts is an example or a token with a label. Totals are sums over these.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.objectives.nkd import nkd
from llmkd.objectives.registry import OBJECTIVES
from llmkd.objectives.targets import wide
from llmkd.objectives.token import IGNORE, cross_entropy
from llmkd.types import DenseLogits, LossTerm, MixtureTarget

TASKS = ("single_label", "multi_label", "regression", "token")
SOFT_FORMS = ("kl", "mse", "nkd")
ClassTarget = DenseLogits | MixtureTarget


def hard_loss(kind: str, logits: Tensor, labels: Tensor) -> LossTerm:
    """To the gold label: cross-entropy in nats (`single_label`, and `token` where the label is not
    -100), binary cross-entropy, mean over C (`multi_label`), squared error (`regression`).

    Raises RecipeError for an unknown `kind`.
    """
    _check_kind(kind)
    if kind in ("single_label", "token"):
        logits_BTC, gold_BT = _with_positions(kind, logits, labels)
        term = cross_entropy(logits_BTC, gold_BT, gold_BT != IGNORE)
        return LossTerm(term.total, term.count)
    logits_BC = wide(logits)
    if kind == "multi_label":
        gold_BC = labels.to(logits_BC.dtype)
        each_BC = F.binary_cross_entropy_with_logits(logits_BC, gold_BC, reduction="none")
    else:
        gold_BC = labels.reshape(logits_BC.shape).to(logits_BC.dtype)
        each_BC = (logits_BC - gold_BC).square()
    return LossTerm(each_BC.mean(-1).sum(), _examples(logits))


def soft_loss(
    kind: str,
    logits: Tensor,
    target: ClassTarget,
    labels: Tensor | None,
    *,
    form: str = "kl",
    temperature: float = 1.0,
    t2_scale: bool = False,
    gamma: float = 1.5,
) -> LossTerm:
    """To the teacher's answer, a sum over examples (over labelled tokens for `token`), so that its
    mean is `batchmean` and not C times smaller.

    `kl`: KL(teacher || student) in nats, both at `temperature`, times its square with `t2_scale`;
    for `multi_label` the mean over C of the binary KL. `mse`: mean over C of the squared difference
    of logits (a mixture has none). `nkd`: Yang et al. 2023 without its cross-entropy; needs
    `labels`, and its temperature is squared as in the paper. `regression` is always squared error
    to the teacher's number, for several teachers to their mean. Targets are [B, C] or [B, T, C] as
    the logits are; ValueError where they are not. Raises RecipeError for a form the task cannot
    have.
    """
    check_soft(kind, form, mixed=isinstance(target, MixtureTarget))
    _check_shapes(logits, target)
    if kind == "multi_label" and form == "kl":
        return _binary_kl(logits, target, temperature, t2_scale)
    if labels is None and (form == "nkd" or kind == "token"):
        raise ValueError(f"{form} of a {kind} task needs its labels")
    if kind == "regression" or form == "mse":
        return _squared(kind, logits, target, labels)
    if labels is None:
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)  # all count
    logits_BTC, gold_BT = _with_positions(kind, logits, labels)
    target_BT = target if kind == "token" else _one_position(target)
    mask_BT = gold_BT != IGNORE
    if form == "nkd":
        options: dict[str, Any] = {"temperature": temperature, "gamma": gamma, "ce_weight": 0.0}
        term = nkd(logits_BTC, target_BT, mask_BT, gold_BT=gold_BT, **options)
    else:
        term = OBJECTIVES["forward_kl"](
            logits_BTC,
            target_BT,
            mask_BT,
            teacher_temperature=temperature,
            student_temperature=temperature,
            t2_scale=t2_scale,
        )
    return LossTerm(term.total, term.count)


def check_soft(kind: str, form: str, *, mixed: bool = False) -> None:
    """RecipeError for a task or a soft loss that does not exist, or a loss that the task, or a
    mixture of teachers (`mixed`), cannot have.
    """
    _check_kind(kind)
    if form not in SOFT_FORMS:
        near = difflib.get_close_matches(form, SOFT_FORMS, n=1)
        ways = [f"did you mean {match!r}?" for match in near]
        raise RecipeError.of("soft", form, "unknown", *ways, f"known: {', '.join(SOFT_FORMS)}")
    if form == "nkd" and kind in ("multi_label", "regression"):
        raise RecipeError.of("soft", form, f"needs one gold class; the task is {kind}", "kl", "mse")
    if form == "mse" and mixed and kind != "regression":
        raise RecipeError.of(
            "soft", form, "compares logits; teachers averaged in probability have none", "kl"
        )


def _check_kind(kind: str) -> None:
    if kind not in TASKS:
        raise RecipeError.of("kind", kind, "no such task", f"known: {', '.join(TASKS)}")


def _check_shapes(logits: Tensor, target: ClassTarget) -> None:
    for part in _parts(target)[0]:
        if part.shape != logits.shape:  # would be broadcast, or taken for a smaller vocabulary
            shapes = tuple(logits.shape), tuple(part.shape)
            raise ValueError("student's logits are {}, the teacher's {}".format(*shapes))


def _squared(kind: str, logits: Tensor, target: ClassTarget, labels: Tensor | None) -> LossTerm:
    parts, weights = _parts(target)
    logits = wide(logits)
    if labels is not None and kind in ("single_label", "token"):
        counted = labels != IGNORE
        logits, parts = logits[counted], [part[counted] for part in parts]
    wanted = torch.zeros_like(logits)
    for part, weight in zip(parts, weights, strict=True):
        wanted = wanted + weight * wide(part).to(logits.dtype)
    return LossTerm((logits - wanted).square().mean(-1).sum(), _examples(logits))


def _binary_kl(
    logits_BC: Tensor, target: ClassTarget, temperature: float, t2_scale: bool
) -> LossTerm:
    yes_BC = wide(logits_BC) / temperature
    total_BC = torch.zeros_like(yes_BC)
    for sign in (1.0, -1.0):  # the class is there, or it is not
        parts = [
            F.logsigmoid(sign * wide(part) / temperature) + math.log(weight)
            for part, weight in zip(*_parts(target), strict=True)
            if weight > 0
        ]
        log_p_BC = (parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(0)).to(
            yes_BC.dtype
        )
        total_BC = total_BC + log_p_BC.exp() * (log_p_BC - F.logsigmoid(sign * yes_BC))
    scale = temperature**2 if t2_scale else 1.0
    return LossTerm(total_BC.mean(-1).sum() * scale, _examples(logits_BC))


def _parts(target: ClassTarget) -> tuple[list[Tensor], tuple[float, ...]]:
    """Logits of each teacher, and their weights."""
    mixed = isinstance(target, MixtureTarget)
    parts, weights = (target.parts, target.weights) if mixed else ((target,), (1.0,))
    found = []
    for part in parts:
        if not isinstance(part, DenseLogits):
            raise ValueError(f"{type(part).__name__} holds no class logits")
        found.append(part.logits_BTV)
    return found, weights


def _one_position(target: ClassTarget) -> ClassTarget:
    if isinstance(target, MixtureTarget):
        parts = tuple(DenseLogits(part[:, None], part.shape[-1]) for part in _parts(target)[0])
        return MixtureTarget(parts, target.weights)
    return DenseLogits(target.logits_BTV[:, None], target.shared)


def _with_positions(kind: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return (logits, labels) if kind == "token" else (logits[:, None], labels.reshape(-1, 1))


def _examples(logits: Tensor) -> Tensor:
    return torch.tensor(len(logits), device=logits.device)
