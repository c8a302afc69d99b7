"""EL2N: rows on which the scoring model is most wrong (Paul et al. 2021, arXiv 2107.07075)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from llmkd.objectives.targets import wide
from llmkd.selection.config import SelectionConfig
from llmkd.selection.forward import logit_scores, row_means
from llmkd.selection.registry import selection


def error_norm(logits_BTV: Tensor, gold_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over each row's masked-in tokens of ||softmax(logits) - onehot(gold)||_2 [B].

    Between 0 (sure and right) and sqrt(2) (sure and wrong). -inf for a row without tokens. The
    paper scores images, averages ten models trained for a few epochs, and keeps the highest; the
    mean over a row's tokens is ours.
    """
    error_BTV = F.softmax(wide(logits_BTV), dim=-1)
    gold_BT1 = gold_BT.clamp(min=0)[..., None]
    error_BTV.scatter_add_(-1, gold_BT1, -error_BTV.new_ones(gold_BT1.shape))
    return row_means(error_BTV.norm(dim=-1), mask_BT)


@selection("el2n", about="mean L2 norm of softmax minus one-hot; the highest are kept")
def el2n_scores(
    rows: Any, *, model: Any, config: SelectionConfig, pad_token_id: int, **_: Any
) -> np.ndarray:
    """`error_norm` of every row."""
    return logit_scores(rows, error_norm, model=model, config=config, pad_token_id=pad_token_id)
