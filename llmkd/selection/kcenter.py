"""Greedy k-center: rows that cover the pool (Sener & Savarese 2018, arXiv 1708.00489)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import DataError
from llmkd.selection.config import SelectionConfig
from llmkd.selection.forward import Batch, from_main, measure_rows
from llmkd.selection.registry import selection

CLOSE = 1e-2  # below this share of |x|^2 + |c|^2 float32 keeps too few digits of |x - c|^2


def mean_hidden(model: Any, batch: Batch) -> Tensor:
    """Final hidden states averaged over each row's tokens, padding left out: float32 [B, H]."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    base = getattr(model, "base_model", model)
    if base is model:
        hidden_BTH = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
    else:  # without the head: no logits are made
        hidden_BTH = base(**inputs, use_cache=False).last_hidden_state
    real_BT1 = batch["real"][..., None]
    return torch.where(real_BT1, hidden_BTH.float(), 0.0).sum(1) / real_BT1.sum(1)


def greedy_centers(points_NH: Tensor, keep: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """`keep` row numbers in the order chosen, and for each its distance to those before it.

    Each next one lies farthest from all chosen so far (Euclidean; ties go to the lower row number),
    so distances never rise; the first gets the largest distance of any row from it. One pass over
    the points for each row chosen, `keep` * N * H operations; memory: a centred copy of the points
    and a few [N], never [N, N].
    """
    if not 0 < keep <= len(points_NH):
        raise DataError.of("selection", f"{keep} rows", f"there are {len(points_NH)}")
    points_NH = points_NH - points_NH.mean(0)  # hidden states share a large mean: no distance
    norms_N = points_NH.square().sum(1)
    nearest_N = torch.full_like(norms_N, float("inf"))
    order, distances = [first], []
    while True:
        nearest_N = torch.minimum(nearest_N, _squares(points_NH, norms_N, order[-1]))
        nearest_N[order[-1]] = -1.0  # chosen: never again, not even among equal points
        if len(order) == 1:
            distances.append(max(float(nearest_N.max()), 0.0))
        if len(order) == keep:
            return np.array(order), np.sqrt(np.array(distances))
        # argmax does not promise the lower of two equal ones
        order.append(int((nearest_N == nearest_N.max()).nonzero()[0]))
        distances.append(float(nearest_N[order[-1]]))


def _squares(points_NH: Tensor, norms_N: Tensor, center: int) -> Tensor:
    # |x|^2 - 2xc + |c|^2 is ten times as fast as |x - c|^2, but equal points must have distance 0.
    scale_N = norms_N + norms_N[center]
    squares_N = scale_N - 2 * (points_NH @ points_NH[center])
    close_M = (squares_N < CLOSE * scale_N).nonzero().squeeze(1)
    squares_N[close_M] = (points_NH[close_M] - points_NH[center]).square().sum(1)
    return squares_N


@selection(
    "kcenter",
    for_keep=True,
    about="distance of mean final hidden states to the nearest row chosen before; rows not "
    "chosen have none",
)
def kcenter_scores(
    rows: Any,
    *,
    seed: int,
    keep: int,
    model: Any,
    config: SelectionConfig,
    pad_token_id: int,
    **_: Any,
) -> np.ndarray:
    """Distance of each chosen row when it was chosen, so that a higher score was chosen earlier;
    -inf for the rows not chosen. The first row comes from the seed.

    The first k of `keep` rows are those that would be chosen for k. Every rank holds the points,
    float32 [rows, H]; one rank chooses.
    """
    points = measure_rows(rows, mean_hidden, model=model, config=config, pad_token_id=pad_token_id)
    first = int(np.random.default_rng([seed, 0xCE]).integers(len(points)))
    device = next(model.parameters()).device

    def choose() -> tuple[np.ndarray, np.ndarray]:
        return greedy_centers(torch.from_numpy(points).to(device), keep, first)

    order, distances = from_main(choose)
    distances[0] = np.nextafter(distances[0], np.inf)  # the first, before the one it ties with
    scores = np.full(len(rows), -np.inf)
    scores[order] = distances
    return scores
