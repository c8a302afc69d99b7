"""The five ways to write down a teacher's answer, by name.

| name | stored for a token | unbiased | serves every temperature |
|---|---|---|---|
| `topk` | the k likeliest ids, their log-probabilities, the rest's mass | no | no |
| `sampled` | the ids of N draws and their counts | yes | no |
| `hidden` | the final hidden state; the head once for the store | exact to rounding | yes |
| `lowrank` | r coefficients of it; a narrower head once for the store | no | yes |
| `dense` | every logit (or, of a sequence classifier, once for the row) | exact | yes |
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeAlias

from llmkd.errors import RecipeError
from llmkd.labels.dense import Dense, DenseDtype, Per
from llmkd.labels.hidden import Hidden, HiddenDtype, LowRank
from llmkd.labels.sampled import Sampled, Sampling
from llmkd.labels.topk import TopK
from llmkd.types import Tail

AnyEncoding: TypeAlias = TopK | Sampled | Hidden | LowRank | Dense
ENCODINGS: dict[str, type[AnyEncoding]] = {
    "topk": TopK,
    "sampled": Sampled,
    "hidden": Hidden,
    "lowrank": LowRank,
    "dense": Dense,
}
# What the unlisted mass means unless the reader says otherwise: with draws nothing is unlisted.
DEFAULT_TAIL: dict[str, Tail | None] = {
    "topk": "bucket",
    "sampled": "renorm",
    "hidden": None,
    "lowrank": None,
    "dense": None,
}


def make_encoding(
    name: str,
    *,
    shared: int,
    temperature: float = 1.0,
    seed: int = 0,
    width: int | None = None,
    k: int = 50,
    value_bits: int = 16,
    draws: int = 50,
    sampling: Sampling = "systematic",
    dtype: HiddenDtype | DenseDtype | None = None,
    rank: int = 64,
    per: Per = "token",
) -> AnyEncoding:
    """The encoding `name` with those settings it has; `width` is H, needed by `hidden`.

    `dtype` None is int8 for `hidden` and `lowrank`, float32 for `dense`. A `lowrank` made here can
    decode; to encode take `LowRankFit.codec`. Raises RecipeError for an unknown name and for
    settings out of range, naming the recipe's key (label_k, ...).
    """
    if name == "topk":
        return TopK(k, shared, temperature, value_bits)
    if name == "sampled":
        return Sampled(draws, shared, temperature, sampling, seed)
    if name == "hidden":
        if width is None:
            raise ValueError("hidden labels need the teacher's hidden size")
        return Hidden(width, shared, dtype or "int8")  # pyright: ignore[reportArgumentType]
    if name == "lowrank":
        return LowRank(rank, shared, dtype or "int8")  # pyright: ignore[reportArgumentType]
    if name == "dense":
        return Dense(shared, dtype or "float32", per)  # pyright: ignore[reportArgumentType]
    near = difflib.get_close_matches(name, ENCODINGS, n=1)
    hint = [f"did you mean {near[0]!r}?"] if near else []
    raise RecipeError.of("label_encoding", name, f"known: {', '.join(ENCODINGS)}", *hint)


def encoding_from(
    settings: Mapping[str, Any], *, shared: int, temperature: float | None, seed: int
) -> AnyEncoding:
    """The encoding a manifest describes: `encoding.settings()` and what the store states beside."""
    return make_encoding(
        **settings,
        shared=shared,
        temperature=1.0 if temperature is None else temperature,
        seed=seed,
    )
