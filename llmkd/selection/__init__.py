"""Selection: which rows deserve the soft labels. `random` is one of them, always."""

from llmkd.selection import salt_ds as salt_ds
from llmkd.selection.config import SelectionConfig
from llmkd.selection.registry import SCORERS, find, scorer, top_rows
from llmkd.selection.store import histogram, read_scores, save_scores

__all__ = [
    "SCORERS",
    "SelectionConfig",
    "find",
    "histogram",
    "read_scores",
    "save_scores",
    "scorer",
    "top_rows",
]
