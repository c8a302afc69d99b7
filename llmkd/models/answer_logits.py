"""A scorer's answer to a batch: logits at the level token, and how likely the rest of it is. Only
those positions go through the head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkd.errors import DataError
from llmkd.objectives.sequence import fused_token_log_probs, token_log_probs
from llmkd.objectives.token import IGNORE, shift_labels
from llmkd.teachers.causal_head import TASK, head_agrees, open_head
from llmkd.types import Head


class Answer(NamedTuple):
    """`level_BV`: logits that predict the level token. `rest_B`: sum of log q over the answer's
    other tokens, float64 nats, and `rest_count_B` how many those are.
    """

    level_BV: Tensor
    rest_B: Tensor
    rest_count_B: Tensor


@dataclass
class AnswerReader:
    """Answers of a causal or image-text model, with gradients where wanted.

    Goes through the model's own forward, so that wrapped and sharded models work. `fused` projects
    the needed positions only, the rest of the answer without whole logits (`memory_mib` bounds what
    it makes); models whose logits are more than hidden states times a weight are found out on the
    first batch. Image-text models make their plain logits.
    """

    memory_mib: int = 192
    fused: bool = True
    _opens: bool | None = field(default=None, repr=False)
    _images: bool = field(default=False, repr=False)
    _blocks: dict[str, Any] = field(default_factory=dict, repr=False)

    def open(self, model: Any) -> None:
        """Prepare a model, wrapped or not, for `__call__`. RecipeError for LoRA on its head."""
        while isinstance(inner := getattr(model, "module", None), nn.Module):
            model = inner
        self._images = model.config.get_text_config() is not model.config
        if self._images or not self.fused or not open_head(model):
            self._opens = False

    def __call__(
        self, model: Any, features: dict[str, Tensor], labels_BT: Tensor, level_at_B: Tensor
    ) -> Answer:
        """Rows padded on the right; `level_at_B` > 0 is the level token's place in the ids.

        Text goes without an attention mask: a causal model's real tokens never see padding behind
        them, and without one the fastest attention kernels serve. DataError where an image-text
        model makes more logits than there are ids.
        """
        if not self._images:
            features = {"input_ids": features["input_ids"]}
        gold_BT = shift_labels(labels_BT)
        row_B = torch.arange(len(gold_BT), device=gold_BT.device)
        mask_BT = gold_BT != IGNORE
        mask_BT[row_B, level_at_B - 1] = False

        def answer(level_BV: Tensor, log_q_N: Tensor) -> Answer:
            return Answer(level_BV, _row_sums(log_q_N, mask_BT), mask_BT.sum(1))

        if self._opens is None:
            plain = isinstance(model, nn.DataParallel)
            self._opens = not plain and head_agrees(model, features)
        if not self._opens:
            logits_BTV = model(**features, use_cache=False).logits
            if logits_BTV.shape[:2] != gold_BT.shape:
                shapes = tuple(logits_BTV.shape[:2]), tuple(gold_BT.shape)
                problem = "the model makes {} logits of {} tokens".format(*shapes)
                way = "the processor must put as many tokens as an image has parts: patch_size"
                raise DataError.of("input_ids", shapes[1], problem, way)
            log_q_N = token_log_probs(logits_BTV[mask_BT], gold_BT[mask_BT])
            return answer(logits_BTV[row_B, level_at_B - 1], log_q_N)

        def task(hidden_BTH: Tensor, head: Head) -> dict[str, Tensor]:
            log_q_N = fused_token_log_probs(
                hidden_BTH[mask_BT], head, gold_BT[mask_BT], self.memory_mib, self._blocks
            )
            return answer(head(hidden_BTH[row_B, level_at_B - 1]), log_q_N)._asdict()

        return Answer(**model(**features, use_cache=False, **{TASK: task}))


def _row_sums(log_q_N: Tensor, mask_BT: Tensor) -> Tensor:
    # Scattered and summed by rows: adding into rows by index has no fixed order on a GPU.
    table_BT = torch.zeros(mask_BT.shape, dtype=torch.float64, device=log_q_N.device)
    return table_BT.masked_scatter(mask_BT, log_q_N.double()).sum(1)
