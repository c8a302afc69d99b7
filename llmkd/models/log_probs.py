"""Log-probabilities of whole completions under a causal LM: the sums that preference losses and
their references are made of. Training and reference run the very same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmkd.data.pair_collator import padded
from llmkd.errors import DataError, NonFiniteError
from llmkd.objectives.sequence import fused_token_log_probs, token_log_probs
from llmkd.objectives.token import IGNORE, shift_labels
from llmkd.teachers.causal_head import TASK, head_agrees, open_head
from llmkd.types import Head


@dataclass
class CompletionScorer:
    """Sums over the labelled tokens of log q in nats, [B] float64, with gradients where wanted.

    Goes through the model's own forward, so that wrapped and sharded models work. `fused` never
    makes whole logits (`memory_mib` bounds what it makes); models whose logits are more than hidden
    states times a weight are found out on the first batch and projected the plain way.
    """

    memory_mib: int = 192
    fused: bool = True
    _opens: bool | None = field(default=None, repr=False)
    _blocks: dict[str, Any] = field(default_factory=dict, repr=False)

    def open(self, model: Any) -> None:
        """Prepare a model, wrapped or not, for `__call__`. RecipeError for LoRA on its head."""
        while isinstance(inner := getattr(model, "module", None), nn.Module):
            model = inner
        if not self.fused or not open_head(model):
            self._opens = False

    def __call__(self, model: Any, input_ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Rows padded on the right; labels are the ids of completion tokens, else -100.

        No attention mask: a causal model's real tokens never see padding behind them, and without
        one the fastest attention kernels serve.
        """
        gold_BT = shift_labels(labels_BT)
        mask_BT = gold_BT != IGNORE
        if self._opens is None:
            plain = isinstance(model, nn.DataParallel)
            self._opens = not plain and head_agrees(model, {"input_ids": input_ids_BT})
        if not self._opens:
            logits_NV = model(input_ids=input_ids_BT, use_cache=False).logits[mask_BT]
            return _row_sums(token_log_probs(logits_NV, gold_BT[mask_BT]), mask_BT)

        def task(hidden_BTH: Tensor, head: Head) -> dict[str, Tensor]:
            log_q_N = fused_token_log_probs(
                hidden_BTH[mask_BT], head, gold_BT[mask_BT], self.memory_mib, self._blocks
            )
            return {"sums": _row_sums(log_q_N, mask_BT)}

        return model(input_ids=input_ids_BT, use_cache=False, **{TASK: task})["sums"]


def _row_sums(log_q_N: Tensor, mask_BT: Tensor) -> Tensor:
    # Scattered and summed by rows: adding into rows by index has no fixed order on a GPU.
    table_BT = torch.zeros(mask_BT.shape, dtype=torch.float64, device=log_q_N.device)
    return table_BT.masked_scatter(mask_BT, log_q_N.double()).sum(1)


@torch.no_grad()
def completion_log_probs(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    device: Any = None,
    memory_mib: int = 192,
    autocast: torch.dtype | None = None,
    scorer: CompletionScorer | None = None,
    bar: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """log pi(completion | prompt) in nats, token sums, [N] float64 in the order given.

    Runs in evaluation mode in batches of like length, longest first. `autocast` is the dtype that
    training will run in, where it uses autocast. `scorer` is an opened one to use again; `bar` is
    told how many rows are done after each batch. A collective for a model that is sharded: all
    ranks give the same number of rows. DataError for an empty prompt or completion, NonFiniteError
    where a sum is not finite.
    """
    rows = [
        _joined(place, prompt, ids)
        for place, (prompt, ids) in enumerate(zip(prompt_ids, completion_ids, strict=True))
    ]
    if scorer is None:
        scorer = CompletionScorer(memory_mib)
        scorer.open(model)
    device = next(model.parameters()).device if device is None else torch.device(device)
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
    found = np.zeros(len(rows))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            ids_BT, labels_BT = padded([rows[place] for place in some], 0)
            with _autocast(device, autocast):
                sums_B = scorer(model, ids_BT.to(device), labels_BT.to(device))
            found[some] = sums_B.double().cpu().numpy()
            if bar is not None:
                bar(len(some))
    finally:
        model.train(training)
    if len(wrong := np.flatnonzero(~np.isfinite(found))):
        raise NonFiniteError(
            f"log-probability of completion {wrong[0]} is {found[wrong[0]]}\n"
            "  - the model's weights may hold NaN: load it anew\n"
            "  - in float16 logits can overflow: use bfloat16 or float32"
        )
    return found


def _joined(place: int, prompt: Sequence[int], ids: Sequence[int]) -> tuple[list[int], list[int]]:
    if not len(prompt) or not len(ids):
        which = "completion" if len(prompt) else "prompt"
        raise DataError.of(which, [], f"row {place} has no tokens there")
    return [*prompt, *ids], [*[IGNORE] * len(prompt), *ids]


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
