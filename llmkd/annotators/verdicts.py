"""What a judge's answer says: a letter or a level, out of its text or its log-probabilities.

`top` is the `logprobs.content` of an OpenAI-compatible answer: a list of tokens, each with its
`token`, `logprob` (nats) and `top_logprobs`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmkd.annotators.templates import LETTERS, level_score

# Share of the first token's probability that must lie on letters (levels) before it is believed
# where the text itself says nothing: the article "A" is a letter too.
LEAST_MASS = 0.1
FIRST, TIE, SECOND = 1.0, 0.5, 0.0  # wins of A in one vote

_THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
_BRACKETS = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?i:answer|verdict|choice|winner|judge?ment)\b[\s*_]*(?:(?i:is)|:|=)[\s:*_\"'(\[]*"
    r"(?:(?i:response|option|assistant)\s+)?([AB]\b|[ab]\b(?!\s+\w)|(?i:tie)\b)"
)
_BETTER = re.compile(
    r"\b([AB])\b\W*\s(?:is|was)\s+"
    r"(?:(?:much|slightly|clearly|the)\s+)*(?:better|best|preferred|superior|winner)\b"
)
_START = re.compile(
    r"^\W*(?i:response|answer|option|assistant)\W+([AB])\W*$|^\W*([AB])\W*(?:[.,:;)\]\n-]|$)"
)
_TIES = {"tie", "tied", "equal", "both", "neither", "a tie", "it's a tie", "draw"}
_EDGES = " \t\r\n.,:;!()[]{}*_`\"'#<>"


def read_letter(text: str) -> float | None:
    """Wins of A that the text says: 1 for A, 0 for B, ½ for a tie; None where it says nothing.

    Understood: the bare letter, with marks around it or a remark after it, `[[A]]`, `Answer: A`,
    `Response A is better`, and a tie in so many words. The last `[[...]]` counts, then the last
    `answer: ...`; what stands in <think> is not read.
    """
    text = _THOUGHT.sub("", text).strip()
    bare = text.strip(_EDGES)
    if bare.lower() in _TIES:
        return TIE
    if bare in ("a", "b"):
        return _wins(bare)
    for pattern in (_BRACKETS, _NAMED):
        if found := pattern.findall(text):
            return _wins(found[-1])
    if found := _START.match(text):
        return _wins(found[1] or found[2])
    said = set(_BETTER.findall(text))
    return _wins(said.pop()) if len(said) == 1 else None


def _wins(word: str) -> float:
    return {"a": FIRST, "b": SECOND}.get(word.lower(), TIE)


def letter_logit(top: Sequence[Mapping[str, Any]] | None, text: str) -> float | None:
    """logit that A is preferred, log P("A") - log P("B") in nats; None where no token tells.

    Read where the text's letter stands, so "Answer: A" is read at its last token; at the first
    token where the text says nothing, if the two letters have LEAST_MASS there. A letter that is
    not among the tokens the server lists has at most the probability of the least of them, and is
    given that: the logit is then a bound towards 0.
    """
    if not top:
        return None
    said = read_letter(text)
    wanted = {FIRST: "A", SECOND: "B"}.get(said) if said is not None else None
    if said is not None and wanted is None:  # a tie in words has no token of its own
        return None
    places = [at for at in top if wanted and _bare(at.get("token")) == wanted]
    listed = _listed(places[-1] if places else top[0])
    sums = [_sum(lp for token, lp in listed if _bare(token) == letter) for letter in LETTERS]
    if all(total == -math.inf for total in sums):
        return None
    if not places and math.exp(sums[0]) + math.exp(sums[1]) < LEAST_MASS:
        return None
    least = min(lp for _, lp in listed)
    a, b = (max(total, least) if total == -math.inf else total for total in sums)
    return a - b


def read_level(text: str, levels: Mapping[str, float]) -> float | None:
    """Value of the level a text names; None where it names none, or several. `levels` are in
    lower case.
    """
    text = _THOUGHT.sub("", text).strip().lower()
    bare = text.strip(_EDGES)
    if bare in levels:
        return levels[bare]
    words = "|".join(re.escape(word) for word in sorted(levels, key=len, reverse=True))
    for pattern in (
        rf"\[\[\s*({words})\s*\]\]",
        rf"\b(?:answer|rating|score|grade|level)\b[\s*_]*(?:is|:|=)[\s:*_\"'(\[]*({words})\b",
        rf"^\W*({words})(?:\s*/|\W*(?:[.,:;)\n-]|$))",
    ):
        if found := re.findall(pattern, text):
            return levels[found[-1]]
    return None


def level_from_logprobs(
    top: Sequence[Mapping[str, Any]] | None, levels: Mapping[str, float]
) -> tuple[float, float] | None:
    """Mean and variance of the score from the first token, closed over the levels it lists; None
    where no level begins with any of them, or they have less than LEAST_MASS together.

    A token counts for the level it begins (" exc" for excellent) where that is just one.
    """
    if not top:
        return None
    sums: dict[str, list[float]] = {word: [] for word in levels}
    for token, log_prob in _listed(top[0]):
        bare = _bare(token).lower()
        meant = [word for word in levels if bare and word.startswith(bare)]
        meant = [bare] if bare in levels else meant
        if len(meant) == 1:
            sums[meant[0]].append(log_prob)
    totals_L = np.array([_sum(found) for found in sums.values()])
    if np.exp(totals_L).sum() < LEAST_MASS:
        return None
    return level_score(totals_L, np.array(list(levels.values())))


def _listed(at: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Tokens and log-probabilities the server lists at one place; the chosen one among them."""
    found = {
        str(one["token"]): float(one["logprob"])
        for one in [*(at.get("top_logprobs") or []), at]
        if _number(one.get("logprob")) and one.get("token") is not None
    }
    return list(found.items()) or [("", -math.inf)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _bare(token: Any) -> str:
    return str(token or "").strip(_EDGES + "▁Ġ")


def _sum(log_probs: Any) -> float:
    found = [value for value in log_probs if value > -math.inf]
    return float(np.logaddexp.reduce(found)) if found else -math.inf
