"""Which responses to a prompt are worth an annotator's time."""

from __future__ import annotations

from collections.abc import Sequence


def screen(
    responses: Sequence[str], finished: Sequence[bool], *, drop_truncated: bool = True
) -> tuple[list[int], dict[str, int]]:
    """Indexes of the responses to keep, ascending, and how many were dropped for which reason.

    In this order, each counted once: `empty` (nothing but white space), `truncated` (not finished;
    only with `drop_truncated`), `duplicate` (the text of an earlier one that is kept, white space
    around it aside). Kept and dropped together are all.
    """
    if len(responses) != len(finished):
        raise ValueError(f"{len(responses)} responses and {len(finished)} marks")
    kept: list[int] = []
    dropped = {"duplicate": 0, "truncated": 0, "empty": 0}
    seen: set[str] = set()
    for place, (response, done) in enumerate(zip(responses, finished, strict=True)):
        text = response.strip()
        if not text:
            dropped["empty"] += 1
        elif drop_truncated and not done:
            dropped["truncated"] += 1
        elif text in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(text)
            kept.append(place)
    return kept, dropped
