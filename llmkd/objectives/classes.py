"""Objectives for classification heads, on logits [N, C]: a label each, no tokens.

Not in the table of objectives, whose totals are sums over positions that add up over batches:
USKD's soft label depends on the batch it is computed in, and there is no teacher to name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.objectives.gate import smoothed_cross_entropy_rows
from llmkd.objectives.targets import NEVER, wide
from llmkd.types import LossTerm

SMOOTHING = 0.1  # of the middle head's labels


def uskd(
    logits_NC: Tensor,
    middle_logits_NC: Tensor,
    gold_N: Tensor,
    *,
    gold_weight_N: Tensor | None = None,
    mean_square: Tensor | float | None = None,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
) -> LossTerm:
    """USKD, self-distillation without a teacher; Yang et al. 2023, arXiv 2303.13005.

    -alpha P_t log S_t - beta sum over i != t of z_i log S'_i + mu CE(W, gold smoothed by .1), a sum
    in nats over N examples. S is the softmax of `logits_NC` (S' without the gold class t), W that
    of `middle_logits_NC`, a linear head on middle features. P_t and z are detached:
    P_t = S_t^2 + v_t - mean of S_t^2; see `non_target_labels` for z.

    v_t is 1, or `gold_weight_N`, a mixup weight. The mean is over this batch, as in the paper, or
    `mean_square`, so that totals of split batches add up. Defaults are the paper's for ImageNet
    (CIFAR-100: alpha = beta = mu = .1). Metrics, plain sums: "uskd_target", "uskd_non_target",
    "uskd_middle".
    """
    z_NC = wide(logits_NC)
    gold_N1 = gold_N[:, None]
    log_s_N = F.log_softmax(z_NC, dim=-1).gather(-1, gold_N1).squeeze(-1)
    square_N = log_s_N.detach().exp().square()
    if mean_square is None:
        mean_square = square_N.mean() if len(square_N) else 0.0
    v_N = 1.0 if gold_weight_N is None else gold_weight_N.to(square_N.dtype)
    target_N = -(square_N + v_N - mean_square) * log_s_N
    labels_NC = non_target_labels(z_NC, wide(middle_logits_NC), gold_N)
    log_others_NC = F.log_softmax(z_NC.scatter(-1, gold_N1, NEVER), dim=-1)
    others_N = -(labels_NC * log_others_NC.scatter(-1, gold_N1, 0.0)).sum(-1)
    middle_N = smoothed_cross_entropy_rows(middle_logits_NC, gold_N, smoothing=SMOOTHING)
    total = (alpha * target_N + beta * others_N + mu * middle_N).sum()
    parts = {"target": target_N, "non_target": others_N, "middle": middle_N}
    metrics = {f"uskd_{name}": value.detach().sum() for name, value in parts.items()}
    return LossTerm(total, torch.tensor(len(gold_N), device=total.device), metrics)


def non_target_labels(logits_NC: Tensor, middle_logits_NC: Tensor, gold_N: Tensor) -> Tensor:
    """USKD's soft labels of the other classes [N, C]: rows sum to 1, 0 at gold; detached.

    Classes are ranked, the largest first, by W_i / (1 - W_t) + S_i / (1 - S_t); the label is
    proportional to 1 / rank (Zipf). Gold takes a rank and is dropped after. So the paper; its code
    (yzd-v/cls_KD at 1c2c0ff) has log S in the place of S. Ties go to the lower class number.
    """
    gold_N1 = gold_N[:, None]
    score_NC = torch.zeros_like(logits_NC)
    for other_NC in (logits_NC.detach(), middle_logits_NC.detach()):
        share_NC = other_NC.softmax(-1)
        # 1 - S_t without cancellation: what the others hold.
        rest_N1 = share_NC.scatter(-1, gold_N1, 0.0).sum(-1, keepdim=True)
        score_NC = score_NC + share_NC / rest_N1.clamp_min(torch.finfo(share_NC.dtype).tiny)
    order_NC = score_NC.sort(dim=-1, descending=True, stable=True).indices
    ranks_C = torch.arange(1, logits_NC.shape[-1] + 1, device=logits_NC.device)
    zipf_C = 1.0 / ranks_C.to(score_NC.dtype)
    zipf_NC = torch.zeros_like(score_NC).scatter(-1, order_NC, zipf_C.expand_as(order_NC))
    zipf_NC = zipf_NC.scatter(-1, gold_N1, 0.0)
    return zipf_NC / zipf_NC.sum(-1, keepdim=True)
