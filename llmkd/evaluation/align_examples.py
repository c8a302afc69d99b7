"""Held-out prompts with the start's answer beside the last iterate's, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import expit

from llmkd.evaluation.align_run import PREVIOUS, START, AlignRun, Iterate, number, read_rows
from llmkd.evaluation.page import text

COUNT = 12
LONGEST = 2000  # characters shown of one text
FRAME = "border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem;margin:.4rem 0 0"
PROSE = "white-space:pre-wrap;overflow-wrap:anywhere"


@dataclass(frozen=True)
class Example:
    """One prompt (str or messages). `logit` in nats is the annotators' for `last` over `start`;
    None where nobody compared these two texts.
    """

    row: Any
    prompt: Any
    start: str | None
    last: str
    logit: float | None = None
    start_score: float | None = None
    last_score: float | None = None


def examples(run: AlignRun, count: int = COUNT) -> list[Example]:
    """At most `count` held-out prompts, evenly spread over the file, so that nobody chose them."""
    if run.last is None:
        return []
    first = Iterate(0, run.folder / "iteration-0", {})
    before = {row.get("row"): row for row in _answers(run.start or first)}
    after = {row.get("row"): row for row in _answers(run.last)}
    verdicts = _verdicts(run.last)
    rows = [row for row in after if row in verdicts] or list(after)
    if len(rows) > count:
        rows = [rows[i * len(rows) // count] for i in range(count)]
    found = (_example(after[row], before.get(row), verdicts.get(row)) for row in rows)
    return [one for one in found if one is not None]


def _answers(one: Iterate) -> Iterator[dict[str, Any]]:
    for part in sorted((one.folder / "held_out").glob("part-*.jsonl"), key=_place):
        yield from read_rows(part)


def _place(part: Path) -> tuple[int, str]:
    tail = part.stem.removeprefix("part-")
    return (int(tail) if tail.isdecimal() else 0), tail


def _verdicts(one: Iterate) -> dict[Any, dict[str, Any]]:
    """Row -> its first verdict against the start; for the first iterate the start is also the
    previous one.
    """
    wanted = (START, PREVIOUS) if one.number == 1 else (START,)
    found: dict[Any, dict[str, Any]] = {}
    for against in wanted:
        for line in read_rows(one.folder / "held_out_verdicts.jsonl"):
            if line.get("against") == against:
                found.setdefault(line.get("row"), line)
    return found


def _example(
    after: dict[str, Any], before: dict[str, Any] | None, verdict: dict[str, Any] | None
) -> Example | None:
    row, prompt = after.get("row"), after.get("prompt")
    if verdict is not None and isinstance(verdict.get("response"), str):
        other = verdict.get("other")
        keys = ("logit", "other_score", "score")
        values = [number(verdict.get(key)) for key in keys]
        start = other if isinstance(other, str) else None
        return Example(row, prompt, start, verdict["response"], *values)
    last = _first(after)
    return None if last is None else Example(row, prompt, _first(before or {}), last)


def _first(answers: dict[str, Any]) -> str | None:
    texts = answers.get("responses")
    return str(texts[0]) if isinstance(texts, list) and texts else None


def show_examples(found: list[Example], last: str) -> str:
    """The examples as HTML, all text escaped; answers stand one below the other on a phone."""
    return "".join(_show(one, last) for one in found)


def _show(one: Example, last: str) -> str:
    answers = ((START, one.start, one.start_score), (f"iterate {last}", one.last, one.last_score))
    boxes = "".join(_answer(name, said, score) for name, said, score in answers)
    return (
        f'<div style="margin:1.4rem 0 2rem">{_prompt(one.prompt)}<div class="pair">{boxes}</div>'
        f"<p>{text(verdict_words(one.logit, last))}</p></div>"
    )


def _prompt(prompt: Any) -> str:
    turns = prompt if isinstance(prompt, list) else [{"role": "prompt", "content": prompt}]
    lines = []
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {"content": turn}
        role, said = str(turn.get("role", "")), _cut(str(turn.get("content") or ""))
        lines.append(f'<div style="{PROSE}"><b>{text(role)}</b> {text(said)}</div>')
    return "".join(lines)


def _answer(name: str, said: str | None, score: float | None) -> str:
    scored = "" if score is None else f", score {score:.3g}"
    shown = "no response" if said is None else _cut(said) or "(empty)"
    return (
        f'<figure style="{FRAME}"><figcaption>{text(name + scored)}</figcaption>'
        f'<div style="{PROSE}">{text(shown)}</div></figure>'
    )


def verdict_words(logit: float | None, last: str) -> str:
    """The annotators' verdict in words, for iterate `last` against the start."""
    if logit is None:
        return "Not compared by the annotators."
    if logit == 0:
        return "Verdict: a tie."
    winner = f"iterate {last}" if logit > 0 else "the start"
    chance = float(expit(abs(logit)))
    return f"Verdict: {winner}, with probability {chance:.0%} (logit {logit:+.2f})."


def _cut(said: str) -> str:
    said = said.strip("\n")
    more = len(said) - LONGEST
    return said if more <= 0 else f"{said[:LONGEST]} […{more:,} more characters]"
