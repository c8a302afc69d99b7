"""FerKD's gate: where the teacher does not believe the gold token, do not learn from the teacher.

Shen, ICCV 2023 (FerKD): soft labels on regions the teacher is sure of, softened ground truth where
it is not, the least sure dropped. The paper's thresholds are not known to us: a percentile of the
teacher's probability of the gold token stands in for them [ours].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.objectives.targets import wide

Below = Literal["smooth", "drop"]


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """What to do at each of N positions; exactly one of the three masks, bool [N], holds there.

    `kd`: learn from the teacher. `smooth`: cross-entropy to gold softened by `smoothing`. `drop`:
    nothing. `threshold` is the probability that divided them (-inf where nothing is gated).
    """

    kd: Tensor
    smooth: Tensor
    drop: Tensor
    threshold: Tensor
    smoothing: float

    def combine(self, kd_N: Tensor, smooth_ce_N: Tensor) -> Tensor:
        """Rows of the loss, [N]: `kd_N` or `smooth_ce_N` as the gate says, 0 where it drops.

        Chosen and not multiplied by 0: an infinite row that is not taken does no harm.
        """
        return torch.where(self.kd, kd_N, torch.where(self.smooth, smooth_ce_N, 0.0))


def ferkd_gate(
    gold_p_N: Tensor,
    *,
    percentile: float = 10.0,
    threshold: Tensor | float | None = None,
    below: Below = "smooth",
    smoothing: float = 0.1,
) -> Gate:
    """Gate N positions on the teacher's probability of the gold token (`gold_probability`).

    Below the threshold: label-smoothed cross-entropy, or nothing (`below="drop"`); else KD. The
    threshold is the given one (a running one: keep and update it yourself) or `gate_threshold` of
    these very positions, and then the gate depends on what else is in the batch: ranks and
    accumulated micro-batches gate apart. A position whose label gives gold nothing at all is below
    every threshold >= 0. Raises RecipeError for a percentile outside [0, 100], a smoothing outside
    [0, 1], an unknown `below`.
    """
    if below not in get_args(Below):
        raise RecipeError.of("below", below, "unknown", f"known: {', '.join(get_args(Below))}")
    if not 0.0 <= smoothing <= 1.0:
        raise RecipeError.of("smoothing", smoothing, "must lie in [0, 1]", "default: 0.1")
    if threshold is None:
        threshold = gate_threshold(gold_p_N, percentile)
    threshold = torch.as_tensor(threshold, dtype=gold_p_N.dtype, device=gold_p_N.device)
    below_N = (gold_p_N < threshold) | ((gold_p_N == 0) & (threshold >= 0))
    nowhere_N = torch.zeros_like(below_N)
    smooth_N, drop_N = (below_N, nowhere_N) if below == "smooth" else (nowhere_N, below_N)
    return Gate(~below_N, smooth_N, drop_N, threshold, smoothing)


def gate_threshold(gold_p_N: Tensor, percentile: float = 10.0) -> Tensor:
    """The percentile of p(gold) over N positions, a scalar; -inf for percentile 0 or N = 0.

    Linear between neighbours, as numpy's. Sorted here because `torch.quantile` refuses more than
    16 million numbers. Raises RecipeError for a percentile outside [0, 100].
    """
    if not 0.0 <= percentile <= 100.0:
        raise RecipeError.of("percentile", percentile, "must lie in [0, 100]", "default: 10")
    if percentile == 0.0 or gold_p_N.numel() == 0:
        return gold_p_N.new_tensor(float("-inf"))
    sorted_N = gold_p_N.detach().reshape(-1).sort().values
    place = percentile / 100.0 * (len(sorted_N) - 1)
    low = int(place)
    high = min(low + 1, len(sorted_N) - 1)
    return sorted_N[low].lerp(sorted_N[high], place - low)


def smoothed_cross_entropy_rows(
    logits_NV: Tensor, gold_N: Tensor, *, smoothing: float = 0.1, entries: int | None = None
) -> Tensor:
    """-sum y log q, [N] nats, with y = (1 - smoothing) onehot(gold) + smoothing / entries.

    The even part runs over the first `entries` tokens (default: all), gold among them; give the
    tokenizer's size where the head is padded. q runs over the whole head.
    """
    log_q_NV = F.log_softmax(wide(logits_NV), dim=-1)
    gold_log_N = log_q_NV.gather(-1, gold_N[:, None]).squeeze(-1)
    even_log_N = log_q_NV[:, :entries].mean(-1)
    return -(1.0 - smoothing) * gold_log_N - smoothing * even_log_N
