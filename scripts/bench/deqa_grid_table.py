"""Tables of `deqa_grid.py`: means over seeds, paired bootstrap over test rows and seeds.

python scripts/bench/deqa_grid_table.py OUT [EVERY]

EVERY is the runs' --every_test_row.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from deqa_grid import ASKED, TEXTS, TUNING, read_rows

from llmkd.evaluation.score_metrics import Scored
from llmkd.evaluation.score_report import find_score_metric as metric
from llmkd.evaluation.score_report import measured, paired_scores
from llmkd.methods.deqa_targets import people

VALUES = np.array(ASKED.level_values, dtype=np.float64)
SHOWN = ("plcc", "srcc", "mae", "std_plcc", "kl")
Key = tuple[str, str, int, str]


def runs(out: Path) -> dict[Key, list[dict[str, Any]]]:
    """Finished test runs by set, arm, raters and pairs, in the order of seeds."""
    found = defaultdict(list)
    for path in sorted((out / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        job = run["job"]
        if job["seed"] != TUNING:
            found[job["data"], job["arm"], job["raters"], job["pairs"]].append(run)
    return {key: sorted(some, key=lambda run: run["job"]["seed"]) for key, some in found.items()}


def said(run: dict[str, Any], keep: slice) -> Scored:
    """What one run says of (a part of) the test rows."""
    table = run["held_out"]
    std, probs = (table[name][keep] if name in table else None for name in ("std", "probs"))
    return Scored.of(table["mean"][keep], std, probs)


def table(title: str, arms: dict[str, list[Scored]], human: Scored, against: list[str]) -> None:
    """One row an arm: its metrics, then differences of PLCC and std_plcc from reference arms."""
    print(f"\n{title}\n")
    heads = [f"PLCC - {name}" for name in against] + [f"std corr - {name}" for name in against]
    print("| arm | seeds | " + " | ".join([*SHOWN, *heads]) + " |")
    print("|" + "---|" * (2 + len(SHOWN) + len(heads)))
    for name, seeds in arms.items():
        cells = [name, str(len(seeds))]
        for one in SHOWN:
            values = [measured(metric(one), s, human, VALUES, draws=0).value for s in seeds]
            known = [value for value in values if value is not None]
            cells.append(f"{np.mean(known):.3f}" if len(known) == len(values) else "")
        for one in ("plcc", "std_plcc"):
            cells += [versus(one, seeds, arms.get(other), human) for other in against]
        print("| " + " | ".join(cells) + " |")


def versus(name: str, mine: list[Scored], other: list[Scored] | None, human: Scored) -> str:
    """Paired difference over the seeds both have, with its 95 % interval."""
    if other is None or other is mine:
        return ""
    if name == "std_plcc" and (mine[0].std_N is None or other[0].std_N is None):
        return ""
    count = min(len(mine), len(other))
    gap = paired_scores(name, mine[:count], other[:count], human, VALUES)
    return f"{gap.mean:+.3f} ({gap.low:+.3f}, {gap.high:+.3f})"


def main() -> None:
    out, every = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    found = runs(out)
    humans = {}
    for data in TEXTS:
        rows = read_rows(out, data).held_out[::every]
        humans[data] = Scored.of([row["mean"] for row in rows], *people(rows, VALUES.tolist()))
    places = {"tweets": slice(0, len(humans["tweets"].mean_N))}
    places["mlqe"] = slice(len(humans["tweets"].mean_N), None)
    for data, raters in sorted({(key[0], key[2]) for key in found if key[0] != "mix"}):
        arms = {
            key[1]: [said(run, slice(None)) for run in some]
            for key, some in found.items()
            if (key[0], key[2]) == (data, raters)
        }
        title = f"### {data}, {raters} raters a training row"
        table(title, arms, humans[data], ["onehot_bin", "onehot_round", "pooled_sigma"])
    for data, human in humans.items():
        arms = {
            f"{key[1]}, {key[3]}": [said(run, places[data]) for run in some]
            for key, some in found.items()
            if key[0] == "mix"
        }
        if arms:
            table(
                f"### mix, measured on {data}",
                arms,
                human,
                ["gauss_deqa, none", "onehot_bin, none"],
            )
    seconds = sum(run["cpu_seconds"] for some in found.values() for run in some)
    print(f"\n{sum(map(len, found.values()))} test runs, {seconds / 60:.0f} minutes of CPU time")


if __name__ == "__main__":
    main()
