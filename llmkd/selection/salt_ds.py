"""SALT_DS: rows whose learnable part is hard for an early small model (arXiv 2410.18779)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llmkd.data.collator import PackedCollator
from llmkd.objectives.token import IGNORE, shift_labels, wide
from llmkd.selection.config import SelectionConfig
from llmkd.selection.registry import scorer


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


@scorer("salt_ds")
@torch.no_grad()
def salt_ds_scores(
    rows: Any, *, model: Any, config: SelectionConfig, pad_token_id: int, **_: Any
) -> np.ndarray:
    """Score every packed row with `model`; each rank does its share, all get the whole.

    Padding, document starts and everything the collator gives label -100 do not count.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    device = torch.device(state.device or "cpu")
    model.eval().to(device)
    collate = PackedCollator(pad_token_id)
    size = config.selection_batch_size
    mine = list(range(0, len(rows), size))[state.process_index :: state.num_processes]
    found: list[tuple[int, list[float]]] = []
    for start in tqdm(mine, desc="scoring rows", disable=not state.is_main_process):
        batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        # In the model's own precision: bf16 logits tie by rounding, and ties count as "within".
        logits_BTV = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        gold_BT = shift_labels(batch["labels"])
        scores_B = median_of_top_k(
            logits_BTV,
            gold_BT,
            gold_BT != IGNORE,
            top_k=config.selection_top_k,
            min_kept=config.selection_min_kept,
        )
        found.append((start, scores_B.tolist()))
    everyone = gather_object(found) if state.num_processes > 1 else found
    return np.array([score for _, part in sorted(everyone) for score in part])
