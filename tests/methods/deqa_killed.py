"""`llmkd deqa RECIPE` killed at five places one after the other, as kill -9 does it.

python tests/methods/deqa_killed.py RECIPE

Prints each place. A process a place, forked from one that has imported everything and computed
nothing, so that five kills cost one start.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from llmkd.cli import main
from llmkd.methods import deqa
from llmkd.methods.run_folder import RunFolder
from llmkd.models.scorer import Scorer
from llmkd.trainers import ScoreTrainer


def before(owner: Any, name: str, here: Callable[..., bool]) -> None:
    """Kill this process before the first call of `owner.name` for which `here` is true."""
    real = getattr(owner, name)

    def called(*args: Any, **keys: Any) -> Any:
        if here(*args, **keys):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keys)

    setattr(owner, name, called)


def at_step(step: int) -> Callable[..., bool]:
    return lambda trainer, *_: trainer.state.global_step == step


PLACES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "training": (ScoreTrainer, "training_step", at_step(3)),
    "saved, not ended": (RunFolder, "end", lambda run, **_: run.path.name == "full"),
    "scoring": (Scorer, "_numbers", lambda scorer, some, *_: len(some) < scorer.batch_size),
    "between arms": (deqa, "train", lambda arm: arm.name == "lora"),
    "training the second arm": (ScoreTrainer, "training_step", at_step(5)),
}


def killed(path: str, place: str) -> bool:
    """Whether a run of its own process was killed at this place."""
    child = os.fork()
    if not child:
        before(*PLACES[place])
        os._exit(main(["deqa", path]))
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    for one in PLACES:
        assert killed(sys.argv[1], one), one
        print(f"killed: {one}", flush=True)
