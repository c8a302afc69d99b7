"""Selection: which rows deserve the soft labels. `random` is one of them, always."""

from llmkd.selection import el2n as el2n
from llmkd.selection import kcenter as kcenter
from llmkd.selection import margin as margin
from llmkd.selection import rad as rad
from llmkd.selection import salt_ds as salt_ds
from llmkd.selection.config import SelectionConfig
from llmkd.selection.controls import controls, four_cells, has_controls
from llmkd.selection.forward import from_main
from llmkd.selection.registry import SELECTIONS, Selection, find, selection, top_rows
from llmkd.selection.store import histogram, read_scores, save_scores

__all__ = [
    "SELECTIONS",
    "Selection",
    "SelectionConfig",
    "controls",
    "find",
    "four_cells",
    "from_main",
    "has_controls",
    "histogram",
    "read_scores",
    "save_scores",
    "selection",
    "top_rows",
]
