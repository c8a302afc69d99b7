"""`report.html` of an iREPO run, made again from the run folder at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkd.evaluation.align_examples import examples, show_examples
from llmkd.evaluation.align_harness import harness_table
from llmkd.evaluation.align_plots import draw_spread, draw_win_kl
from llmkd.evaluation.align_run import (
    PHASES,
    POLICY,
    START,
    WORK,
    AlignRun,
    Iterate,
    annotator_title,
    annotators_of,
    number,
    read_align_run,
    section,
    show,
    show_kl,
    show_seconds,
    show_share,
    show_win,
)
from llmkd.evaluation.page import facts_table, figure, page, table, text, write_picture
from llmkd.files import write_text

PICTURES = {
    "win_kl.png": "Soft win rate against the start, by the KL to the initial policy; 95 % "
    "intervals. Compare runs at equal KL: whoever moves farther has it easier.",
    "rewards.png": "Score of held-out responses; dashed: means.",
    "lengths.png": "Length of held-out responses; dashed: means.",
}
POLICY_WORDS = (
    "Wins: mean probability that the annotators prefer this policy's response, with a 95 % "
    "bootstrap interval over held-out prompts. KL in nats a response (token sums on fresh samples, "
    "± standard error). Tokens: mean length. Truncated: share that met no END."
)
SAME_JUDGES = (
    "The annotators who judge here are those the policy was trained to please; held_out_annotators "
    "names others."
)
NO_KL = (
    "Sampling departed from the policy itself ({}): the KL columns are mean log-ratios of such "
    "text, which is no KL."
)
WORK_WORDS = (
    "Iteration t samples from policy t - 1 and trains policy t. Dropped: duplicates / truncated / "
    "empty responses. Loss and accuracy are the training's own, over its pairs."
)
LEAN_WORDS = (
    "Lean: mean logit (nats) towards the response shown first; 0 is fair. Orders disagree: share "
    "of pairs whose verdict turns with the order. Agreement: share of pairs where two annotators "
    "prefer the same response."
)
ON_A_TERMINAL = ("policy", "wins vs start", "KL to initial", "reward", "tokens", "distinct-2")


def write_align_report(folder: Path) -> Path:
    """Write `report.html`, `win_kl.png`, `rewards.png` and `lengths.png` into an iREPO run folder;
    returns the page. What the folder does not hold yet is left out.
    """
    run = read_align_run(folder)
    drawn = {
        "win_kl.png": draw_win_kl(run),
        "rewards.png": draw_spread(run, ("reward", "values"), "score of the response"),
        "lengths.png": draw_spread(run, ("lengths",), "length of the response (tokens)"),
    }
    pictures = {name: picture for name, picture in drawn.items() if picture}
    for name, picture in pictures.items():
        write_picture(folder / name, picture)
    parts = [_head(run), _warnings(run)]
    parts += [_policies(run), _pictures(pictures), _examples(run), _work(run), _annotators(run)]
    parts += [_phases(run), harness_table(run.scores)]
    if not run.iterates:
        parts = [_head(run), _warnings(run), "<p>No iteration has been measured yet.</p>"]
    body = "".join([*parts, _made(run)])
    write_text(folder / "report.html", page(f"llmkd: {folder.name}", body))
    return folder / "report.html"


def print_align_table(folder: Path) -> None:
    """The policies of a run folder on the terminal, in 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    run = read_align_run(folder)
    title = "policies on held-out prompts"
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0))
    shown = [head for head in POLICY if head[0] in ON_A_TERMINAL]
    for heading, _ in shown:
        justify = "left" if heading == "policy" else "right"
        grid.add_column(heading, justify=justify, no_wrap=True, min_width=len(heading))
    for one in run.iterates:
        grid.add_row(*(cell(one) for _, cell in shown))
    console = Console()
    console.print(grid)
    console.print(headline(run), style="dim", highlight=False, markup=False)


def headline(run: AlignRun) -> str:
    """The result in a sentence or two, with what it does not show."""
    last = run.last
    if last is None:
        return "No trained policy has been measured yet."
    win = show_win(last, START)
    if win == "-":
        return f"Iterate {last.name} was not compared with the start."
    kl = show_kl(last, "initial")
    moved = "" if kl == "-" else f" at a KL of {kl} nats to the initial policy"
    said = f"Iterate {last.name} wins {win} against the start{moved}."
    low, high = (last.value("held_out", "win_rate_start", key) for key in ("low", "high"))
    if low is not None and high is not None and low <= 0.5 <= high:
        said += " The interval holds 50%: this run alone shows no difference."
    return said


def _head(run: AlignRun) -> str:
    settings = section(run.facts, "settings")
    planned, done = run.planned, run.last.number if run.last else 0
    names = [annotator_title(one) for one in annotators_of(run.facts)]
    names = names or [str(one.get("name")) for one in _judges(run)[1]]
    facts = [
        f"model: {run.model}" if run.model else "",
        *(f"{key}: {settings[key]}" for key in ("loss", "beta", "reference") if key in settings),
        f"annotators: {', '.join(names)}" if names else "",
        f"{done} of {planned} iterations" if planned else f"{done} iterations",
        f"seed {run.facts['seed']}" if run.facts.get("seed") is not None else "",
        _wall(run),
    ]
    line = " · ".join(text(fact) for fact in facts if fact)
    return (
        f'<h1>iREPO: {text(run.folder.name)}</h1><p class="dim">{line}</p>'
        f"<p>{text(headline(run))}</p>"
    )


def _wall(run: AlignRun) -> str:
    seconds = number(run.facts.get("wall_seconds"))
    return f"{show_seconds(seconds)} in all" if seconds else ""


def _warnings(run: AlignRun) -> str:
    said = [("", note) for note in run.notes]
    for one in run.iterates:
        found = one.part("warnings")
        said += [(f"{_when(one)}: ", str(w)) for w in found] if isinstance(found, list) else []
    lines = "".join(f"<li>{text(where + what)}</li>" for where, what in said)
    return f"<h2>Warnings</h2><ul>{lines}</ul>" if lines else ""


def _when(one: Iterate) -> str:
    return f"iteration {one.number}" if one.number else START


def _policies(run: AlignRun) -> str:
    rows = [[cell(one) for _, cell in POLICY] for one in run.iterates]
    words = [POLICY_WORDS, "" if run.setting("held_out_annotators") else SAME_JUDGES]
    words += [NO_KL.format(run.warped)] if run.warped else []
    return (
        f"<h2>Policies on held-out prompts</h2>{table((head for head, _ in POLICY), rows)}"
        f'<p class="dim">{text(" ".join(filter(None, words)))}</p>'
    )


def _pictures(pictures: dict[str, bytes]) -> str:
    figures = "".join(figure(picture, PICTURES[name]) for name, picture in pictures.items())
    return f'<div class="grid">{figures}</div>' if figures else ""


def _work(run: AlignRun) -> str:
    done = [one for one in run.iterates if one.number]
    if not done:
        return ""
    rows = [[cell(one) for _, cell in WORK] for one in done]
    return (
        f"<h2>Iterations</h2>{table((head for head, _ in WORK), rows)}"
        f'<p class="dim">{text(WORK_WORDS)}</p>'
    )


def _judges(run: AlignRun) -> tuple[Iterate | None, list[dict[str, Any]]]:
    """The newest iteration that tells of its annotators, and what it tells."""
    for one in reversed(run.iterates):
        found = one.part("annotators")
        known = [a for a in found if isinstance(a, dict)] if isinstance(found, list) else []
        if known:
            return one, known
    return None, []


def _annotators(run: AlignRun) -> str:
    one, judges = _judges(run)
    if one is None:
        return ""
    names = [str(judge.get("name")) for judge in judges]
    agree = [name for name in names if any(name in section(j, "agreement_with") for j in judges)]
    heads = ["annotator", "questions", "lean to first", "orders disagree"]
    rows = []
    for name, judge in zip(names, judges, strict=True):
        shares = section(judge, "agreement_with")
        cells = [name, show(number(judge.get("questions")), ",.0f")]
        cells += [show(number(judge.get("first_lean")), "+.2f")]
        cells += [show_share(number(judge.get("orders_disagree")))]
        rows.append([*cells, *(show_share(number(shares.get(other))) for other in agree)])
    shown = table([*heads, *(f"agrees with {name}" for name in agree)], rows)
    flags = [f"<p>{text(said)}</p>" for judge in judges if (said := _biased(judge))]
    return (
        f"<h2>Annotators</h2>{shown}{''.join(flags)}"
        f'<p class="dim">{text(f"In {_when(one)}. {LEAN_WORDS}")}</p>'
    )


def _biased(judge: dict[str, Any]) -> str:
    share = number(judge.get("orders_disagree"))
    if share is None or share <= 0.5:
        return ""
    lean = number(judge.get("first_lean"))
    side = "" if not lean else f", mostly the {'first' if lean > 0 else 'second'}"
    return (
        f"{judge.get('name')} picks a place, not a response{side}: turning the order turns "
        f"{share:.0%} of its verdicts."
    )


def _phases(run: AlignRun) -> str:
    """Seconds of each phase and its share of the iteration; the last row is the whole run."""
    timed = [(_when(one), {p: one.value("seconds", p) for p in PHASES}) for one in run.iterates]
    timed = [(name, known) for name, known in timed if any(v for v in known.values())]
    if not timed:
        return ""
    sums = {p: sum(known[p] or 0.0 for _, known in timed) for p in PHASES}
    rows = []
    for name, known in [*timed, ("all", sums)]:
        total = sum(value or 0.0 for value in known.values())
        cells = (_phase(known[p], total) for p in PHASES)
        rows.append([name, *cells, show_seconds(total)])
    return f"<h2>Where the time went</h2>{table(['', *PHASES, 'together'], rows)}"


def _phase(seconds: float | None, total: float) -> str:
    if seconds is None or not total:
        return "-"
    return f"{show_seconds(seconds)} ({seconds / total:.0%})"


def _examples(run: AlignRun) -> str:
    found = examples(run)
    if not found or run.last is None:
        return ""
    return (
        '<h2>Side by side</h2><p class="dim">Held-out prompts evenly spread over the file, not '
        f"chosen.</p>{show_examples(found, run.last.name)}"
    )


def _made(run: AlignRun) -> str:
    rows: list[tuple[str, Any]] = []
    for name in ("student", "policy", "settings", "data", "versions"):
        rows += [(f"{name}: {key}", value) for key, value in section(run.facts, name).items()]
    wanted = ("status", "key", "git", "command", "wall_seconds", "peak_memory_bytes")
    rows += [(name, run.facts[name]) for name in wanted if run.facts.get(name) is not None]
    if not rows:
        return ""
    return f"<details><summary>How it was made</summary>{facts_table(rows)}</details>"
