"""Recipe keys that say which prompts a policy answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmkd.errors import RecipeError

AS_CHAT = ("auto", "true", "false")
LONG = ("refuse", "drop")


@dataclass(kw_only=True)
class PromptConfig:
    """Prompts, as text or as the messages of a chat (TRL's prompt-only formats)."""

    prompt_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local file or folder (jsonl, json, parquet, csv; txt: a prompt a "
            "line). By default the beginnings of the paragraphs that explain the installed "
            "Python's standard library (no download)."
        },
    )
    prompt_dataset_name: str | None = field(
        default=None, metadata={"help": "Configuration (subset) name of a Hub dataset."}
    )
    prompt_split: str = field(default="train", metadata={"help": "Split to take prompts from."})
    prompt_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    prompt_column: str = field(
        default="prompt",
        metadata={
            "help": "Column that holds text or messages; turns.0.content reaches into lists and "
            "mappings."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message put before every prompt, but not before a chat that begins "
            "with one. Makes a chat of plain text."
        },
    )
    as_chat: str = field(
        default="auto",
        metadata={
            "help": "Whether plain text becomes a user's message: true, false, or auto: where the "
            "tokenizer has a chat template."
        },
    )
    max_prompt_length: int = field(
        default=512, metadata={"help": "Tokens of a prompt at most, chat template included."}
    )
    long_prompts: str = field(
        default="refuse", metadata={"help": "Longer prompts: refuse (an error), or drop (counted)."}
    )
    max_prompts: int | None = field(
        default=None, metadata={"help": "Keep this many training prompts, after the shuffle."}
    )
    held_out_prompts: int = field(
        default=64,
        metadata={"help": "Prompts kept back for win rate and KL; never trained on."},
    )
    held_out_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Take held-out prompts from here instead (same column); prompts that are in "
            "both are not trained on."
        },
    )
    held_out_split: str = field(default="train", metadata={"help": "Split of held_out_dataset."})
    prompt_words: int = field(
        default=8, metadata={"help": "Words of a prompt where prompt_dataset is not set."}
    )
    prompt_seed: int = field(
        default=0,
        metadata={"help": "Seed of the shuffle, the held-out split and the iterations' shares."},
    )

    def __post_init__(self) -> None:
        self.as_chat = str(self.as_chat).lower()  # YAML's true is no text
        for key, known in (("as_chat", AS_CHAT), ("long_prompts", LONG)):
            if getattr(self, key) not in known:
                raise RecipeError.of(key, getattr(self, key), f"use one of {', '.join(known)}")
        least: dict[str, Any] = {
            "max_prompt_length": 1,
            "max_prompts": 1,
            "prompt_words": 2,
            "held_out_prompts": 1 if self.held_out_dataset else 0,
        }
        for key, lowest in least.items():
            value = getattr(self, key)
            if value is not None and value < lowest:
                raise RecipeError.of(key, value, f"must be at least {lowest}")
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise RecipeError.of("system_prompt", self.system_prompt, "is empty", "leave it out")
        if self.system_prompt is not None and self.as_chat == "false":
            raise RecipeError.of(
                "system_prompt", self.system_prompt, "needs a chat, and as_chat is false"
            )

    @property
    def source(self) -> str:
        """One line that names where the prompts come from."""
        if self.prompt_dataset is None:
            return f"stdlib (first {self.prompt_words} words)"
        name = f"/{self.prompt_dataset_name}" if self.prompt_dataset_name else ""
        return f"{self.prompt_dataset}{name}"
