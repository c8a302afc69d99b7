"""The model card: Markdown with metadata, every line of it read from the run folder."""

from __future__ import annotations

from pathlib import Path

from llmkd.hub.align_card import align_card
from llmkd.hub.facts import read_facts
from llmkd.hub.lm_card import lm_card
from llmkd.hub.method import DEQA, ERNIE_TINY, IREPO, MethodInfo, method_of
from llmkd.hub.score_card import score_card
from llmkd.hub.task_card import task_card


def model_card(
    run_folder: Path,
    *,
    repo_id: str | None,
    method: MethodInfo | None = None,
    revision: str | None = None,
) -> str:
    """The card of the model in `run_folder`; what the folder does not hold is left out.

    The kind in run.json decides what the card tells, and whose paper it names if `method` is None.
    `repo_id` and `revision` go into the lines that load the model; without a `repo_id` these lines
    load the folder itself. Writes nothing, and no token the folder may hold comes into it. Raises
    HubError if a file of the run is not readable or its kind is unknown.
    """
    facts = read_facts(Path(run_folder))
    kind = facts.run.get("kind")
    cards = {ERNIE_TINY.name: task_card, IREPO.name: align_card, DEQA.name: score_card}
    write = cards.get(str(kind), lm_card)
    return write(facts, repo_id=repo_id, method=method or method_of(kind), revision=revision)
