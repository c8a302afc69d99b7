"""The Hub room: push a finished run with a model card; no token ever reaches a text.

`check_hub` before the first step, `push_run` after the last one. `model_card` alone writes no file
and needs no network.
"""

from llmkd.hub.card import model_card
from llmkd.hub.method import DEQA, ERNIE_TINY, IREPO, SALT, MethodInfo
from llmkd.hub.push import check_hub, push_run
from llmkd.hub.secrets import redact

__all__ = [
    "DEQA",
    "ERNIE_TINY",
    "IREPO",
    "SALT",
    "MethodInfo",
    "check_hub",
    "model_card",
    "push_run",
    "redact",
]
