"""Texts for a model that annotates: cut to its window, sorted by length, padded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from llmkd.annotators.checks import KEY
from llmkd.errors import AnnotatorError, RecipeError

Encoded = Mapping[str, Sequence[int]]  # input_ids, and token_type_ids where the model has them
Parts = Mapping[str, str]
MARK = " ... "
ROUNDS = 8  # cutting moves borders of tokens: a second round is rare, an eighth never seen


def window_of(config: Any, tokenizer: Any, given: int | None, name: str) -> int:
    """Tokens a model takes: `given` where that is less than what config and tokenizer allow.
    RecipeError for more.
    """
    text = config.get_text_config()
    known = [getattr(text, "max_position_embeddings", None), tokenizer.model_max_length]
    if known[0] and "roberta" in text.model_type:  # its positions begin behind the padding's
        known[0] -= (text.pad_token_id or 0) + 1
    limit = min((int(one) for one in known if one and one > 0), default=1 << 30)
    if given is None:
        return limit
    if not 0 < given <= limit:
        raise RecipeError.of("max_length", given, f"{name} takes 1 to {limit} tokens")
    return given


def fit(
    tokenizer: Any,
    parts: Parts,
    order: Sequence[Sequence[str]],
    encode: Callable[[Parts], Encoded],
    window: int,
    *,
    left: Sequence[str] = (),
) -> tuple[Encoded | None, bool]:
    """`encode(parts)` in at most `window` tokens, and whether anything had to be cut.

    Too long, the parts of the first group in `order` are cut, each by its share of the group's
    tokens, down to nothing; then the next group's. Those in `left` lose their beginning, others
    their middle. None where the rest alone is too long.
    """
    encoded = encode(parts)
    if len(encoded["input_ids"]) <= window:
        return encoded, False
    parts = dict(parts)
    for group in order:
        for number in range(ROUNDS):
            over = len(encoded["input_ids"]) - window
            sizes = {name: len(_ids(tokenizer, parts[name])) for name in group}
            total = sum(sizes.values())
            if over <= 0 or total == 0:
                break
            for name, size in sizes.items():
                drop = math.ceil(over * size / total) + number
                cut = cut_left if name in left else cut_middle
                parts[name] = cut(tokenizer, parts[name], drop) if number < ROUNDS - 1 else ""
            encoded = encode(parts)
    return (encoded if len(encoded["input_ids"]) <= window else None), True


def cut_left(tokenizer: Any, text: str, drop: int) -> str:
    """The text without its first `drop` tokens."""
    return _decode(tokenizer, _ids(tokenizer, text)[drop:])


def cut_middle(tokenizer: Any, text: str, drop: int) -> str:
    """The text without at least `drop` tokens of its middle, and a mark where they were."""
    ids = _ids(tokenizer, text)
    keep = len(ids) - drop - len(_ids(tokenizer, MARK))
    if keep < 2:
        return ""
    head = keep - keep // 2
    return _decode(tokenizer, ids[:head]) + MARK + _decode(tokenizer, ids[len(ids) - keep // 2 :])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # A cut through the bytes of one character leaves halves of it.
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip("\ufffd")


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of rows in batches of at most `size`, the longest first, so that no later batch needs
    more memory; none less than half as long as the longest of its batch, which would be padding.
    """
    batch: list[int] = []
    for place in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        if batch and (len(batch) == size or 2 * lengths[place] < lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def padded(rows: Sequence[Encoded], *, pad: int, side: str, device: Any) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and what else the rows hold, int64 [B, longest], on `device`.
    `side` is where the padding goes, left or right.
    """
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    longest = max(len(row["input_ids"]) for row in rows)
    made: dict[str, torch.Tensor] = {}
    for key in rows[0]:
        filler = pad if key == "input_ids" else 0
        table = torch.full((len(rows), longest), filler, dtype=torch.int64)
        for place, row in enumerate(rows):
            start = longest - len(row[key]) if side == "left" else 0
            table[place, start : start + len(row[key])] = torch.tensor(row[key])
        made[key] = table.to(device)
    return made


def require_finite(values: np.ndarray, name: str, rows: Sequence[int]) -> None:
    """AnnotatorError naming the first row for which a model gave NaN or infinity."""
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if bad.any():
        raise AnnotatorError.of(
            KEY,
            name,
            f"row {rows[int(bad.argmax())]}: the model gave NaN or infinity",
            "dtype: float32 (half precision may overflow)",
            "its weights may be damaged: download them again",
        )
