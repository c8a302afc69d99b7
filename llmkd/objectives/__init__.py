"""Objectives: pure functions on tensors. Importing this package fills the table."""

from llmkd.objectives import divergences as divergences
from llmkd.objectives import nkd as nkd
from llmkd.objectives import token as token
from llmkd.objectives.chunked import ce_kd_chunked
from llmkd.objectives.classes import uskd
from llmkd.objectives.fused import FusedLinearKD, head_scores
from llmkd.objectives.gate import Gate, ferkd_gate, gate_threshold, smoothed_cross_entropy_rows
from llmkd.objectives.nkd import nkd_rows
from llmkd.objectives.preference import (
    PREFERENCE_LOSSES,
    PreferenceLoss,
    find_preference_loss,
    preference_loss,
)
from llmkd.objectives.reduce import normalise
from llmkd.objectives.registry import OBJECTIVES, find, objective
from llmkd.objectives.schedule import kd_steps, kd_weight_at, kd_weight_of_fraction
from llmkd.objectives.targets import gold_probability

__all__ = [
    "OBJECTIVES",
    "PREFERENCE_LOSSES",
    "FusedLinearKD",
    "Gate",
    "PreferenceLoss",
    "ce_kd_chunked",
    "ferkd_gate",
    "find",
    "find_preference_loss",
    "gate_threshold",
    "gold_probability",
    "head_scores",
    "kd_steps",
    "kd_weight_at",
    "kd_weight_of_fraction",
    "nkd_rows",
    "normalise",
    "objective",
    "preference_loss",
    "smoothed_cross_entropy_rows",
    "uskd",
]
