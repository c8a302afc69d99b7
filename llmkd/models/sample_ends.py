"""Where a response ends: token ids as they were sampled, and the text made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One response. `ids` are exactly what the policy sampled to say it, with the END token or the
    tokens of a stop string where it is `finished`, and nothing after; log-probabilities are taken
    of them. `text` is what they say without END, stop string and special tokens.
    """

    ids: list[int]
    text: str
    finished: bool


class Ends:
    """What ends a response: one of `tokens`, or text that holds one of `strings`.

    The token that completes a stop string is the last one, even if its text goes on behind it.
    """

    def __init__(self, tokenizer: Any, tokens: Sequence[int], strings: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.tokens = frozenset(tokens)
        self.strings = tuple(strings)
        # a token holds at least one byte of text; some more, because a decoder may trim the start
        self.window = max((len(text.encode()) for text in self.strings), default=0) + 4

    def says_stop(self, ids: Sequence[int]) -> bool:
        """Whether the last tokens hold a stop string."""
        if not self.strings:
            return False
        tail = self._text(ids[-self.window :], special=True)
        return any(text in tail for text in self.strings)

    def cut(self, ids: Sequence[int], *, ended: bool = False) -> Sample:
        """A sample of raw ids, which may go on after the end. `ended` says that they are known to
        have stopped where they end.
        """
        found = [int(token) for token in ids]
        stop = next((n for n, token in enumerate(found, 1) if token in self.tokens), None)
        if stop is not None:
            found = found[:stop]
        by_text = self._by_text(found)
        if by_text is not None:
            found = found[:by_text]
        by_token = bool(found) and found[-1] in self.tokens
        text = self._text(found[:-1] if by_token else found, special=False)
        places = [place for one in self.strings if (place := text.find(one)) >= 0]
        text = text[: min(places)] if places else text
        return Sample(found, text, by_token or by_text is not None or ended)

    def _by_text(self, ids: list[int]) -> int | None:
        """Tokens up to and with the first stop string."""
        if not self.strings:
            return None
        return next((n for n in range(1, len(ids) + 1) if self.says_stop(ids[:n])), None)

    def _text(self, ids: Sequence[int], *, special: bool) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )


class StopAt:
    """A stopping criterion of `generate`: the same rule as `Ends.cut`, so that both agree."""

    def __init__(self, ends: Ends, prompt_length: int) -> None:
        self.ends, self.prompt_length = ends, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Boolean [B]: which rows have said a stop string. `input_ids` [B, T] with the prompt."""
        start = max(self.prompt_length, input_ids.shape[1] - self.ends.window)
        tails = input_ids[:, start:].tolist()
        found = [self.ends.says_stop(tail) for tail in tails]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


def stop_tokens(tokenizer: Any, *configs: Any) -> list[int]:
    """Ids that end a response, ascending: the tokenizer's END and those of generation configs."""
    found: set[Any] = set()
    for source in (tokenizer, *configs):
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, list | tuple) else {ids} - {None}
    return sorted(int(token) for token in found)


def plain_generation(own: Any) -> dict[str, Any]:
    """What a model's generation config says beyond its special tokens."""
    left_out = {"transformers_version", "_from_model_config", "use_cache"}
    left_out |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    said = own.to_diff_dict() if own is not None else {}
    return {k: v for k, v in said.items() if k not in left_out and v not in (None, False)}
