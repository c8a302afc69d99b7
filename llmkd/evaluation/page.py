"""The shell every report shares: one HTML file without scripts or network, for desk and phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr))}
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


def page(title: str, body: str) -> str:
    """A whole HTML page; `title` is plain text, `body` is HTML that was escaped already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def text(value: Any) -> str:
    """`value` as HTML shows it literally."""
    return html.escape(str(value))


def figure(picture: bytes, caption: str) -> str:
    """A PNG inside the page itself; the caption is also what a screen reader says."""
    data = base64.b64encode(picture).decode()
    return (
        f'<figure><img alt="{text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def table(heads: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table of plain values that scrolls sideways where the screen is narrow."""
    top = "".join(f"<th>{text(head)}</th>" for head in heads)
    lines = "".join("<tr>" + "".join(f"<td>{text(v)}</td>" for v in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def facts_table(rows: Iterable[Sequence[Any]]) -> str:
    """Two columns, name and value; long values wrap."""
    cells = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in rows)
    return f'<div class="wide"><table class="facts"><tbody>{cells}</tbody></table></div>'


def count(number: int | None) -> str:
    """A number of tokens in thousands or millions, in words where nobody knows it."""
    if number is None:
        return "an unknown number of"
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.0f} K"


def write_picture(path: Path, picture: bytes) -> None:
    """Replace `path` by the PNG at once: a crash leaves the old picture or the new one."""
    aside = path.with_name(f".{path.stem}.png.part")
    aside.write_bytes(picture)
    aside.replace(path)
