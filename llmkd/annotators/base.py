"""The protocol of annotators, and the records they work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from llmkd.labels.preference import Annotation

# A plain prompt, or the messages of a chat ({"role": ..., "content": ...}), as in TRL.
Prompt: TypeAlias = str | list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt with its K >= 2 different responses (plain text), numbered by `row`."""

    row: int
    prompt: Prompt
    responses: tuple[str, ...]


@runtime_checkable
class Annotator(Protocol):
    """Compares responses. `name` stands in reports and files; `fingerprint` changes whenever the
    answers would (model, prompt template, file contents), so that a resumed run can tell.
    """

    name: str

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the answers."""
        ...

    def load(self, device: Any) -> None:
        """Take what memory it needs; called once before `annotate`, on each rank."""
        ...

    def annotate(self, items: Sequence[Item]) -> list[Annotation]:
        """One annotation an item, in order; AnnotatorError where it cannot."""
        ...

    def release(self) -> None:
        """Give the memory back."""
        ...
