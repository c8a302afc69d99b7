"""`report.html` of a DeQA-Score run, made again from the run folder at any time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkd.evaluation.align_harness import BEFORE, harness_rows
from llmkd.evaluation.page import facts_table, figure, page, table, text, write_picture
from llmkd.evaluation.score_plots import draw_reliability, draw_scatter
from llmkd.files import read_json, write_text

PREDICTIONS = "predictions.jsonl"
TITLES = {
    "plcc": "PLCC",
    "plcc_logistic": "PLCC, fitted",
    "srcc": "SRCC",
    "krcc": "KRCC",
    "mae": "MAE",
    "rmse": "RMSE",
    "qwk": "QWK",
    "std_plcc": "std PLCC",
    "std_srcc": "std SRCC",
    "kl": "KL",
    "js": "JS",
    "wasserstein": "W1",
    "gauss_kl": "Gauss KL",
    "gauss_w2": "Gauss W2",
}
ON_A_TERMINAL = ("plcc", "srcc", "mae", "std_plcc", "kl")
WORDS = (
    "On held-out rows, in the levels' unit, with 95 % bootstrap intervals over rows. PLCC, SRCC "
    "and KRCC compare predicted means with people's; std PLCC and SRCC the spreads. KL, JS and W1 "
    "(Wasserstein) compare whole distributions with the ratings' histogram, in nats; Gauss KL and "
    "W2 only mean and std. Fitted: after a logistic of four parameters, as image-quality papers do."
)
PAIRED = (
    "Difference to {}, on the same rows; positive is better also for errors. An "
    "interval that holds 0 shows no difference. One training seed an arm: its spread is not in it."
)

HARNESS = (
    "lm_eval on the models as they are, ± standard error: what the training did to them elsewhere. "
    "baseline: the model given as --baseline, on the same documents."
)


def write_deqa_report(folder: Path) -> Path:
    """Write `report.html` and its pictures into a run folder; returns the page. What the folder
    does not hold yet is left out.
    """
    run = read_json(folder / "run.json") or {}
    arms = _arms(folder, run)
    parts = [f"<h1>{text(folder.name)}</h1>", f'<p class="dim">{text(_line(run, arms))}</p>']
    if arms:
        parts += ["<h2>Against people</h2>", _agreement(arms), f'<p class="dim">{WORDS}</p>']
        parts += [_undefined(arms), _paired(folder), _pictures(folder, arms), _groups(arms)]
        parts.append(_harness(folder, arms))
    else:
        parts.append("<p>No scorer has been measured yet.</p>")
    parts += ["<h2>Training</h2>", _training(arms), "<h2>Rows</h2>", _rows(run)]
    write_text(folder / "report.html", page(f"llmkd: {folder.name}", "".join(parts)))
    return folder / "report.html"


def print_deqa_table(folder: Path) -> None:
    """The arms of a run folder on the terminal, in 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    arms = _arms(folder, read_json(folder / "run.json") or {})
    if not arms:
        print("no scorer has been measured yet")
        return
    title = "held-out rows against people"
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    grid.add_column("arm", no_wrap=True)
    for name in ON_A_TERMINAL:
        grid.add_column(TITLES[name], justify="right", no_wrap=True)
    for name, (found, _) in arms.items():
        measures = found["held_out"]["measures"]
        grid.add_row(name or "scorer", *(show(measures.get(one)) for one in ON_A_TERMINAL))
    Console().print(grid)


def show(measure: Mapping[str, Any] | None, *, interval: bool = False) -> str:
    """A measure as text; a dash where it is not defined."""
    if not measure or measure.get("value") is None:
        return "-"
    value = f"{measure['value']:.3f}"
    if not interval or measure.get("low") is None:
        return value
    return f"{value} [{measure['low']:.3f}, {measure['high']:.3f}]"


def measures_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """HTML: a line a metric, a column an arm."""
    names = [name for name in TITLES if any(name in one for one in arms.values())]
    lines = [
        [TITLES[name], *(show(one.get(name), interval=True) for one in arms.values())]
        for name in names
    ]
    return table(["", *(name or "scorer" for name in arms)], lines)


def _arms(folder: Path, run: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """`eval.json` and `run.json` of each arm that was measured."""
    found = {}
    for name in run.get("arms") or [""]:
        place = folder / name if name else folder
        scores = read_json(place / "eval.json") or {}
        if "held_out" in scores:
            found[name] = (scores, read_json(place / "run.json") or {})
    return found


def _line(run: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    data, student = run.get("data") or {}, run.get("student") or {}
    planned = len(run.get("arms") or [""])
    done = "" if len(arms) == planned else f"; {len(arms)} of {planned} arms measured"
    return (
        f"{student.get('source')} trained to rate {data.get('source')}: "
        f"{data.get('train_rows')} rows, {data.get('eval_rows')} held out{done}"
    )


def _agreement(arms: Mapping[str, Any]) -> str:
    shown = {name: found["held_out"]["measures"] for name, (found, _) in arms.items()}
    ece = [f"{found['held_out']['reliability']['ece']:.3f}" for found, _ in arms.values()]
    return measures_table(shown) + table(["calibration error of the mean", *shown], [["", *ece]])


def _undefined(arms: Mapping[str, Any]) -> str:
    """Why a metric has no number or no interval."""
    said = []
    for name, (found, _) in arms.items():
        for metric, one in found["held_out"]["measures"].items():
            if one["words"]:
                line = f"{name + ': ' if name else ''}{TITLES.get(metric, metric)}: {one['words']}"
                said.append(f"<li>{text(line)}</li>")
    return f"<ul>{''.join(said)}</ul>" if said else ""


def _paired(folder: Path) -> str:
    found = read_json(folder / "eval.json") or {}
    pairs = found.get("paired") or {}
    if not pairs:
        return ""
    metrics = [name for name in TITLES if any(name in one for one in pairs.values())]
    lines = [[name, *(_gap(one.get(metric)) for metric in metrics)] for name, one in pairs.items()]
    words = PAIRED.format(found["against"])
    shown = table(["", *(TITLES[name] for name in metrics)], lines)
    return f'<h2>Arms against {text(found["against"])}</h2>{shown}<p class="dim">{text(words)}</p>'


def _gap(one: Mapping[str, float] | None) -> str:
    return f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]" if one else "-"


def _pictures(folder: Path, arms: Mapping[str, Any]) -> str:
    values = (next(iter(arms.values()))[1].get("levels") or {}).get("values") or [1, 5]
    curves = {
        name: (found["held_out"]["reliability"]["said"], found["held_out"]["reliability"]["found"])
        for name, (found, _) in arms.items()
    }
    picture = draw_reliability(curves, values)
    write_picture(folder / "reliability.png", picture)
    shown = [figure(picture, "Reliability: people's mean in bins of the predicted mean.")]
    for name in arms:
        place = folder / name if name else folder
        for what, (said, found) in _points(place).items():
            drawn = draw_scatter(said, found, what)
            write_picture(place / f"{what}.png", drawn)
            shown.append(figure(drawn, f"{name + ': ' if name else ''}{what}, a point a row."))
    return f'<h2>Row by row</h2><div class="grid">{"".join(shown)}</div>'


def _points(place: Path) -> dict[str, tuple[list[float], list[float]]]:
    if not (place / PREDICTIONS).is_file():
        return {}
    lines = (place / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if (row := json.loads(line)).get("split") == "held_out"]
    found = {}
    for what in ("mean", "std"):
        known = [row for row in rows if row[f"human_{what}"] is not None]
        if known:
            found[what] = [row[what] for row in known], [row[f"human_{what}"] for row in known]
    return found


def _groups(arms: Mapping[str, Any]) -> str:
    parts = []
    for name, (found, _) in arms.items():
        groups = found["held_out"].get("groups") or {}
        if groups:
            shown = {f"{group} ({one['rows']})": one["measures"] for group, one in groups.items()}
            parts.append(f"<h2>{text(name or 'Groups')}, by group</h2>{measures_table(shown)}")
    return "".join(parts)


def _harness(folder: Path, arms: Mapping[str, Any]) -> str:
    """What `llmkd eval` found: a line a metric, a column an arm; before it stands `--baseline`."""
    sources = {name: found for name, (found, _) in arms.items()}
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for name, scores in {**sources, BEFORE: read_json(folder / "eval.json") or {}}.items():
        for task, metric, count, before, after, _ in harness_rows(scores):
            line = lines.setdefault((task, metric, count), {})
            if name in sources:
                line[name] = after
            if before != "-":
                line[BEFORE] = before
    if not lines:
        return ""
    columns = [*([BEFORE] if any(BEFORE in line for line in lines.values()) else []), *sources]
    heads = ["task", "metric", "documents", *(name or "scorer" for name in columns)]
    rows = [[*key, *(line.get(name, "-") for name in columns)] for key, line in lines.items()]
    return f'<h2>Evaluation harness</h2>{table(heads, rows)}<p class="dim">{text(HARNESS)}</p>'


def _training(arms: Mapping[str, Any]) -> str:
    heads = ["", "label", "fidelity weight", "std mode", "learning rate", "steps", "s", "peak GiB"]
    lines = []
    for name, (_, run) in arms.items():
        plan = run.get("schedule") or {}
        peak = (run.get("peak_memory_bytes") or 0) / 2**30
        how = [plan.get(key) for key in ("fidelity_weight", "std_mode", "learning_rate")]
        spent = [run.get("steps"), run.get("wall_seconds"), f"{peak:.2f}"]
        lines.append([name or "scorer", run.get("label"), *how, *spent])
    return table(heads, lines)


def _rows(run: Mapping[str, Any]) -> str:
    data, levels = run.get("data") or {}, run.get("levels") or {}
    words = zip(levels.get("words") or [], levels.get("values") or [], strict=False)
    facts = [
        ("source", data.get("source")),
        (
            "rows",
            f"{data.get('train_rows')} trained on, {data.get('validation_rows')} to tune on, "
            f"{data.get('eval_rows')} held out",
        ),
        ("raters' scale", ", ".join(f"{k}: {v}" for k, v in (data.get("scales") or {}).items())),
        ("counted", ", ".join(f"{k} {v}" for k, v in (data.get("counts") or {}).items()) or "-"),
        ("levels", ", ".join(f"{word} = {value:g}" for word, value in words)),
        ("answer", f"{levels.get('prefix')} ..."),
        ("seed", run.get("seed")),
        ("made by", run.get("command")),
    ]
    return facts_table(facts)
