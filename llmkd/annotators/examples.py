"""A rule to try things with: it costs nothing and everybody can see what it wants."""

from __future__ import annotations

import re

WORD = re.compile(r"[A-Za-z]+")


def prose(prompt: object, response: str) -> float:
    """Nats for English prose rather than code: 8 x (share of letters and blanks) + 4 x (share of
    words not said before). Between 0 and 12; nothing for an empty response.
    """
    if not response.strip():
        return 0.0
    plain = sum(char.isalpha() or char == " " for char in response) / len(response)
    words = [word.lower() for word in WORD.findall(response)]
    return 8.0 * plain + 4.0 * (len(set(words)) / len(words) if words else 0.0)
