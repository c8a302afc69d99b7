"""SALT_DS: rows whose learnable part is hard for an early small model (arXiv 2410.18779)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import RecipeError
from llmkd.objectives.targets import wide
from llmkd.selection.config import SelectionConfig
from llmkd.selection.forward import logit_scores
from llmkd.selection.registry import selection


def median_of_top_k(
    logits_BTV: Tensor, gold_BT: Tensor, mask_BT: Tensor, *, top_k: int, min_kept: float = 0.0
) -> Tensor:
    """S_k of each row [B]: median of -log P(gold) in nats over tokens within the model's top k.

    Tokens outside the top k are removed, not zeroed. A token is within when fewer than k logits are
    strictly larger than its own, so that ties count for it. The median of an even number of values
    is the mean of the two middle ones (`torch.median` takes the lower). A row that keeps no token,
    or less than `min_kept` of its masked-in ones, gets -inf.
    """
    logits_BTV = wide(logits_BTV)
    gold_BT1 = gold_BT.clamp(min=0)[..., None]
    own_BT1 = logits_BTV.gather(-1, gold_BT1)
    nll_BT = (torch.logsumexp(logits_BTV, -1, keepdim=True) - own_BT1).squeeze(-1)
    kept_BT = ((logits_BTV > own_BT1).sum(-1) < top_k) & mask_BT
    medians_B = torch.nanquantile(nll_BT.masked_fill(~kept_BT, float("nan")), 0.5, dim=-1)
    kept_B, counted_B = kept_BT.sum(-1), mask_BT.sum(-1)
    poor_B = (kept_B == 0) | (kept_B < min_kept * counted_B)
    return torch.where(poor_B, float("-inf"), medians_B)


@selection(
    "salt_ds",
    reads=("selection_top_k", "selection_min_kept"),
    about="median loss over the tokens in the scoring model's top k, nats; the highest are kept",
)
def salt_ds_scores(
    rows: Any, *, model: Any, config: SelectionConfig, pad_token_id: int, **_: Any
) -> np.ndarray:
    """S_k of every row in nats. RecipeError for a top k beyond the model's vocabulary."""
    top_k, vocab = config.selection_top_k, model.config.get_text_config().vocab_size
    if top_k > vocab:
        raise RecipeError.of(
            "selection_top_k", top_k, f"the scoring model has only {vocab} tokens", "paper: 10"
        )

    def score(logits_BTV: Tensor, gold_BT: Tensor, mask_BT: Tensor) -> Tensor:
        min_kept = config.selection_min_kept
        return median_of_top_k(logits_BTV, gold_BT, mask_BT, top_k=top_k, min_kept=min_kept)

    return logit_scores(rows, score, model=model, config=config, pad_token_id=pad_token_id)
