"""A preference file in TRL's formats to pairs with a preference logit, tokenized."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_extract_prompt

from llmkd.data.preference_config import PreferenceConfig
from llmkd.data.prompts import encode_prompt
from llmkd.data.sources import read_table
from llmkd.errors import DataError, LlmkdError
from llmkd.files import digest

__all__ = ["PairRows", "PreferenceConfig", "encode_response", "load_preferences"]
KEY = "preference_dataset"
SIDES = (("chosen", "rejected"), ("response_1", "response_2"))
REWARDS = tuple(
    (f"{name}_{one}", f"{name}_{two}")
    for name in ("reward", "score")
    for one, two in (("chosen", "rejected"), ("1", "2"))
)


@dataclass(frozen=True)
class PairRows:
    """Pairs as `IrepoTrainer` takes them, without references; `label` says what they came from.

    `held_out` is None where no pairs are kept back; `dropped` counts the pairs left out: `long`.
    """

    train: Dataset
    held_out: Dataset | None
    label: str
    dropped: dict[str, int]
    fingerprint: str


def load_preferences(
    config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase, *, window: int | None = None
) -> PairRows:
    """Read, check, tokenize and split the pairs a recipe names.

    `window`: tokens that prompt and response may have together. Raises MissingFileError for a path
    that leads nowhere, DataError, with row and column, for labels that are none, empty or equal
    responses, prompts that are missing, and rows longer than the window.
    """
    if config.preference_dataset is None:
        raise DataError.of(KEY, None, "names no file", "a Hub id, or a .jsonl or .parquet file")
    table = read_table(
        config.preference_dataset,
        config.preference_split,
        subset=config.preference_dataset_name,
        revision=config.preference_revision,
        key=KEY,
        split_key="preference_split",
    )
    columns = table.column_names or []
    sides = _sides(columns, config)
    label, column = _label(columns, sides, config)
    made, long = [], 0
    for number, row in enumerate(tqdm(table, desc="tokenizing pairs", delay=2)):
        pair = _Row(config, number, cast(Any, row), sides).pair(tokenizer)
        longest = len(pair["prompt_ids"]) + max(len(pair["ids_1"]), len(pair["ids_2"]))
        if window is not None and longest > window:
            long += 1
            if not config.drop_long_rows:
                raise _too_long(config, number, longest, window)
            continue
        logit, wins, votes = column(cast(Any, row), number)
        made.append({**pair, "pref_logit": logit, "wins": wins, "votes": votes})
    if not made:
        raise DataError.of(
            KEY, config.preference_dataset, f"no pair is left ({long} were longer than {window})"
        )
    train, held_out = _split(made, config)
    fingerprint = digest([digest(row) for row in made])
    kept_back = _dataset(held_out) if held_out else None
    return PairRows(_dataset(train), kept_back, label, {"long": long}, fingerprint)


def encode_response(
    prompt: Any, response: Any, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """A response's ids behind `prompt_ids`, its END token last: what the policy would have sampled.

    Messages go through the chat template, and what it writes behind the END token is cut off.
    """
    end = cast(int, tokenizer.eos_token_id)
    if isinstance(prompt, str):
        whole = cast(list[int], tokenizer(prompt + response, verbose=False)["input_ids"])
        if whole[: len(prompt_ids)] == prompt_ids:
            ids = whole[len(prompt_ids) :]
        else:  # tokens merge across the border; a policy never writes such a token
            options: Any = {"add_special_tokens": False, "verbose": False}
            ids = cast(list[int], tokenizer(response, **options)["input_ids"])
        return [*ids] if ids and ids[-1] == end else [*ids, end]
    made = cast(Any, tokenizer).apply_chat_template(
        [*prompt, *response], tokenize=True, return_dict=True
    )
    whole = list(made["input_ids"])
    shared = next(
        (at for at, pair in enumerate(zip(whole, prompt_ids, strict=False)) if pair[0] != pair[1]),
        min(len(whole), len(prompt_ids)),
    )
    if shared < len(prompt_ids):
        raise ValueError("its prompt is written differently once a response follows")
    ids = whole[shared:]
    last = max((at for at, token in enumerate(ids) if token == end), default=len(ids) - 1)
    return ids[: last + 1]


@dataclass
class _Row:
    """One row of the file."""

    config: PreferenceConfig
    number: int
    values: dict[str, Any]
    sides: tuple[str, str]

    def pair(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Prompt, texts and ids; DataError for what is none."""
        prompt, one, two = self._parts()
        texts, ids, prompt_ids = [], [], self._encoded("prompt", encode_prompt, prompt, tokenizer)
        for name, response in zip(self.sides, (one, two), strict=True):
            text = response if isinstance(response, str) else _text(response)
            if not text.strip():
                raise self.refuse(name, text, "the response is empty")
            texts.append(text)
            ids.append(
                self._encoded(name, encode_response, prompt, response, prompt_ids, tokenizer)
            )
        if ids[0] == ids[1]:
            raise self.refuse(" = ".join(self.sides), texts[0][:60], "both responses are the same")
        return {
            "row": self.number,
            "prompt": prompt,
            "response_1": texts[0],
            "response_2": texts[1],
            "prompt_ids": prompt_ids,
            "ids_1": ids[0],
            "ids_2": ids[1],
        }

    def _parts(self) -> tuple[Any, Any, Any]:
        values = [_plain(self.values[name]) for name in self.sides]
        if any(value is None for value in values) or type(values[0]) is not type(values[1]):
            kinds = " and ".join(type(value).__name__ for value in values)
            raise self.refuse(", ".join(self.sides), kinds, "both must be text, or both messages")
        example: dict[str, Any] = dict(zip(SIDES[0], values, strict=True))
        if self.values.get("prompt") is not None:
            example["prompt"] = _plain(self.values["prompt"])
        if "prompt" not in example and values[0] == values[1]:
            raise self.refuse(", ".join(self.sides), "...", "both responses are the same")
        found = maybe_extract_prompt(example)
        if not found["prompt"]:
            problem = "there is no prompt, and the responses do not begin alike"
            raise self.refuse("prompt", self.values.get("prompt"), problem)
        return found["prompt"], found["chosen"], found["rejected"]

    def _encoded(self, column: str, encode: Callable[..., list[int]], *args: Any) -> list[int]:
        try:
            ids = encode(*args)
        except Exception as error:  # chat templates raise what they like
            problem = f"cannot be tokenized: {str(error)[:200]}"
            raise self.refuse(column, str(self.values.get(column))[:60], problem) from error
        if not ids:
            raise self.refuse(column, self.values.get(column), "makes no tokens")
        return ids

    def refuse(self, column: str, value: Any, problem: str) -> LlmkdError:
        """A DataError that names the row."""
        return DataError.of(column, value, f"row {self.number}: {problem}")


def _plain(value: Any) -> Any:
    """Text as it is; messages with role and content alone (Arrow adds empty columns)."""
    if not isinstance(value, list):
        return value
    return [{"role": one["role"], "content": one["content"]} for one in value]


def _text(messages: list[dict[str, str]]) -> str:
    spoken = [one["content"] or "" for one in messages if one["role"] != "user"]
    return "\n".join(spoken)


def _sides(columns: list[str], config: PreferenceConfig) -> tuple[str, str]:
    found = [pair for pair in SIDES if set(pair) <= set(columns)]
    if len(found) != 1:
        problem = "two sets of responses" if found else "no pair of responses"
        raise DataError.of(
            KEY,
            config.preference_dataset,
            f"{problem}; its columns: {', '.join(sorted(columns))}",
            "chosen and rejected, or response_1 and response_2",
        )
    return found[0]


def _label(
    columns: list[str], sides: tuple[str, str], config: PreferenceConfig
) -> tuple[str, Callable[[dict[str, Any], int], tuple[float, float | None, float | None]]]:
    """The label's name and a function `(row, number) -> (logit, wins, votes)`."""
    have = set(columns)
    rewards = [pair for pair in REWARDS if set(pair) <= have]
    found = {
        "pref_logit": "pref_logit" in have,
        "probability": "probability" in have,
        "votes": {"wins", "votes"} <= have,
        "reward": bool(rewards),
    }
    named = [name for name, there in found.items() if there]
    label = config.preference_label
    if label == "auto" and len(named) > 1:
        raise DataError.of(
            KEY,
            config.preference_dataset,
            f"more than one label: {', '.join(named)}",
            *(f"--preference_label {name}" for name in named),
        )
    if label == "auto":
        label = named[0] if named else "hard"
    if not found.get(label, True) or (label == "reward" and len(rewards) > 1):
        problem = f"no such columns, or two sets of them; its columns: {', '.join(sorted(columns))}"
        raise DataError.of("preference_label", label, problem)
    if label == "hard" and sides != SIDES[0]:
        raise DataError.of(
            KEY,
            config.preference_dataset,
            "nothing says which of response_1 and response_2 is preferred",
            "add pref_logit, probability, or wins and votes",
        )
    return label, _Labels(label, rewards[0] if rewards else ("", ""), config)


@dataclass(frozen=True)
class _Labels:
    """Reads one kind of label; all speak for chosen, or response_1."""

    label: str
    rewards: tuple[str, str]
    config: PreferenceConfig

    def __call__(
        self, row: dict[str, Any], number: int
    ) -> tuple[float, float | None, float | None]:
        if self.label == "hard":
            return self._clipped(1.0), None, None
        if self.label == "votes":
            return self._votes(row, number)
        if self.label == "reward":
            gap = self._number(row, number, self.rewards[0])
            gap -= self._number(row, number, self.rewards[1])
            return gap / self.config.reward_temperature, None, None
        value = self._number(row, number, self.label)
        if self.label == "pref_logit":
            return value, None, None
        if not 0.0 <= value <= 1.0:
            raise DataError.of("probability", value, f"row {number}: must lie in [0, 1]")
        return self._clipped(value), None, None

    def _clipped(self, p: float) -> float:
        clip = self.config.hard_label_clip
        p = min(max(p, clip), 1.0 - clip)
        return math.log(p) - math.log1p(-p)

    def _votes(self, row: dict[str, Any], number: int) -> tuple[float, float, float]:
        wins, votes = (self._number(row, number, name) for name in ("wins", "votes"))
        if votes <= 0:
            raise DataError.of("votes", votes, f"row {number}: nobody voted")
        if not 0.0 <= wins <= votes:
            raise DataError.of("wins", wins, f"row {number}: must lie in [0, {votes:g}], the votes")
        return math.log((wins + 0.5) / (votes - wins + 0.5)), wins, votes  # Haldane's

    def _number(self, row: dict[str, Any], number: int, column: str) -> float:
        value = row[column]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError.of(column, value, f"row {number}: must be a number")
        if not math.isfinite(value):
            raise DataError.of(column, value, f"row {number}: must be finite")
        return float(value)


def _split(
    rows: list[dict[str, Any]], config: PreferenceConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shuffled; whole prompts are held out until there are enough pairs."""
    order = np.random.default_rng(config.preference_seed).permutation(len(rows)).tolist()
    groups: dict[str, list[dict[str, Any]]] = {}
    for at in order:
        groups.setdefault(json.dumps(rows[at]["prompt"], sort_keys=True), []).append(rows[at])
    held_out: list[dict[str, Any]] = []
    kept = dict(groups)
    for name, group in groups.items():
        if len(held_out) >= config.held_out_pairs:
            break
        held_out += group
        del kept[name]
    train = [rows[at] for at in order if json.dumps(rows[at]["prompt"], sort_keys=True) in kept]
    if not train:
        raise DataError.of(
            "held_out_pairs",
            config.held_out_pairs,
            f"leaves nothing to train on: {len(rows)} pairs of {len(groups)} prompts",
            "set it lower",
        )
    return train[: config.max_pairs], held_out


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    numbers = ("pref_logit", "wins", "votes")
    features: dict[str, Any] = {name: Value("float64") for name in numbers}
    features |= {name: Sequence(Value("int64")) for name in ("prompt_ids", "ids_1", "ids_2")}
    features |= {name: Value("string") for name in ("response_1", "response_2")}
    chat = [{"role": Value("string"), "content": Value("string")}]
    is_chat = bool(rows) and not isinstance(rows[0]["prompt"], str)
    features |= {"row": Value("int64"), "prompt": chat if is_chat else Value("string")}
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        raise DataError.of("prompt", "...", "some are text and some are messages")
    columns = {name: [row[name] for row in rows] for name in features}
    return Dataset.from_dict(columns, features=Features(features))


def _too_long(config: PreferenceConfig, row: int, longest: int, window: int) -> LlmkdError:
    return DataError.of(
        KEY,
        config.preference_dataset,
        f"row {row} has {longest} tokens; the window is {window}",
        "--drop_long_rows true leaves such pairs out and counts them",
        "a policy with a larger window, or a larger max_length",
    )
