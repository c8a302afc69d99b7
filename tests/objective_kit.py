"""The table the contracts of objectives run over: every form times every kind of soft label.

A new objective in `OBJECTIVES` must get a row in `FORMS`; a fast form gets a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkd.objectives import OBJECTIVES, FusedLinearKD, ce_kd_chunked
from llmkd.objectives.divergences import DIVERGENCES
from llmkd.objectives.targets import log_probs
from llmkd.types import (
    DenseLogits,
    Head,
    HiddenTarget,
    LossTerm,
    MixtureTarget,
    SparseTarget,
    Target,
)

KINDS = ("dense", "hidden", "bucket", "renorm", "smooth", "sampled", "mixture")
COVERING = ("dense", "hidden", "bucket", "smooth", "mixture")  # p > 0 on every shared token
NEVER = -1e4  # a logit nothing comes back from


@dataclass(frozen=True)
class Form:
    """A way to call an objective: `call(student, target, mask, gold, **settings) -> LossTerm`.

    `kinds`: labels it takes. `kd_weight`: the share that is not CE. `weights`, `tempers`: whether
    it takes weights_BT and the temperatures with t2_scale. `distance`: the metric that is 0 for a
    student that matches its label. `label_part`: what must then have no gradient.
    """

    call: Callable[..., LossTerm]
    doc: str
    kinds: tuple[str, ...] = KINDS
    kd_weight: float = 1.0
    weights: bool = True
    tempers: bool = True
    distance: str | None = None
    label_part: Callable[..., LossTerm] | None = None


def plain(objective: Callable[..., LossTerm], **fixed):
    """Of the signature (student, target, mask, **settings)."""
    return lambda student, target, mask, gold, **settings: objective(
        student, target, mask, **fixed, **settings
    )


def golden(objective: Callable[..., LossTerm], **fixed):
    """The same with gold_BT."""
    return lambda student, target, mask, gold, **settings: objective(
        student, target, mask, gold_BT=gold, **fixed, **settings
    )


def gold_only(student, target, mask, gold, **settings) -> LossTerm:
    return OBJECTIVES["cross_entropy"](student, gold, mask, **settings)


def nkd_others(*args, **settings) -> LossTerm:
    """NKD's second term alone: the whole minus what gamma = 0 leaves."""
    one, none = (
        golden(OBJECTIVES["nkd"], gamma=gamma, ce_weight=0.0)(*args, **settings)
        for gamma in (1.0, 0.0)
    )
    return LossTerm(one.total - none.total, one.count, {})


def divergence_form(name: str, **options: float) -> Form:
    divergence = DIVERGENCES[name]
    return Form(
        plain(divergence, **options),
        divergence.rows.__doc__ or "",
        COVERING if divergence.needs_everywhere(options) else KINDS,
        distance=None if name == "soft_cross_entropy" else divergence.metric,
    )


def mix_form(objective, doc: str, divergence: str = "forward_kl", weight: float = 0.6, **fields):
    """CE + KD with a gold token; fields of `Form` on top. Fused forms fit here too."""
    fixed = {} if divergence == "forward_kl" else {"divergence": divergence}
    find = DIVERGENCES[divergence]
    return Form(
        golden(objective, kd_weight=weight, **fixed),
        doc,
        kd_weight=weight,
        distance=find.metric,
        label_part=golden(objective, kd_weight=1.0, **fixed),
        **{"kinds": COVERING if find.everywhere is True else KINDS, **fields},
    )


def fused(student, target, mask, *, gold_BT, weights_BT=None, **settings):
    """The fused head on logits: hidden states that are logits already, under an identity head."""
    if "divergence" in settings and "beta" in settings:
        settings["options"] = {"beta": settings.pop("beta")}
    kd = FusedLinearKD(**settings)
    eye = Head(torch.eye(student.shape[-1], dtype=student.dtype))
    return kd(student, eye, target, mask, gold_BT=gold_BT, weights_BT=weights_BT)


CE_KD = OBJECTIVES["ce_kd"]
FORMS: dict[str, Form] = {
    **{name: divergence_form(name) for name in DIVERGENCES},
    "js beta=0": divergence_form("js", beta=0.0),
    "js beta=.1": divergence_form("js", beta=0.1),
    "js beta=1": divergence_form("js", beta=1.0),
    "skew_reverse_kl skew=0": divergence_form("skew_reverse_kl", skew=0.0),
    "cross_entropy": Form(
        gold_only, OBJECTIVES["cross_entropy"].__doc__ or "", ("dense",), 0.0, tempers=False
    ),
    "nkd": Form(
        golden(OBJECTIVES["nkd"]),
        OBJECTIVES["nkd"].__doc__ or "",
        tempers=False,
        label_part=nkd_others,
    ),
    "ce_kd": mix_form(CE_KD, CE_KD.__doc__ or ""),
    "ce_kd js": mix_form(CE_KD, CE_KD.__doc__ or "", "js"),
    "ce_kd reverse_kl": mix_form(CE_KD, CE_KD.__doc__ or "", "reverse_kl"),
    "ce_kd_chunked": mix_form(ce_kd_chunked, ce_kd_chunked.__doc__ or "", weights=False),
    "fused": mix_form(fused, FusedLinearKD.__doc__ or ""),
    "fused js": mix_form(fused, FusedLinearKD.__doc__ or "", "js"),
    "fused reverse_kl": mix_form(fused, FusedLinearKD.__doc__ or "", "reverse_kl"),
    "ce_kd_chunked js": mix_form(ce_kd_chunked, ce_kd_chunked.__doc__ or "", "js", weights=False),
}
CASES = [(name, kind) for name, form in FORMS.items() for kind in form.kinds]
TEMPERED = [(name, kind) for name, kind in CASES if FORMS[name].tempers]
WEIGHTED = [(name, kind) for name, kind in CASES if FORMS[name].weights]


def label(kind: str, teacher_BTV: Tensor, shared: int, temperature: float = 1.0) -> Target:
    """A soft label of that kind from a teacher's logits; sparse ones are made at `temperature`."""
    if kind == "dense":
        return DenseLogits(teacher_BTV, shared)
    if kind == "hidden":
        turn_VV = torch.linalg.qr(torch.randn(2 * teacher_BTV.shape[-1:], dtype=torch.float64)).Q
        turn_VV = turn_VV.to(teacher_BTV.dtype)
        return HiddenTarget(teacher_BTV @ turn_VV, Head(turn_VV), shared)
    if kind == "mixture":
        other = label("renorm", teacher_BTV * 0.5, shared, temperature)
        return MixtureTarget((DenseLogits(teacher_BTV, shared), other), (0.25, 0.75))
    p_BTV = (teacher_BTV[..., :shared] / temperature).softmax(-1)
    if kind == "sampled":
        draws_ND = p_BTV.reshape(-1, shared).multinomial(20, replacement=True)
        counts = torch.zeros(len(draws_ND), shared, dtype=p_BTV.dtype)
        counts.scatter_add_(-1, draws_ND, torch.ones_like(draws_ND, dtype=p_BTV.dtype))
        p_BTV = (counts / 20).reshape(p_BTV.shape)
    top = p_BTV.topk(6 if kind == "sampled" else 4, dim=-1)
    tail = "renorm" if kind == "sampled" else kind
    return SparseTarget(top.indices, top.values, shared, tail, temperature)


def mapped(target: Target, change: Callable[[Tensor], Tensor]) -> Target:
    """The target with `change` done to each of its [B, T, ...] tensors."""
    if isinstance(target, MixtureTarget):
        return replace(target, parts=tuple(mapped(part, change) for part in target.parts))
    if isinstance(target, HiddenTarget):
        return replace(target, hidden_BTH=change(target.hidden_BTH))
    if isinstance(target, SparseTarget):
        ids, probs = change(target.ids_BTK), change(target.probs_BTK)
        return replace(target, ids_BTK=ids, probs_BTK=probs)
    return replace(target, logits_BTV=change(target.logits_BTV))


def poisoned(target: Target, hole_BT: Tensor) -> Target:
    """NaN, or an id that does not exist, wherever `hole_BT` is True."""
    return mapped(
        target,
        lambda x: x.masked_fill(
            hole_BT[..., None], float("nan") if x.is_floating_point() else 10**9
        ),
    )


def doubled(target: Target) -> Target:
    """The same numbers in float64."""
    if isinstance(target, MixtureTarget):
        return replace(target, parts=tuple(doubled(part) for part in target.parts))
    target = mapped(target, lambda x: x.double() if x.is_floating_point() else x)
    if isinstance(target, HiddenTarget):
        return replace(target, head=replace(target.head, weight=target.head.weight.double()))
    return target


def matching(kind: str, target: Target, teacher_BTV: Tensor) -> Tensor:
    """Logits of a student that gives every event of the label its probability."""
    if kind == "bucket":
        return teacher_BTV.clone()
    flat = target.take(torch.arange(teacher_BTV.shape[:-1].numel()))
    return log_probs(flat, teacher_BTV.shape[-1], 1.0).clamp_min(NEVER).view(teacher_BTV.shape)
