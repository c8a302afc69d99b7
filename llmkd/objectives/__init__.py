"""Objectives: pure functions on tensors. Importing this package fills the table."""

from llmkd.objectives import token as token
from llmkd.objectives.chunked import ce_kd_chunked
from llmkd.objectives.reduce import normalise
from llmkd.objectives.registry import OBJECTIVES, find, objective
from llmkd.objectives.schedule import kd_steps, kd_weight_at

__all__ = [
    "OBJECTIVES",
    "ce_kd_chunked",
    "find",
    "kd_steps",
    "kd_weight_at",
    "normalise",
    "objective",
]
