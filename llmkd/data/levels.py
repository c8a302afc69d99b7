"""The words a scorer answers with, as tokens: looked up, checked, and another set where they fail.

A word serves if it becomes one token right after the answer's beginning. Which form that takes is
the tokenizer's affair: mostly the blank is part of the word's token; where digits stand alone
(Llama 2 and 3, SmolLM) it is a token of its own and then belongs to the prefix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkd.data.config import from_json
from llmkd.errors import DataError, RecipeError

QUALITY = ("excellent", "good", "fair", "poor", "bad")
QUESTIONS = (
    "How would you rate the quality of this text?",
    "What do you think about the quality of this text?",
    "Can you rate the quality of this text?",
    "How good is this text?",
    "Please evaluate the quality of this text.",
    "Rate the quality of the text.",
    "Could you assess the quality of this text?",
    "What is your opinion on the quality of this text?",
    "How do you judge the quality of the text?",
    "What is your quality rating for this text?",
)


@dataclass(frozen=True, slots=True)
class Levels:
    """Level words in the order given, what each counts, and its token after `prefix`.

    The ids of an answer are those of `prefix`, then one of `ids_L`. `prefix` ends with a blank only
    where this tokenizer keeps the blank apart from all these words.
    """

    words: tuple[str, ...]
    values_L: tuple[float, ...]
    ids_L: tuple[int, ...]
    prefix: str

    def __len__(self) -> int:
        return len(self.words)


def find_levels(
    tokenizer: Any,
    words: Sequence[str],
    values: Sequence[float],
    prefix: str,
    *,
    key: str = "levels",
) -> Levels:
    """The tokens of `words` after `prefix`, a blank between them, none after a line break.

    RecipeError for words and values that are no levels. DataError, with the word, its pieces and a
    set that works for this tokenizer, where a word is not one token of its own.
    """
    words, values = check_levels(words, values, key=key)
    found = _fit(tokenizer, words, prefix)
    if isinstance(found, _Fit):
        return Levels(words, values, found.ids_L, found.prefix)
    word, problem = found
    raise DataError.of(key, word, problem, *_ways(tokenizer, words, values, prefix))


def check_levels(
    words: Any, values: Any, *, key: str = "levels"
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Words and values as tuples; RecipeError unless there are at least two different bare words
    and as many finite values, all ascending or all descending.
    """
    if isinstance(words, str) or not all(isinstance(word, str | int) for word in words):
        raise RecipeError.of(key, words, "must be a list of words", '["good", "fair", "bad"]')
    words = tuple(str(word) for word in words)
    for word in words:
        if not word or word != word.strip():
            problem = "a level word is not empty and has no blanks around it"
            raise RecipeError.of(key, word, problem, "the blank before it is set by llmkd")
    if len(words) < 2 or len(set(words)) < len(words):
        raise RecipeError.of(key, list(words), "needs at least two words, all different")
    try:
        values = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise RecipeError.of(key, values, "values must be a list of numbers") from None
    if len(values) != len(words):
        problem = f"{len(words)} words need as many values, not {len(values)}"
        raise RecipeError.of(f"{key}, values", values, problem, "one value for each word")
    steps = [after - before for before, after in itertools.pairwise(values)]
    one_way = all(step > 0 for step in steps) or all(step < 0 for step in steps)
    if not one_way or not all(map(math.isfinite, values)):
        problem = "values must be finite and ascend, or descend, all the way"
        raise RecipeError.of(key, values, problem, "sort words and values together")
    return words, values


@dataclass(frozen=True, slots=True)
class _Fit:
    ids_L: tuple[int, ...]
    prefix: str


def _fit(tokenizer: Any, words: Sequence[str], prefix: str) -> _Fit | tuple[str, str]:
    """Tokens of the words; or the first word that breaks, and how."""
    bare = prefix.rstrip(" ")
    glued = not bare or bare[-1].isspace()  # the words stand at the beginning of a line
    kept = _under(tokenizer, words, bare, "" if glued else " ")
    if glued or (isinstance(kept, _Fit) and prefix == bare):
        return kept
    apart = _under(tokenizer, words, f"{bare} ", "")
    if isinstance(apart, _Fit):
        return apart
    if isinstance(kept, _Fit):  # only the blank is in the way
        problem = "ends with a blank, which this tokenizer makes part of the level word"
        return prefix, f"{problem}: take it away"
    return kept


def _under(tokenizer: Any, words: Sequence[str], prefix: str, blank: str) -> _Fit | tuple[str, str]:
    start, seen = _ids(tokenizer, prefix), {}
    for word in words:
        ids = _ids(tokenizer, prefix + blank + word)
        rest = ids[len(start) :]
        if ids[: len(start)] != start or not rest:
            return word, f"changes the tokens of {prefix!r} before it"
        if len(rest) > 1:
            pieces = " + ".join(repr(tokenizer.decode([one])) for one in rest)
            return word, f"is not one token after {prefix!r} but {len(rest)}: {pieces}"
        if rest[0] == getattr(tokenizer, "unk_token_id", None):
            return word, "is unknown to this tokenizer"
        if rest[0] in seen:
            return word, f"is the same token as {seen[rest[0]]!r}"
        seen[rest[0]] = word
    return _Fit(tuple(seen), prefix)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _ways(
    tokenizer: Any, words: tuple[str, ...], values: tuple[float, ...], prefix: str
) -> list[str]:
    """What to answer with instead: the first set that this tokenizer has as single tokens."""
    count, descending = len(words), values[0] > values[-1]
    sets: list[tuple[str, ...]] = [QUALITY] if count == len(QUALITY) else []
    if count <= 9:
        sets.append(tuple(str(count - place) for place in range(count)))
    if count <= 26:
        sets.append(tuple(chr(ord("A") + place) for place in range(count)))
    for some in sets:
        for start in dict.fromkeys((prefix, prefix.rstrip(" "))):
            if isinstance(_fit(tokenizer, some, start), _Fit) and (some, start) != (words, prefix):
                said = ", ".join(f'"{word}"' for word in (some if descending else some[::-1]))
                ending = "" if start == prefix else f" and answer_prefix: {start!r}"
                return [f"these work with this tokenizer: level_words: [{said}]{ending}"]
    return ["no set known here works with this tokenizer: look into its vocabulary for words"]


@dataclass(kw_only=True)
class LevelConfig:
    """Levels, and how the model is asked and answers."""

    level_words: list[Any] | str | None = field(
        default_factory=lambda: [*QUALITY],
        metadata={
            "help": "JSON list of level words, best or worst first, each one token of the model's "
            "tokenizer; digits and letters are allowed."
        },
    )
    level_values: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON list of what each level counts, ascending or descending. By default the "
            "number of levels down to 1."
        },
    )
    answer_prefix: str = field(
        default="The quality of the text is",
        metadata={"help": "Beginning of the answer, right before the level word; no blank at end."},
    )
    answer_suffix: str = field(default=".", metadata={"help": "What follows the level word."})
    questions: list[Any] | str | None = field(
        default_factory=lambda: [*QUESTIONS],
        metadata={
            "help": "JSON list of questions of one meaning: each training row is asked with one of "
            "them, everything else with the first. {text} in a question is where the text stands."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message before the question, in a chat template."}
    )

    def __post_init__(self) -> None:
        words = from_json("level_words", self.level_words)
        words = [*QUALITY] if words is None else words
        values = from_json("level_values", self.level_values)
        if not isinstance(words, list | tuple):
            raise RecipeError.of("level_words", words, "must be a list", '["good", "bad"]')
        if values is None:
            values = [float(len(words) - place) for place in range(len(words))]
        words, values = check_levels(words, values, key="level_words")
        self.level_words, self.level_values = [*words], [*values]
        asked = from_json("questions", self.questions)
        asked = [*QUESTIONS] if asked is None else asked
        if not isinstance(asked, list | tuple) or not asked:
            raise RecipeError.of("questions", asked, "must be a list of at least one question")
        if not all(isinstance(one, str) and one.strip() for one in asked):
            raise RecipeError.of("questions", asked, "each must be a text that is not empty")
        self.questions = [*asked]
        if self.answer_prefix != self.answer_prefix.rstrip(" "):
            raise RecipeError.of(
                "answer_prefix",
                self.answer_prefix,
                "ends with a blank: most tokenizers make it part of the level word",
                "take it away; it is set where the tokenizer keeps it apart",
            )

    def find(self, tokenizer: Any) -> Levels:
        """The levels as tokens of the model's tokenizer; see `find_levels`."""
        words, values = check_levels(self.level_words, self.level_values, key="level_words")
        return find_levels(tokenizer, words, values, self.answer_prefix, key="level_words")
