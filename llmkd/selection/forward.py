"""One pass of the scoring model over all rows, shared among ranks: what every scorer goes through.

Shapes: B rows of a batch, T positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llmkd.data.collator import PackedCollator
from llmkd.errors import TeacherError
from llmkd.objectives.token import IGNORE, shift_labels
from llmkd.selection.config import SelectionConfig

Batch = dict[str, Tensor]
Made = TypeVar("Made")


@torch.no_grad()
def measure_rows(
    rows: Any,
    measure: Callable[[Any, Batch], Tensor],
    *,
    model: Any,
    config: SelectionConfig,
    pad_token_id: int,
) -> np.ndarray:
    """`measure(model, batch)` [B] or [B, H] of every packed row, in row order: [rows] or [rows, H].

    Each rank runs its share of the batches, all get the whole. A batch holds `input_ids`,
    `position_ids`, `gold` (the token each position predicts; -100 for padding and document starts)
    and `real` (False on padding), all [B, T]. TeacherError where the model gives NaN.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    device = torch.device(state.device or "cpu")
    model.eval().to(device)
    size = config.selection_batch_size
    mine = list(range(0, len(rows), size))[state.process_index :: state.num_processes]
    found: list[tuple[int, np.ndarray]] = []
    for start in tqdm(mine, desc="scoring rows", disable=not state.is_main_process):
        part = [rows[i] for i in range(start, min(start + size, len(rows)))]
        batch = {name: tensor.to(device) for name, tensor in _batch(part, pad_token_id).items()}
        found.append((start, measure(model, batch).float().cpu().numpy()))
    everyone = gather_object(found) if state.num_processes > 1 else found
    everyone.sort(key=lambda pair: pair[0])
    whole = np.concatenate([values for _, values in everyone])
    bad = np.flatnonzero(np.isnan(whole.reshape(len(whole), -1)).any(1))
    if len(bad):
        raise TeacherError.of(
            "selection_model_name_or_path",
            getattr(model.config, "_name_or_path", "") or type(model).__name__,
            f"gives NaN on {len(bad)} of {len(rows)} rows (the first is row {bad[0]})",
            "choose another checkpoint to score with",
        )
    return whole


def _batch(part: list[dict[str, Any]], pad_token_id: int) -> Batch:
    batch = PackedCollator(pad_token_id)(part)
    lengths_B = torch.tensor([len(row["input_ids"]) for row in part])
    places_T = torch.arange(batch["input_ids"].shape[1])
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "gold": shift_labels(batch["labels"]),
        "real": places_T < lengths_B[:, None],
    }


def logit_scores(
    rows: Any,
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    model: Any,
    config: SelectionConfig,
    pad_token_id: int,
) -> np.ndarray:
    """`score(logits_BTV, gold_BT, mask_BT)` [B] of every packed row, float64 [rows].

    Called with one row at a time, so that only one row's logits are widened to float32. They come
    in the model's own precision: bf16 logits tie by rounding.
    """

    def measure(model: Any, batch: Batch) -> Tensor:
        logits_BTV = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        gold_BT = batch["gold"]
        mask_BT = gold_BT != IGNORE
        one = (slice(place, place + 1) for place in range(len(gold_BT)))
        return torch.cat([score(logits_BTV[i], gold_BT[i], mask_BT[i]) for i in one])

    whole = measure_rows(rows, measure, model=model, config=config, pad_token_id=pad_token_id)
    return whole.astype(np.float64)


def row_means(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of each row over its masked-in positions [B]; -inf for a row without any."""
    count_B = mask_BT.sum(-1)
    mean_B = torch.where(mask_BT, values_BT, 0.0).sum(-1) / count_B.clamp(min=1)
    return torch.where(count_B > 0, mean_B, float("-inf"))


def from_main(make: Callable[[], Made]) -> Made:
    """What `make` returns on the main process, given to all: choices must not differ by rank."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    made: list[Any] = [make() if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(made)
    return made[0]
