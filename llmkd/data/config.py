"""Recipe keys that say which text is trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from llmkd.errors import RecipeError

STDLIB = "stdlib"
# trl's third strategy, "wrapped", attends across documents and is left out on purpose.
MIXTURE_KEYS = {"id", "weight", "config", "revision", "split", "text_column"}
PACKING_STRATEGIES = ("bfd_split", "bfd")


def from_json(key: str, value: Any) -> Any:
    """A list or mapping as YAML gave it, or parsed from what a command line gave: JSON, or the same
    without quotes ({a: {b: 1}}).
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        try:
            found = yaml.safe_load(value)
        except yaml.YAMLError:
            found = None
        if isinstance(found, list | dict):
            return found
        ways = ('["good", "bad"] is a list, {"key": "value"} a mapping',)
        raise RecipeError.of(key, value, f"is not JSON: {error}", *ways) from error


@dataclass(kw_only=True)
class DataConfig:
    """Text, tokenizer and packing."""

    dataset: str = field(
        default=STDLIB,
        metadata={
            "help": "Hub id, local file or folder (jsonl, json, parquet, txt, csv, each also "
            ".gz), or "
            "'stdlib': the source text of the installed Python's standard library (no download)."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration (subset) name of a Hub dataset."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split held out for evaluation; by default `eval_fraction` is split off."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Local file or folder, or Hub id, held out for evaluation."},
    )
    eval_fraction: float = field(
        default=0.05,
        metadata={"help": "Share of documents held out where no split is named; in (0, 0.5]."},
    )
    max_eval_rows: int | None = field(
        default=None,
        metadata={"help": "Keep this many packed held-out rows (of max_length tokens)."},
    )
    max_train_documents: int | None = field(
        default=None, metadata={"help": "Keep this many training documents, after the shuffle."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    dataset_mixture: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several datasets instead of `dataset`: a list of mappings with id, weight and "
            "optionally config, revision, split, text_column. Weights are shares of documents."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training data as a stream; needs max_steps."},
    )
    max_length: int = field(default=256, metadata={"help": "Tokens in a row."})
    packing: bool = field(
        default=True,
        metadata={
            "help": "Fill rows with several documents; none attends to another or predicts across."
        },
    )
    packing_strategy: str = field(
        default="bfd_split",
        metadata={
            "help": "bfd_split keeps every token of long documents, bfd cuts them at max_length "
            "(as in trl.pack_dataset)."
        },
    )
    truncate: bool = field(
        default=False,
        metadata={"help": "Without packing: cut rows longer than max_length instead of refusing."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Tokenizer; by default the model's, or a new one for a new model."},
    )
    tokenizer_vocab_size: int = field(
        default=4096,
        metadata={"help": "Entries of the byte-level BPE trained when no tokenizer is named."},
    )
    split_seed: int = field(
        default=0, metadata={"help": "Seed of the document shuffle and the held-out split."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.eval_fraction <= 0.5:
            raise RecipeError.of(
                "eval_fraction", self.eval_fraction, "must lie in (0, 0.5]", "0.05 is usual"
            )
        if self.max_length < 2:
            raise RecipeError.of("max_length", self.max_length, "a row needs at least 2 tokens")
        if self.packing_strategy not in PACKING_STRATEGIES:
            raise RecipeError.of(
                "packing_strategy",
                self.packing_strategy,
                "unknown",
                f"known: {', '.join(PACKING_STRATEGIES)}",
            )
        self.dataset_mixture = from_json("dataset_mixture", self.dataset_mixture)
        self._check_mixture()
        for key, least in (("max_eval_rows", 1), ("max_train_documents", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise RecipeError.of(key, value, f"must be at least {least}")

    def _check_mixture(self) -> None:
        if not isinstance(self.dataset_mixture, list | None):
            raise RecipeError.of("dataset_mixture", self.dataset_mixture, "must be a list")
        for part in self.mixture:
            weight = part.get("weight") if isinstance(part, dict) else None
            if not isinstance(weight, int | float) or weight <= 0 or "id" not in part:
                raise RecipeError.of(
                    "dataset_mixture", part, "each part needs `id` and a `weight` above 0"
                )
            unknown = sorted(set(part) - MIXTURE_KEYS)
            if unknown:
                raise RecipeError.of(
                    f"dataset_mixture.{unknown[0]}",
                    part[unknown[0]],
                    "no such key",
                    f"known: {', '.join(sorted(MIXTURE_KEYS))}",
                )

    @property
    def mixture(self) -> list[dict[str, Any]]:
        """The parts of `dataset_mixture`; empty for a single dataset."""
        return list(self.dataset_mixture or [])  # type: ignore[arg-type]

    @property
    def source(self) -> str:
        """One line that names where the text comes from."""
        if self.mixture:
            return " + ".join(f"{part['weight']:g} of {part['id']}" for part in self.mixture)
        return self.dataset if not self.dataset_config else f"{self.dataset}/{self.dataset_config}"
