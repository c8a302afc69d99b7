"""From what a recipe names to prompts: checked, each once, tokenized, and shared out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from llmkd.data.prompt_config import PromptConfig
from llmkd.data.prompt_source import Prompt, given_prompts, stdlib_prompts
from llmkd.data.task import same_text
from llmkd.errors import DataError, LlmkdError
from llmkd.files import digest

__all__ = ["Prompt", "PromptConfig", "PromptRows", "encode_prompt", "load_prompts", "slices"]
Row = dict[str, Any]  # row, prompt, prompt_ids


@dataclass(frozen=True)
class PromptRows:
    """Prompts to train on and held-out ones, in a shuffled order that the seed decides.

    Rows are `row` (its number in the source it came from), `prompt` (text or messages) and
    `prompt_ids`. `dropped` counts `duplicate`, `long` and `held_out` (in the held-out dataset too).
    """

    train: list[Row]
    held_out: list[Row]
    fingerprint: str
    dropped: dict[str, int]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max((len(row["prompt_ids"]) for row in (*self.train, *self.held_out)), default=0)


def load_prompts(
    config: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
    *,
    window: int | None = None,
) -> PromptRows:
    """Read, check, split and tokenize the prompts a recipe names.

    Prompts that differ in case and white space only are one, before anything is split. `window`
    are the tokens there is room for beside a response; a longer prompt is dealt with like one above
    max_prompt_length. Raises MissingFileError for a path that leads nowhere, DataError for a
    missing column, a prompt that is none, empty or too long (with its row), and too few prompts.
    """
    chat = _as_chat(config, tokenizer)
    made = stdlib_prompts(config.prompt_words) if config.prompt_dataset is None else None
    found = made if made is not None else given_prompts(config, "prompt_dataset")
    prompts = _once([_finished(prompt, config, chat) for prompt in found])
    dropped = {"duplicate": len(found) - len(prompts), "long": 0, "held_out": 0}
    take = _Taker(config, tokenizer, window, dropped)
    if config.held_out_dataset is not None:
        others = [
            _finished(prompt, config, chat) for prompt in given_prompts(config, "held_out_dataset")
        ]
        held_out = take(_shuffled(_once(others), config), config.held_out_prompts)
        known = {_same(row["prompt"]) for row in held_out}
        left = [one for one in prompts if _same(one[1]) not in known]
        dropped["held_out"] = len(prompts) - len(left)
        order = iter(_shuffled(left, config))
    else:
        order = iter(_shuffled(prompts, config))
        held_out = take(order, config.held_out_prompts)
    train = take(order, config.max_prompts)
    if not train or (len(held_out) < config.held_out_prompts and not config.held_out_dataset):
        raise _too_few(config, len(held_out) + len(train), dropped)
    lost = ", ".join(f"{count} {name}" for name, count in dropped.items() if count)
    say(
        f"prompts: {len(train)} to train on and {len(held_out)} held out, from {config.source}"
        + (f" (dropped: {lost})" if lost else "")
    )
    return PromptRows(train, held_out, digest([train, held_out]), dropped)


def slices(
    rows: Sequence[Row], iterations: int, per_iteration: int | None, seed: int
) -> list[list[Row]]:
    """Disjoint shares of the rows, one an iteration, in an order that `seed` decides.

    With `per_iteration` the first shares stay the same when more iterations follow; None shares all
    rows out, sizes differing by one at most. DataError where there are too few rows.
    """
    needed = iterations * (per_iteration or 1)
    if iterations < 1 or needed < 1:
        raise ValueError(f"{iterations} iterations of {per_iteration} prompts")
    if len(rows) < needed:
        raise DataError.of(
            "iterations" if per_iteration is None else "prompts_per_iteration",
            iterations if per_iteration is None else per_iteration,
            f"{iterations} iterations need {needed} prompts; there are {len(rows)}",
            f"--prompts_per_iteration {len(rows) // iterations}"
            if len(rows) >= iterations
            else f"--iterations {max(len(rows), 1)}",
            "more prompts: another prompt_dataset, a larger max_prompts, or fewer held out",
        )
    order = list(rows)
    random.Random(seed).shuffle(order)
    if per_iteration is not None:
        return [order[t * per_iteration : (t + 1) * per_iteration] for t in range(iterations)]
    return [order[t::iterations] for t in range(iterations)]


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids: messages through the chat template with its generation prompt, text as it is.

    A tokenizer that ends texts with its END token does not end a prompt.
    """
    if not isinstance(prompt, str):
        made = cast(Any, tokenizer).apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(made["input_ids"])
    ids = list(cast(list[int], tokenizer(prompt, verbose=False)["input_ids"]))
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


class _Taker:
    """Takes prompts off an iterator and tokenizes them, as many as are wanted."""

    def __init__(
        self,
        config: PromptConfig,
        tokenizer: PreTrainedTokenizerBase,
        window: int | None,
        dropped: dict[str, int],
    ) -> None:
        self.config, self.tokenizer, self.dropped = config, tokenizer, dropped
        most = config.max_prompt_length
        self.limit = most if window is None else min(most, window)

    def __call__(self, prompts: Iterator[Any] | list[Any], wanted: int | None) -> list[Row]:
        rows: list[Row] = []
        source = iter(prompts)
        # only a bar that is hidden says so: `disable=False` would overrule TQDM_DISABLE
        hidden: Any = {} if PartialState().is_main_process else {"disable": True}
        with tqdm(desc="tokenizing prompts", delay=2, **hidden) as bar:
            while wanted is None or len(rows) < wanted:
                one = next(source, None)
                if one is None:
                    break
                row, prompt = one
                ids = self._ids(row, prompt)
                if len(ids) > self.limit:
                    self._long(row, len(ids))
                    continue
                rows.append({"row": row, "prompt": prompt, "prompt_ids": ids})
                bar.update(1)
        return rows

    def _ids(self, row: int, prompt: Prompt) -> list[int]:
        try:
            ids = encode_prompt(prompt, self.tokenizer)
        except Exception as error:  # templates raise what they like
            raise DataError.of(
                "prompt_dataset",
                self.config.source,
                f"row {row}: the chat template refuses the prompt: {str(error)[:200]}",
                "some templates know no system message: leave system_prompt out",
                "most want user and assistant in turns",
            ) from error
        if not ids:
            raise DataError.of(
                "prompt_dataset", self.config.source, f"row {row}: the prompt makes no tokens"
            )
        return ids

    def _long(self, row: int, count: int) -> None:
        self.dropped["long"] += 1
        if self.config.long_prompts == "refuse":
            raise DataError.of(
                "max_prompt_length",
                self.config.max_prompt_length,
                f"the prompt of row {row} has {count} tokens; there is room for {self.limit}",
                "--long_prompts drop leaves such prompts out and counts them",
                f"--max_prompt_length {count}, if the policy's window holds it and a response",
            )


def _as_chat(config: PromptConfig, tokenizer: Any) -> bool:
    """Whether plain text becomes a message. DataError where a chat is wanted without a template."""
    template = getattr(tokenizer, "chat_template", None) is not None
    key = "system_prompt" if config.system_prompt is not None else "as_chat"
    if not template and (config.as_chat == "true" or config.system_prompt is not None):
        raise _no_template(key, getattr(config, key))
    return config.system_prompt is not None or (template and config.as_chat != "false")


def _no_template(key: str, value: Any) -> LlmkdError:
    return DataError.of(
        key,
        value,
        "the policy's tokenizer has no chat template",
        "plain text prompts need none: --as_chat false, and no system_prompt",
        "name an instruct model",
    )


def _finished(one: tuple[int, Prompt], config: PromptConfig, chat: bool) -> tuple[int, Prompt]:
    """A prompt as it is asked: with its system message, as a chat where it shall be one."""
    row, prompt = one
    if isinstance(prompt, str):
        if not chat:
            return row, prompt
        prompt = [{"role": "user", "content": prompt}]
    if config.system_prompt is not None and prompt[0]["role"] not in ("system", "developer"):
        prompt = [{"role": "system", "content": config.system_prompt}, *prompt]
    return row, prompt


def _once(prompts: list[tuple[int, Prompt]]) -> list[tuple[int, Prompt]]:
    """The first of each prompt, in order."""
    firsts: dict[str, tuple[int, Prompt]] = {}
    for one in prompts:
        firsts.setdefault(_same(one[1]), one)
    return list(firsts.values())


def _same(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return same_text(prompt)
    return digest([[message["role"], same_text(message["content"])] for message in prompt])


def _shuffled(prompts: list[Any], config: PromptConfig) -> list[Any]:
    order = list(prompts)
    random.Random(config.prompt_seed).shuffle(order)
    return order


def _too_few(config: PromptConfig, count: int, dropped: dict[str, int]) -> LlmkdError:
    lost = ", ".join(f"{number} {name}" for name, number in dropped.items())
    return DataError.of(
        "held_out_prompts",
        config.held_out_prompts,
        f"{config.source} has {count} prompts that can be used (dropped: {lost}); that leaves none "
        "to train on",
        "hold fewer back",
        "more prompts: another prompt_dataset",
    )
