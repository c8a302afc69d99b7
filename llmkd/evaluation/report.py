"""`report.html`: one file, no network, made again from the run folder at any time."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from llmkd.evaluation.compare import HEADINGS, ArmResult, compare
from llmkd.evaluation.plots import PANELS, draw_curves, draw_training
from llmkd.files import read_json, write_text

BASELINE = "baseline"
STYLE = """
:root{color-scheme:light dark;--line:#d7d7dc;--dim:#6a6a72;--fill:#f4f4f6;--ink:#1b1b1f;--bg:#fff}
@media(prefers-color-scheme:dark){:root{--line:#3a3a42;--dim:#a0a0aa;--fill:#222228;--ink:#eee;--bg:#17171b}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--ink);
background:var(--bg);max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0 .3rem}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p.dim,figcaption,.dim{color:var(--dim);font-size:.9rem}figure{margin:0}
img{max-width:100%;height:auto;background:#fff;border:1px solid var(--line);border-radius:6px}
.pair{display:flex;flex-wrap:wrap;gap:1rem}.pair figure{flex:1 1 20rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600;background:var(--fill)}
table.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
table.facts td:first-child{width:11rem;color:var(--dim);white-space:nowrap}
details{margin:.6rem 0}summary{cursor:pointer}code{background:var(--fill);padding:.1em
.3em;border-radius:4px}
@media(max-width:36rem){body{font-size:15px}th,td{padding:.35rem .45rem}table.facts
td:first-child{width:7.5rem}}
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` and `curves.png` for a run folder or a parent of several; returns the
    page.
    """
    facts = read_json(folder / "run.json") or {}
    arms = facts.get("arms")
    folders = {n: folder / n for n in arms} if arms else {facts.get("name", "run"): folder}
    folders = {n: p for n, p in folders.items() if (p / "eval.json").is_file()}
    teacher = folder / "teacher" if (folder / "teacher" / "run.json").is_file() else None
    picture = draw_curves(folders, teacher)
    aside = folder / ".curves.png.part"
    aside.write_bytes(picture)
    aside.replace(folder / "curves.png")
    body = [
        _head(folder, folders),
        _table(compare(folders, BASELINE)),
        _curves(folders, teacher),
        _harness(read_json(folder / "eval.json") or {}),
        *(_arm(name, path) for name, path in folders.items()),
        *([_arm("teacher", teacher)] if teacher else []),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>llmkd: {_text(folder.name)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _head(folder: Path, folders: dict[str, Path]) -> str:
    facts = [read_json(path / "run.json") for path in folders.values()]
    if not facts:
        return f"<h1>{_text(folder.name)}</h1><p>No arm has finished yet.</p>"
    data = facts[0]["data"]
    minutes = sum(f["wall_seconds"] for f in facts) / 60
    peak = max(f["peak_memory_bytes"] for f in facts) / 2**30
    return (
        f"<h1>SALT: {_text(folder.name)}</h1>"
        f'<p class="dim">{_text(data["source"])} · {_count(data["train_tokens"])} training tokens '
        f"available, {_count(data['eval_tokens'])} held out · {minutes:.0f} minutes of training · "
        f"peak memory {peak:.1f} GiB · seed {facts[0]['seed']}</p>"
    )


def _count(number: int | None) -> str:
    if number is None:
        return "an unknown number of"
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.0f} K"


def _table(rows: list[ArmResult]) -> str:
    heads = "".join(f"<th>{_text(heading)}</th>" for heading, _ in HEADINGS)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_text(show(row))}</td>" for _, show in HEADINGS) + "</tr>"
        for row in rows
    )
    return (
        "<h2>Held-out text</h2>"
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
        '<p class="dim">Cross-entropy at temperature 1 and next-token accuracy on documents no '
        "model trained on. Tokens and FLOPs are what an arm needed to reach the baseline's final "
        "loss, as a share of what it spent: (a) the student alone, (b) with the teacher's forward "
        "passes, (c) with the teacher's training and the scoring of rows as well. One seed is one "
        "draw: differences smaller than the spread between seeds mean nothing.</p>"
    )


def _curves(folders: dict[str, Path], teacher: Path | None) -> str:
    # One picture a panel: side by side on a desk, one below the other on a phone.
    captions = ("Held-out loss against training tokens; dashed: the teacher leaves.", "Its end.")
    figures = (
        _figure(draw_curves(folders, teacher, (panel,)), caption)
        for panel, caption in zip(PANELS, captions, strict=True)
    )
    return f'<div class="pair">{"".join(figures)}</div>'


def _figure(picture: bytes, caption: str) -> str:
    data = base64.b64encode(picture).decode()
    return (
        f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _harness(scores: dict[str, Any]) -> str:
    """The harness results of `llmkd eval`, where there are any: the terminal's own table."""
    from rich.console import Console

    from llmkd.evaluation.harness_table import print_results, print_side_by_side

    results = scores.get("lm_eval")
    if not results:
        return ""
    console = Console(record=True, file=io.StringIO(), width=120)
    if results.get("side_by_side"):
        print_side_by_side(results["side_by_side"], console)
    elif results.get("tasks"):
        first = next(iter(results["tasks"].values()))
        print_results({"model": "", "lm_eval": first.get("lm_eval", ""), **results}, console)
    table = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    return f'<h2>Evaluation harness</h2><div class="wide">{table}</div>'


def _arm(name: str, folder: Path) -> str:
    facts = read_json(folder / "run.json") or {}
    rows = []
    for section in ("student", "teacher", "schedule", "data", "versions"):
        for key, value in (facts.get(section) or {}).items():
            rows.append((f"{section}: {key}", value))
    rows += [(key, facts[key]) for key in ("key", "git", "command", "wall_seconds") if key in facts]
    cells = "".join(f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in rows)
    training = draw_training(folder)
    picture = _figure(training, f"Training of {name}") if training else ""
    return (
        f"<details><summary>{_text(name)}: how it was made</summary>{picture}"
        f'<div class="wide"><table class="facts"><tbody>{cells}</tbody></table></div></details>'
    )
