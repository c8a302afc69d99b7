"""An iREPO run folder as data: its iterates, what they measured, and the columns of the tables.

A part that is missing (an iteration that has not run, a number nobody measured) is None here and
"-" in the tables; nothing in this file raises for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkd.files import read_json

START, PREVIOUS = "start", "previous"
PHASES = ("sample", "annotate", "reference", "train", "evaluate")
DROPPED = ("duplicate", "truncated", "empty")


@dataclass(frozen=True)
class Iterate:
    """One policy of the loop: number 0 is the start, number t what iteration t trained."""

    number: int
    folder: Path
    metrics: dict[str, Any]

    @property
    def name(self) -> str:
        """As the tables call it."""
        return START if self.number == 0 else str(self.number)

    def part(self, *keys: str) -> Any:
        """What `metrics.json` holds under nested keys; None where there is no such thing."""
        found: Any = self.metrics
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def value(self, *keys: str) -> float | None:
        """`part` if it is a number one can compute with, else None."""
        return number(self.part(*keys))

    def values(self, *keys: str) -> list[float]:
        """The finite numbers of a list under nested keys."""
        found = self.part(*keys)
        known = map(number, found) if isinstance(found, list) else ()
        return [value for value in known if value is not None]


@dataclass(frozen=True)
class AlignRun:
    """The whole folder. `iterates` are those with a `metrics.json`, in order; `notes` say what
    could not be read.
    """

    folder: Path
    facts: dict[str, Any]
    iterates: tuple[Iterate, ...]
    scores: dict[str, Any]  # eval.json
    notes: tuple[str, ...]

    @property
    def planned(self) -> int | None:
        """How many iterations the run was to have."""
        found = self.facts.get("iterations")
        found = self.setting("iterations") if found is None else found
        return found if isinstance(found, int) else None

    @property
    def model(self) -> str:
        """What the loop started from, as the recipe names it; "" where nobody says."""
        named = [section(self.facts, key).get("source") for key in ("policy", "student")]
        found = next((str(one) for one in (*named, self.setting("model_name_or_path")) if one), "")
        return "pretrained in this run" if found == START else found

    @property
    def warped(self) -> str:
        """How sampling departed from the policy itself, so that its log-ratios are no KL; ""
        where it did not.
        """
        plain = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        known = {**section(self.facts, "sampling"), **section(self.facts, "settings")}
        found = [(key, number(known.get(key)), value) for key, value in plain.items()]
        return ", ".join(f"{k} {v:g}" for k, v, same in found if v is not None and v != same)

    @property
    def start(self) -> Iterate | None:
        """The policy the run began with, if it was measured."""
        return next((one for one in self.iterates if one.number == 0), None)

    @property
    def last(self) -> Iterate | None:
        """The newest trained policy that was measured on held-out prompts."""
        done = [one for one in self.iterates if one.number and one.part("held_out")]
        return done[-1] if done else None

    def setting(self, key: str) -> Any:
        """A setting of the recipe as `run.json` has it; None where it does not say."""
        return section(self.facts, "settings").get(key)


def read_align_run(folder: Path) -> AlignRun:
    """What `run.json`, `eval.json` and `iteration-<t>/metrics.json` say; gaps are allowed."""
    notes: list[str] = []
    iterates = []
    for place in sorted(folder.glob("iteration-*"), key=_iteration):
        metrics = _object(place / "metrics.json", notes)
        if _iteration(place) >= 0 and metrics:
            iterates.append(Iterate(_iteration(place), place, metrics))
    facts, scores = (_object(folder / name, notes) for name in ("run.json", "eval.json"))
    run = AlignRun(folder, facts, tuple(iterates), scores, tuple(notes))
    if run.planned is None:
        return run
    # an earlier call with more iterations may have left some behind
    return replace(run, iterates=tuple(one for one in iterates if one.number <= run.planned))


def _iteration(folder: Path) -> int:
    tail = folder.name.removeprefix("iteration-")
    return int(tail) if tail.isdecimal() else -1


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        notes.append(f"{path.parent.name}/{path.name} cannot be read ({type(error).__name__})")
        return {}
    return found if isinstance(found, dict) else {}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; none where it is missing, and broken lines are left out."""
    # not splitlines: a response may hold other characters that it takes for line ends
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else ()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def section(facts: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`, empty where there is none."""
    found = facts.get(key)
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def annotators_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's annotators as mappings ({"type", "name", ...}); a file's JSON text is read."""
    found = section(facts, "settings").get("annotators")
    if found is None:
        found = facts.get("annotators")
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = [{"name": found}]
    found = found if isinstance(found, list) else [found]
    known = [{"name": one} if isinstance(one, str) else one for one in found]
    return [one for one in known if isinstance(one, dict)]


def annotator_title(one: dict[str, Any]) -> str:
    """An annotator in a few words: its type and what it is made of."""
    what = next((one[k] for k in ("name", "model", "models", "function", "file") if one.get(k)), "")
    what = ", ".join(map(str, what)) if isinstance(what, list) else str(what)
    kind = str(one.get("type") or "")
    return f"{kind} {what}".strip() if what != kind else kind


def show(value: float | None, form: str = ".3g") -> str:
    """A table cell; "-" for what is not known."""
    return "-" if value is None else format(value, form)


def show_share(value: float | None) -> str:
    """A share 0..1 as a percentage with one decimal."""
    return "-" if value is None else f"{value:.1%}"


def show_win(one: Iterate, against: str) -> str:
    """Soft win rate in percent and its interval: `61.2% [55.0%, 67.1%]`."""
    soft, low, high = (
        one.value("held_out", f"win_rate_{against}", k) for k in ("soft", "low", "high")
    )
    if soft is None:
        return "-"
    return f"{soft:.1%}" + ("" if low is None or high is None else f" [{low:.1%}, {high:.1%}]")


def show_kl(one: Iterate, to: str) -> str:
    """KL in nats a response, ± its standard error."""
    mean, error = one.value("held_out", f"kl_{to}", "mean"), one.value("held_out", f"kl_{to}", "se")
    return "-" if mean is None else f"{mean:.3g}" + ("" if error is None else f" ± {error:.2g}")


def mean_of(values: list[float]) -> float | None:
    """Mean; None of nothing."""
    return sum(values) / len(values) if values else None


def _dropped(one: Iterate) -> str:
    counts = [one.value("dropped", name) for name in DROPPED]
    if all(count is None for count in counts):
        return "-"
    return " / ".join(show(count, ",.0f") for count in counts)


Columns = tuple[tuple[str, Callable[[Iterate], str]], ...]

POLICY: Columns = (
    ("policy", lambda one: one.name),
    ("wins vs start", lambda one: show_win(one, START)),
    ("wins vs previous", lambda one: show_win(one, PREVIOUS)),
    ("KL to initial", lambda one: show_kl(one, "initial")),
    ("KL to previous", lambda one: show_kl(one, "previous")),
    ("reward", lambda one: show(one.value("held_out", "reward", "mean"))),
    ("tokens", lambda one: show(mean_of(one.values("held_out", "lengths")), ".1f")),
    ("truncated", lambda one: show_share(one.value("held_out", "truncated"))),
    ("distinct-2", lambda one: show(one.value("held_out", "distinct_2"), ".3f")),
)
WORK: Columns = (
    ("iteration", lambda one: one.name),
    ("prompts", lambda one: show(one.value("prompts"), ",.0f")),
    ("responses", lambda one: show(one.value("responses"), ",.0f")),
    ("dropped", _dropped),
    ("no pair", lambda one: show(one.value("prompts_without_pair"), ",.0f")),
    ("pairs", lambda one: show(one.value("pairs"), ",.0f")),
    ("mean |logit|", lambda one: show(one.value("mean_abs_logit"))),
    ("loss", lambda one: show(one.value("train", "loss"), ".4g")),
    ("accuracy", lambda one: show_share(one.value("train", "accuracy"))),
    ("sampling", lambda one: show_seconds(one.value("seconds", "sample"))),
    ("annotating", lambda one: show_seconds(one.value("seconds", "annotate"))),
    ("training", lambda one: show_seconds(one.value("seconds", "train"))),
)


def show_seconds(seconds: float | None) -> str:
    """Seconds below ten minutes, else minutes."""
    if seconds is None:
        return "-"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
