"""Rows the scoring model is unsure of: the surest bet (`margin`), and a robust one (`rad`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from llmkd.objectives.targets import wide
from llmkd.selection import rad
from llmkd.selection.config import SelectionConfig
from llmkd.selection.forward import logit_scores, row_means
from llmkd.selection.registry import check_scores, selection


def unsure(logits_BTV: Tensor, gold_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - mean over each row's masked-in tokens of (largest - second probability) [B], in [0, 1].

    The gold tokens do not matter. -inf for a row without tokens.
    """
    top_BT2 = F.softmax(wide(logits_BTV), dim=-1).topk(2, dim=-1).values
    return row_means(1.0 - (top_BT2[..., 0] - top_BT2[..., 1]), mask_BT)


@selection("margin", about="1 - mean top-2 probability margin; the highest are kept")
def margin_scores(
    rows: Any, *, model: Any, config: SelectionConfig, pad_token_id: int, **_: Any
) -> np.ndarray:
    """`unsure` of every row."""
    return logit_scores(rows, unsure, model=model, config=config, pad_token_id=pad_token_id)


def pick_robust(
    scores: np.ndarray,
    keep: int,
    *,
    seed: int,
    config: SelectionConfig,
    held_out_error: float | None = None,
) -> np.ndarray:
    """`keep` rows, ascending, drawn by RAD with the scores as gains (see `llmkd.selection.rad`).

    `held_out_error` is the share of held-out rows the teacher gets wrong, where somebody measured
    it; `selection_rad_mistakes` goes before it. Rows without a score are not in the pool.
    """
    check_scores(scores, keep)
    pool = np.flatnonzero(np.isfinite(scores))
    wrong = rad.mistakes(config.selection_rad_mistakes, len(pool), held_out_error)
    odds = rad.marginals(scores[pool], wrong, keep)
    return pool[rad.dep_round(odds, np.random.default_rng([seed, 0x4AD]))].astype(np.int64)


selection(
    "rad",
    pick=pick_robust,
    about="gain: 1 - mean top-2 probability margin; drawn so that wrong labels on the rows with "
    "the largest expected gain cost least",
)(margin_scores)
