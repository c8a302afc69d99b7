"""Arms of several `llmkd ernie-tiny` runs (one a seed) side by side, with paired differences.

    PYTHONPATH=. python scripts/bench/ernie_table.py runs/s0 runs/s1 runs/s2 \
        --pairs gd_ged_ft:gd_gd_ft all:gd_gd_tad_tsd

Reads each arm's `predictions.npz` (outputs [N, C] logits, labels [N]), so the runs must be scored
on the same rows. A difference is in points of accuracy; its interval (95 %) is a paired bootstrap
over examples and seeds (`llmkd.evaluation.paired`). A stage adds where the interval is above 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from llmkd.evaluation.paired import paired_difference
from llmkd.files import read_json


def hits(folder: Path) -> np.ndarray:
    """1 where a run's argmax is right, [N]."""
    found = np.load(folder / "predictions.npz")
    return (found["outputs"].argmax(-1) == found["labels"]).astype(float)


def means(runs: list[Path], arm: str) -> list[float]:
    """Accuracy of an arm in each run, in points; nan where the run has no such arm."""
    known = [run / arm / "predictions.npz" for run in runs]
    return [100 * hits(path.parent).mean() if path.is_file() else float("nan") for path in known]


def table(runs: list[Path]) -> list[str]:
    """A Markdown row for each arm: stages, each seed, mean, spread, retention."""
    teacher = means(runs, "teacher")
    seeds = " | ".join(f"seed {read_json(run / 'run.json')['seed']}" for run in runs)
    lines = [f"| arm | stages | {seeds} | mean | sd | retention |", "|---" * (5 + len(runs)) + "|"]
    arms = list(dict.fromkeys(arm for run in runs for arm in read_json(run / "run.json")["arms"]))
    for arm in ("teacher", *arms):
        scores = means(runs, arm)
        facts = next((read_json(r / arm / "run.json") for r in runs if (r / arm).is_dir()), {})
        stages = " ".join(stage["name"] for stage in facts.get("stages", []))
        cells = " | ".join(f"{score:.2f}" for score in scores)
        spread = f"{np.nanstd(scores, ddof=1):.2f}" if len(runs) > 1 else "-"
        kept = np.nanmean(np.asarray(scores) / np.asarray(teacher))
        mean = np.nanmean(scores)
        lines.append(f"| {arm} | {stages} | {cells} | {mean:.2f} | {spread} | {kept:.1%} |")
    return lines


def differences(runs: list[Path], pairs: list[str]) -> list[str]:
    """A Markdown row for each pair `arm:control`."""
    lines = [
        "| arm minus control | difference | 95 % interval | by seed | adds |",
        "|---" * 5 + "|",
    ]
    for pair in pairs:
        arm, control = pair.split(":")
        both = [
            r for r in runs if all((r / n / "predictions.npz").is_file() for n in (arm, control))
        ]
        if not both:
            continue
        found = paired_difference([hits(r / arm) for r in both], [hits(r / control) for r in both])
        each = ", ".join(f"{100 * value:+.2f}" for value in found.per_seed)
        interval = f"({100 * found.low:+.2f}, {100 * found.high:+.2f})"
        answer = "yes" if found.adds else "hurts" if found.high < 0 else "no"
        lines.append(
            f"| {arm} - {control} | {100 * found.mean:+.2f} | {interval} | {each} | {answer} |"
        )
    return lines


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with the same arms")
    parser.add_argument("--pairs", nargs="*", default=[], help="arm:control, ...")
    args = parser.parse_args()
    print("\n".join([*table(args.runs), "", *differences(args.runs, args.pairs)]))


if __name__ == "__main__":
    main()
