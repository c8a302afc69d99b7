"""What `llmkd judge` found: `judge.json`, `judge.html` with `reliability.png`, and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from llmkd.data.rated import RatedPairs
from llmkd.evaluation.agreement import ALWAYS, Agreement, Interval, ece, hits
from llmkd.evaluation.agreement_plots import draw_reliability
from llmkd.evaluation.page import facts_table, figure, page, table, text, write_picture
from llmkd.files import write_json, write_text

EXAMPLES = 12
LONGEST = 1200  # characters shown of one text
CLOSE = 0.1  # a temperature within this share of the present one is left as it is
NOTHING = "—"
PROSE = "white-space:pre-wrap;overflow-wrap:anywhere"
AGREEMENT_WORDS = (
    "Accuracy: share of pairs where the judge prefers what most people prefer, ties of either "
    "half, with a 95 % bootstrap interval; decided: without the ties of people. ECE: how far "
    "sigma(|logit|) lies from the share of votes, mean over 10 bins of equal numbers of pairs. "
    "Brier: mean squared difference of sigma(logit) and that share. Log loss: nats a vote, .693 "
    "for knowing nothing. Temperature: the one that fits the votes; then the ECE of every fifth of "
    "the pairs under the temperature of the others."
)
PLACE_WORDS = (
    "Lean: mean logit (nats) that whichever response was shown first is preferred, 0 is fair. "
    "First: share of answers for it. Orders disagree: share of pairs whose verdict turns with the "
    "order."
)


@dataclass(frozen=True)
class JudgeReport:
    """Agreements of the judges and of all combined; `logits` by name, nats, NaN for no answer;
    `between`: agreement of every two; `raters`: that of two people; `temperature`: the recipe's.
    """

    source: str
    rated: RatedPairs
    judges: Sequence[Agreement]
    combined: Agreement
    combine: str
    logits: dict[str, np.ndarray]
    between: Sequence[dict[str, Any]]
    raters: float | None
    temperature: float

    @property
    def shown(self) -> list[Agreement]:
        """Judges, and their combination where it is something else than the one judge."""
        alone = self.logits[self.judges[0].name]
        same = np.allclose(alone, self.logits[self.combined.name], equal_nan=True)
        return (
            list(self.judges) if len(self.judges) == 1 and same else [*self.judges, self.combined]
        )

    @property
    def ece_now(self) -> float:
        """ECE of the combined logits at the recipe's temperature."""
        logits_N = self.logits[self.combined.name]
        known_N = ~np.isnan(logits_N)
        share_N = self.rated.wins_N[known_N] / self.rated.votes_N[known_N]
        return ece(logits_N[known_N] / self.temperature, share_N)

    @property
    def warnings(self) -> list[str]:
        """What should not be overlooked, in words."""
        found = [
            f"{j.name} {j.position.words}" for j in self.judges if j.position and j.position.words
        ]
        for judge in self.shown:
            if judge.accuracy.low <= 0.5:
                span = show_interval(judge.accuracy)
                found.append(f"{judge.name}: accuracy {span}: not shown to beat a coin")
            if judge.unanswered:
                found.append(f"{judge.name} left {judge.unanswered} pairs unanswered")
        return found

    @property
    def advice(self) -> str:
        """Which logit_temperature to set."""
        found = self.combined.temperature
        if found.value is None or found.ece is None:
            return f"logit_temperature: none fits ({found.words}); now {self.temperature:g}"
        if abs(found.value / self.temperature - 1) <= CLOSE:
            return f"logit_temperature: {self.temperature:g} is right (ECE {self.ece_now:.3f})"
        return (
            f"logit_temperature: {found.value:.2f} fits these votes (now {self.temperature:g}): "
            f"ECE {self.ece_now:.3f} -> {found.ece:.3f} on pairs it was not fitted on"
        )

    def groups(self) -> dict[str, dict[str, Any]]:
        """By `group`: pairs, and the accuracy of each judge; nothing where no pair has one."""
        names = [pair.group for pair in self.rated.pairs]
        found: dict[str, dict[str, Any]] = {}
        for group in sorted({name for name in names if name is not None}):
            mine_N = np.array([name == group for name in names])
            row: dict[str, Any] = {"pairs": int(mine_N.sum())}
            for judge in self.shown:
                used_N = mine_N & ~np.isnan(self.logits[judge.name])
                right = self._hits(judge.name, used_N)
                row[judge.name] = float(right.mean()) if len(right) else None
            found[group] = row
        return found

    def _hits(self, name: str, used_N: np.ndarray) -> np.ndarray:
        wins_N, votes_N = self.rated.wins_N, self.rated.votes_N
        return hits(self.logits[name][used_N], wins_N[used_N], votes_N[used_N])


def write_judge_report(report: JudgeReport, folder: Path) -> Path:
    """Write `judge.json`, `reliability.png` and `judge.html` into `folder`; returns the page."""
    write_json(folder / "judge.json", _facts(report))
    share_N = report.rated.wins_N / report.rated.votes_N
    curves = {}
    for judge in report.shown:
        known_N = ~np.isnan(report.logits[judge.name])
        kept = report.logits[judge.name][known_N], share_N[known_N]
        curves[judge.name] = (*kept, judge.temperature.value)
    picture = draw_reliability(curves)
    assert picture is not None  # a judge without any answer is an error before this
    write_picture(folder / "reliability.png", picture)
    body = [
        f"<h1>Judges on {text(Path(report.source).name)}</h1><p>{text(report.advice)}</p>",
        "".join(f"<p><b>{text(warning)}</b></p>" for warning in report.warnings),
        _section("Agreement with people", AGREEMENT_HEADS, agreement_rows(report), AGREEMENT_WORDS),
        figure(picture, "How sure judges are against how often people agree; dotted: calibrated."),
        _section("Places", PLACE_HEADS, place_rows(report), PLACE_WORDS),
        _section("Between judges", ("judges", "agreement", "kappa"), _between(report), ""),
        _groups(report),
        _examples(report),
        "<h2>What was rated</h2>" + facts_table(_what(report)),
    ]
    write_text(folder / "judge.html", page("llmkd judge", "".join(body)))
    return folder / "judge.html"


def print_judges(report: JudgeReport) -> None:
    """The tables on the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    kept = [AGREEMENT_HEADS.index(head) for head in ON_A_TERMINAL]
    for heads, rows in (
        (ON_A_TERMINAL, [[row[place] for place in kept] for row in agreement_rows(report)]),
        (PLACE_HEADS, place_rows(report)),
        (("judges", "agreement", "kappa"), _between(report)),
    ):
        if rows:
            grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for place, head in enumerate(heads):
                wraps = head in ("judge", "judges")
                side = "right" if place else "left"
                grid.add_column(head, justify=side, no_wrap=not wraps, overflow="fold")
            for row in rows:
                grid.add_row(*(Text(str(value)) for value in row))  # names are not markup
            console.print(grid)
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}"), style="yellow")


AGREEMENT_HEADS = (
    "judge", "pairs", "accuracy", "decided", "ECE", "Brier", "log loss", "temperature", "ECE then"
)  # fmt: skip
ON_A_TERMINAL = ("judge", "pairs", "accuracy", "ECE", "log loss", "temperature", "ECE then")
PLACE_HEADS = ("judge", "lean", "first", "orders disagree", "s a pair")


def agreement_rows(report: JudgeReport) -> list[list[str]]:
    """A line a judge, as AGREEMENT_HEADS says."""
    return [
        [
            judge.name,
            str(judge.pairs),
            show_interval(judge.accuracy),
            f"{judge.decided.mean:.3f}" if judge.decided else NOTHING,
            f"{judge.ece:.3f}",
            f"{judge.brier:.3f}",
            f"{judge.log_loss:.3f}",
            _number(judge.temperature.value, ".2f"),
            _number(judge.temperature.ece, ".3f"),
        ]
        for judge in report.shown
    ]


def place_rows(report: JudgeReport) -> list[list[str]]:
    """A line a judge that was asked in both orders, as PLACE_HEADS says."""
    return [
        [
            judge.name,
            f"{judge.position.lean:+.2f}",
            f"{judge.position.first:.0%}" + (" !" if _one_sided(judge.position.first) else ""),
            f"{judge.position.disagree:.0%}",
            _number(judge.seconds, ".2f"),
        ]
        for judge in report.judges
        if judge.position
    ]


def _one_sided(first: float) -> bool:
    return first > ALWAYS or first < 1 - ALWAYS


def show_interval(interval: Interval) -> str:
    """`0.712 [0.680, 0.744]`."""
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _between(report: JudgeReport) -> list[list[str]]:
    return [
        [
            " / ".join(pair["judges"]),
            _number(pair["agreement"], ".3f"),
            _number(pair["kappa"], ".3f"),
        ]
        for pair in report.between
    ]


def _section(title: str, heads: Sequence[str], rows: list[list[str]], words: str) -> str:
    if not rows:
        return ""
    below = f'<p class="dim">{text(words)}</p>' if words else ""
    return f"<h2>{title}</h2>{table(heads, rows)}{below}"


def _groups(report: JudgeReport) -> str:
    names = [judge.name for judge in report.shown]
    rows = [
        [group, str(found["pairs"]), *(_number(found[name], ".3f") for name in names)]
        for group, found in report.groups().items()
    ]
    return _section("Accuracy by group", ("group", "pairs", *names), rows, "")


def _examples(report: JudgeReport) -> str:
    """Pairs where judges and people differ most."""
    logits_N = np.nan_to_num(report.logits[report.combined.name])
    share_N = report.rated.wins_N / report.rated.votes_N
    wrong_N = np.sign(logits_N) * np.sign(share_N - 0.5) < 0
    gap_N = np.where(wrong_N, np.abs(expit(logits_N) - share_N), -1.0)
    places = [place for place in np.argsort(-gap_N, kind="stable")[:EXAMPLES] if gap_N[place] > 0]
    if not places:
        return ""
    shown = "".join(_example(report, int(place), float(logits_N[place])) for place in places)
    return f"<h2>Where judges and people differ most</h2>{shown}"


def _example(report: JudgeReport, place: int, logit: float) -> str:
    pair = report.rated.pairs[place]
    prompt = pair.prompt
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    said = 1 if logit > 0 else 2
    summary = (
        f"row {pair.row}: judges say {said} (logit {logit:+.2f}), {pair.wins:g} of {pair.votes:g} "
        "people say 1"
    )
    sides = "".join(
        f'<figure><figcaption>{name}</figcaption><div style="{PROSE}">{text(_cut(body))}</div>'
        "</figure>"
        for name, body in (("1", pair.response_1), ("2", pair.response_2))
    )
    return (
        f"<details><summary>{text(summary)}</summary>"
        f'<p style="{PROSE}">{text(_cut(prompt))}</p><div class="pair">{sides}</div></details>'
    )


def _cut(long: str) -> str:
    return long if len(long) <= LONGEST else long[: LONGEST - 4] + " ..."


def _what(report: JudgeReport) -> list[tuple[str, Any]]:
    rated = report.rated
    rows: list[tuple[str, Any]] = [
        ("rated pairs", report.source),
        ("pairs", len(rated.pairs)),
        ("votes", f"{rated.votes_N.sum():g}"),
        ("left out", f"{rated.identical} of identical responses, {rated.unrated} without votes"),
        ("two people agree", _number(report.raters, ".3f")),
        ("combined by", report.combine),
    ]
    for judge in report.judges:
        rows += [(f"{judge.name}: {key}", value) for key, value in judge.notes.items()]
    return rows


def _facts(report: JudgeReport) -> dict[str, Any]:
    rated = report.rated
    return {
        "rated_pairs": report.source,
        "pairs": len(rated.pairs),
        "left_out": {"identical": rated.identical, "unrated": rated.unrated},
        "rater_agreement": report.raters,
        "judges": [judge.as_dict() for judge in report.judges],
        "combined": {"combine": report.combine, **report.combined.as_dict()},
        "between": list(report.between),
        "groups": report.groups(),
        "logit_temperature": {
            "now": report.temperature,
            "ece_now": report.ece_now,
            "fitted": report.combined.temperature.value,
            "ece_fitted": report.combined.temperature.ece,
        },
        "warnings": report.warnings,
        "advice": report.advice,
    }
