"""Any soft label and a student's logits as two distributions over the same events: the plain form.

Events are the student's whole vocabulary, or, for a sparse label with the tail `bucket`, its K
tokens and "any other". Everything here takes rows, [N, ...]; callers dropped masked ones before.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.types import HiddenTarget, MixtureTarget, SparseTarget, Target

NEVER = float("-inf")  # the logarithm of no probability at all


def wide(logits: Tensor) -> Tensor:
    """float64 stays float64 (the definition); everything narrower is computed in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def chosen_rows(mask_BT: Tensor) -> Tensor:
    """Numbers of the masked-in positions of the flattened batch, [N]."""
    return mask_BT.reshape(-1).nonzero().squeeze(-1)


def log_events(
    student_NV: Tensor,
    target_N: Target,
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    shared_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(log p, log q)` [N, M] in nats: the label and the student over the same M events.

    Over the whole vocabulary M = V; the teacher has -inf beyond its `shared` entries while the
    student's distribution runs over its whole head, so that its padding is pushed down. With
    `shared_only` both are conditioned on the shared entries, M = shared, except for a `bucket`
    label, whose last event holds the student's padding too. Raises ValueError for a sparse label
    asked for at another temperature than it was made at, and where the label has entries that the
    student's head lacks.
    """
    if isinstance(target_N, SparseTarget) and target_N.tail == "bucket":
        check_temperature(target_N, teacher_temperature)
        log_q_NV = F.log_softmax(wide(student_NV) / student_temperature, dim=-1)
        probs_NK = target_N.probs_BTK.to(log_q_NV.dtype)
        rest_N1 = 1.0 - probs_NK.sum(-1, keepdim=True)
        return bucket_events(log_q_NV, target_N.ids_BTK, probs_NK, rest_N1)
    log_p_NV = log_probs(target_N, student_NV.shape[-1], teacher_temperature)
    if shared_only:
        student_NV = student_NV[:, : target_N.shared]
        log_p_NV = F.log_softmax(log_p_NV[:, : target_N.shared], dim=-1)
    log_q_NV = F.log_softmax(wide(student_NV) / student_temperature, dim=-1)
    return log_p_NV.to(log_q_NV.dtype), log_q_NV


def log_probs(target_N: Target, entries: int, temperature: float) -> Tensor:
    """log p over `entries` tokens, [N, entries], -inf where the label gives none."""
    if isinstance(target_N, MixtureTarget):
        parts = [
            log_probs(part, entries, temperature) + math.log(weight)
            for part, weight in zip(target_N.parts, target_N.weights, strict=True)
            if weight > 0
        ]
        return torch.logsumexp(torch.stack(parts), dim=0)
    if target_N.shared > entries:
        raise ValueError(f"the label has {target_N.shared} entries, the student's head {entries}")
    if isinstance(target_N, SparseTarget):
        check_temperature(target_N, temperature)
        return sparse_probs(target_N, entries).log()
    dense = target_N.dense() if isinstance(target_N, HiddenTarget) else target_N
    log_p_NS = F.log_softmax(wide(dense.logits_BTV[:, : dense.shared]) / temperature, dim=-1)
    return F.pad(log_p_NS, (0, entries - dense.shared), value=NEVER)


def sparse_probs(target_N: SparseTarget, entries: int) -> Tensor:
    """The label of a `renorm` or `smooth` sparse target over the vocabulary, [N, entries]."""
    probs_NK = wide(target_N.probs_BTK)
    listed_N1 = probs_NK.sum(-1, keepdim=True)
    dense_NV = probs_NK.new_zeros(len(probs_NK), entries)
    if target_N.tail == "renorm":
        return dense_NV.scatter_add_(-1, target_N.ids_BTK, probs_NK / listed_N1)
    used_NK = (probs_NK > 0).to(probs_NK.dtype)
    # A tail that rounded to nothing is still not impossible: reverse_kl would be infinite.
    even_N1 = even_share(target_N).clamp_min(torch.finfo(probs_NK.dtype).tiny)
    dense_NV[:, : target_N.shared] = even_N1
    listed_NV = torch.zeros_like(dense_NV).scatter_add_(-1, target_N.ids_BTK, used_NK) > 0
    dense_NV.masked_fill_(listed_NV, 0.0)
    return dense_NV.scatter_add_(-1, target_N.ids_BTK, probs_NK)


def even_share(target_N: SparseTarget) -> Tensor:
    """What each unlisted shared token gets where the tail is spread evenly over them, [N, 1]."""
    probs_NK = wide(target_N.probs_BTK)
    free_N1 = target_N.shared - (probs_NK > 0).sum(-1, keepdim=True)
    rest_N1 = (1.0 - probs_NK.sum(-1, keepdim=True)).clamp_min(0)
    return torch.where(free_N1 > 0, rest_N1 / free_N1.clamp_min(1), 0.0)


def bucket_events(
    log_q_NV: Tensor, ids_NK: Tensor, probs_NK: Tensor, rest_N1: Tensor, *, left_out: int = 0
) -> tuple[Tensor, Tensor]:
    """`(log p, log q)` over the K listed tokens and "any other", [N, K + 1] nats.

    `rest_N1` is the label's probability of any other; `left_out` entries of `log_q_NV`, not listed,
    are -inf and no event at all. Places with probability 0 are unused: -inf on both sides. The
    student's rest is summed, not 1 minus the others: that would lose its gradient once the student
    is sure. Where every entry is listed there is no other: -inf on both sides.
    """
    used_NK = probs_NK > 0
    counts_NV = torch.zeros_like(log_q_NV).scatter_add_(-1, ids_NK, used_NK.to(log_q_NV.dtype))
    log_rest_NV = log_q_NV.masked_fill(counts_NV > 0, NEVER)
    none_N1 = used_NK.sum(-1, keepdim=True) + left_out >= log_q_NV.shape[-1]
    # The fill before the sum keeps its gradient finite, the fill after it gives the value.
    log_rest_N1 = log_rest_NV.masked_fill(none_N1, 0.0).logsumexp(-1, keepdim=True)
    log_q_NK = log_q_NV.gather(-1, ids_NK).masked_fill(~used_NK, NEVER)
    # A tail that rounded to nothing is still not impossible: reverse_kl would be infinite.
    rest_N1 = rest_N1.clamp_min(torch.finfo(rest_N1.dtype).tiny)
    log_p = torch.cat((probs_NK.log(), rest_N1.log().masked_fill(none_N1, NEVER)), -1)
    return log_p, torch.cat((log_q_NK, log_rest_N1.masked_fill(none_N1, NEVER)), -1)


def gold_probability(target_N: Target, gold_N: Tensor, temperature: float = 1.0) -> Tensor:
    """p(gold) that the label gives, [N], in [0, 1]; 0 for gold beyond the shared entries.

    A sparse label that does not list the gold token: with the tail `renorm` 0 (for RS-KD's draws an
    unbiased estimate), with `bucket` and `smooth` the tail's even share, rest / (shared - listed).
    For a bucket that is an estimate [ours]: the label allows anything from 0 to the smaller of the
    rest and its least listed probability; the even share keeps an unlisted token where it belongs,
    far below the listed ones. Raises ValueError for a sparse label made at another temperature.
    """
    if isinstance(target_N, MixtureTarget):
        parts = [gold_probability(part, gold_N, temperature) for part in target_N.parts]
        return sum(
            (weight * part for weight, part in zip(target_N.weights, parts, strict=True)),
            start=torch.zeros_like(parts[0]),
        )
    inside_N = gold_N < target_N.shared
    if isinstance(target_N, SparseTarget):
        check_temperature(target_N, temperature)
        probs_NK = wide(target_N.probs_BTK)
        if target_N.tail == "renorm":
            probs_NK = probs_NK / probs_NK.sum(-1, keepdim=True)
        found_NK = (target_N.ids_BTK == gold_N[:, None]) & (probs_NK > 0)
        listed_N = torch.where(found_NK, probs_NK, 0.0).sum(-1)
        if target_N.tail == "renorm":
            return listed_N
        return torch.where(found_NK.any(-1) | ~inside_N, listed_N, even_share(target_N).squeeze(-1))
    dense = target_N.dense() if isinstance(target_N, HiddenTarget) else target_N
    z_NS = wide(dense.logits_BTV[:, : dense.shared]) / temperature
    z_N = z_NS.gather(-1, gold_N.clamp_max(dense.shared - 1)[:, None]).squeeze(-1)
    return torch.where(inside_N, (z_N - z_NS.logsumexp(-1)).exp(), 0.0)


def covers_shared(target: Target) -> bool:
    """Whether the label gives every shared token some probability."""
    if isinstance(target, MixtureTarget):
        pairs = zip(target.parts, target.weights, strict=True)
        return any(weight > 0 and covers_shared(part) for part, weight in pairs)
    return not (isinstance(target, SparseTarget) and target.tail == "renorm")


def check_temperature(target: SparseTarget, teacher_temperature: float) -> None:
    """ValueError where a sparse label is asked for at another temperature than it was made at."""
    if target.temperature != teacher_temperature:
        raise ValueError(
            f"teacher_temperature={teacher_temperature}, but these sparse labels were made at "
            f"{target.temperature}: what they left out cannot be brought back"
        )
