"""Tables and plots of `irepo_votes.py`'s results: win rates at the same beta and at matched KL.

    python scripts/bench/irepo_votes_table.py DIR [--kl 1 2 4] [--plot win_kl.png]

At matched KL: each seed's beta sweep is interpolated to the KL; arms are paired by seed, with a
t interval (3 seeds: 2 degrees of freedom, so wide).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from llmkd.evaluation.policy import interpolate_at_kl
from llmkd.files import read_json

COMPARED = (
    ("irepo", "soft_dpo"),
    ("irepo", "ipo"),
    ("irepo", "trl_dpo"),
    ("soft_dpo", "trl_dpo"),
    ("irepo", "dpo_one_vote"),
    ("irepo", "robust_dpo"),
    ("irepo", "rebel"),
    ("irepo", "irepo_initial"),
    ("irepo", "irepo_weighted"),
    ("irepo", "best_of_4_sft"),
)
Sweep = dict[tuple[str, str, int], list[tuple[float, dict[str, Any]]]]


def read(folder: Path) -> Sweep:
    """(cell, arm, seed) -> its scores by beta, the last iteration's."""
    found: Sweep = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        run = read_json(path)
        key = (run["cell"], run["arm"], run["seed"])
        found[key].append((run["beta"], run["scores"][-1]))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


def at_kl(points: list[tuple[float, dict[str, Any]]], kl: float) -> float | None:
    """Win rate of one sweep at a KL; the start (KL 0, half) is a point of every sweep."""
    kls = [0.0, *(score["kl"] for _, score in points)]
    return interpolate_at_kl(kls, [0.5, *(score["win"] for _, score in points)], kl)


def interval(gaps: list[float]) -> str:
    """Mean and 95 % t interval over seeds."""
    mean = float(np.mean(gaps))
    if len(gaps) < 2:
        return f"{mean:+.3f} (1 seed)"
    half = stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f}, {mean + half:+.3f})"


def arms_table(sweep: Sweep, cell: str) -> None:
    """Win rate and KL by beta, mean over seeds."""
    arms = sorted({arm for c, arm, _ in sweep if c == cell})
    print(f"\n### {cell}\n\n| arm | " + "beta: win rate (KL, perplexity under start, distinct-2) |")
    print("|---|---|")
    for arm in arms:
        by_beta: dict[float, list[dict[str, Any]]] = defaultdict(list)
        for (c, a, _), points in sweep.items():
            if (c, a) == (cell, arm):
                for beta, score in points:
                    by_beta[beta].append(score)
        names = ("win", "kl", "perplexity_under_start", "distinct_2")
        cells = []
        for beta, scores in sorted(by_beta.items()):
            win, kl, ppl, two = (np.mean([s[n] for s in scores]) for n in names)
            cells.append(f"{beta:g}: **{win:.3f}** ({kl:.2f}, {ppl:.0f}, {two:.2f})")
        print(f"| {arm} | " + "; ".join(cells) + " |")


def matched_table(sweep: Sweep, cell: str, kls: list[float]) -> None:
    """Win rates at matched KL and paired differences."""
    seeds = sorted({seed for c, _, seed in sweep if c == cell})
    arms = sorted({arm for c, arm, _ in sweep if c == cell})
    print(f"\n{cell}, matched KL | " + " | ".join(f"{kl:g} nats" for kl in kls))
    found = {
        (arm, seed, kl): at_kl(sweep.get((cell, arm, seed), []), kl)
        for arm in arms
        for seed in seeds
        for kl in kls
    }
    for arm in arms:
        wins = [[w for s in seeds if (w := found[arm, s, kl]) is not None] for kl in kls]
        shown = [f"{np.mean(one):.3f} (n={len(one)})" if one else "-" for one in wins]
        print(f"{arm} | " + " | ".join(shown))
    for one, other in COMPARED:
        if one not in arms or other not in arms:
            continue
        shown = []
        for kl in kls:
            pairs = [(found[one, s, kl], found[other, s, kl]) for s in seeds]
            gaps = [a - b for a, b in pairs if a is not None and b is not None]
            shown.append(interval(gaps) if gaps else "-")
        print(f"{one} - {other} | " + " | ".join(shown))


def plot(sweep: Sweep, path: Path) -> None:
    """Win rate against KL, one panel a cell, every run a point, lines through means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = list(dict.fromkeys(cell for cell, _, _ in sweep))
    arms = sorted({arm for _, arm, _ in sweep})
    figure, axes = plt.subplots(1, len(cells), figsize=(4.2 * len(cells), 3.8), squeeze=False)
    most = max(cells, key=lambda cell: len({arm for c, arm, _ in sweep if c == cell}))
    for axis, cell in zip(axes[0], cells, strict=True):
        for color, arm in enumerate(arms):
            runs = [points for (c, a, _), points in sweep.items() if (c, a) == (cell, arm)]
            if not runs:
                continue
            kls = np.array([[s["kl"] for _, s in points] for points in runs])
            wins = np.array([[s["win"] for _, s in points] for points in runs])
            order = np.argsort(kls.mean(0))
            axis.plot(kls.mean(0)[order], wins.mean(0)[order], color=f"C{color}", label=arm)
            axis.plot(kls.ravel(), wins.ravel(), ".", ms=3, color=f"C{color}")
        axis.axhline(0.5, color="gray", lw=0.8)
        axis.set(title=cell, xlabel="KL to the start, nats a response", ylabel="gold win rate")
        axis.set_xlim(0, 5.5)  # one arm goes far beyond
        if cell == most:
            axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kl", nargs="+", type=float, default=[1.0, 2.0, 4.0])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    sweep = read(args.folder)
    for cell in dict.fromkeys(cell for cell, _, _ in sweep):
        arms_table(sweep, cell)
        matched_table(sweep, cell, args.kl)
    if args.plot:
        plot(sweep, args.plot)


if __name__ == "__main__":
    main()
