"""Time and extra memory of the loss head: rivals, ours, and the matrix products nobody can avoid.

    python scripts/bench/kd_head.py [--threads 2] [--repeats 15] [--json FILE] [--plot FILE]

fp32, forward KL, one position in ten masked, mean over the others; a step makes the loss and the
gradients of the student's hidden states and head. All contestants get the same numbers. Times:
one process, rounds interleaved in rotating order, so that a busy machine slows all of them.
Memory: a process of its own for each, highest resident size during a step above that before it.
Errors: relative (Frobenius norm) to the same loss in float64, row by row, without llmkd's code.
The floor's buffers are allocated beforehand, everybody else's gradients are new at each step; "x
floor" is over four products with a live teacher and over three, without its forward, elsewhere.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heads import CONTESTANTS, MORE, SIZES, SMALL, TINY, Size, build, truth

FLOOR, FLOOR_CACHED = "floor: 4 products", "floor: 3 products"
LIGER, TRL = "Liger compiled", "TRL chunked"
OURS, CE = "ours, live teacher", "ours, CE alone"
SPARSE = ("ours, cached top 64", "ours, cached 50 draws")
Results = dict[str, dict[str, Any]]  # contestant -> seconds, mib, errors


def status_mib(key: str) -> float:
    """A line of /proc/self/status in MiB: VmRSS, or VmHWM, its highest value since the reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this needs Linux")


def extra_mib(step: Callable[[], object]) -> float:
    """Peak resident MiB during a step above the resident size before it.

    The kernel's own high-water mark, reset first, and a thread that looks every millisecond for
    kernels where the reset is not allowed.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed must not hide this one's
    highest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, status_mib("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = status_mib("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
        reset = status_mib("VmHWM") <= before + 8
    except OSError:
        reset = False
    step()
    peak = status_mib("VmHWM") if reset else 0.0
    done.set()
    watcher.join()
    return max(peak, highest) - before


def memory_of(name: str, size: Size) -> float:
    """Extra MiB of a step, in this process, which must be fresh. The larger of two steps.

    Libraries are warmed up on tiny tensors; compiled code depends on the shape, so there the
    warm-up is the step itself and what it leaves behind is not counted.
    """
    contestant = {**CONTESTANTS, **MORE}[name]
    if not contestant.full_warm_up:
        build(contestant, TINY)[1]()
    case, step = build(contestant, size)
    if contestant.full_warm_up:
        step()
        step()

    def measured() -> float:
        case.student.grad = case.heads()[0].grad = None
        return extra_mib(step)

    return max(measured(), measured())


def memory_in_child(name: str, size: Size, threads: int) -> float | None:
    """`memory_of` in a process of its own; None, with its last words printed, where it fails."""
    words = [str(n) for n in (size.tokens, size.vocab, size.student, size.teacher)]
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", name, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return float(done.stdout.strip().splitlines()[-1])


def times_and_errors(names: list[str], size: Size, repeats: int) -> Results:
    """Seconds of every round and the errors of the last, for each contestant that runs here."""
    # Liger's compiled chunk must not be recompiled with the first size still in the cache.
    torch._dynamo.reset()
    all_of_them, results, steps, truths = {**CONTESTANTS, **MORE}, {}, {}, {}
    for name in names:
        contestant = all_of_them[name]
        try:
            case, step = build(contestant, size)
            step()
            loss = step()
        except Exception as error:  # a rival may be absent or break; the others go on
            print(f"{name} left out: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        results[name], steps[name] = {"seconds": []}, step
        if loss is not None:
            if contestant.label not in truths:
                truths[contestant.label] = truth(size, contestant.label)
            results[name]["errors"] = truths[contestant.label].errors(loss, case)
        case.student.grad = case.heads()[0].grad = None
    truths.clear()
    order = list(steps)
    for _ in range(repeats):
        for name in order:
            gc.collect()
            began = time.perf_counter()
            steps[name]()
            results[name]["seconds"].append(time.perf_counter() - began)
        order = [*order[1:], order[0]]
    return results


def ratio(results: Results, name: str, other: str) -> str:
    """Time of `name` over that of `other` by the minima, "-" where one is missing."""
    if name not in results or other not in results:
        return "-"
    return f"{min(results[name]['seconds']) / min(results[other]['seconds']):.2f}"


def markdown(results: Results) -> str:
    """The table of one size."""
    lines = [
        "| | ms min | ms median | x floor | x Liger compiled | x TRL chunked | extra MiB |"
        " err loss | err dh | err dW |",
        "|---|" + "---:|" * 9,
    ]
    for name, row in results.items():
        seconds, mib, wrong = row["seconds"], row.get("mib"), row.get("errors", {})
        cells = [f"{f(seconds) * 1000:.1f}" for f in (min, statistics.median)]
        least = FLOOR_CACHED if name in (FLOOR_CACHED, CE, *SPARSE) else FLOOR
        cells += [ratio(results, name, other) for other in (least, LIGER, TRL)]
        cells += ["-" if mib is None else f"{mib:.0f}"]
        cells += [f"{wrong[key]:.0e}" if key in wrong else "-" for key in ("loss", "dh", "dW")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(results: Results) -> str:
    """Our aims and whether this run meets them; times by minima and by the median of rounds."""

    def line(what: str, name: str, other: str, limit: float, key: str) -> str:
        if name not in results or other not in results:
            return f"- {what}: not run"
        a, b = results[name].get(key), results[other].get(key)
        if not a or not b:
            return f"- {what}: not measured"
        if key == "mib":
            value, also = a / b, ""
        else:
            value = min(a) / min(b)
            paired = statistics.median(x / y for x, y in zip(a, b, strict=True))
            also = f" (median of rounds {paired:.3f})"
        return f"- {what}: {value:.3f}{also}, {'met' if value <= limit else 'NOT met'}"

    lines = [
        line("time / floor, at most 1.15", OURS, FLOOR, 1.15, "seconds"),
        line("time / Liger compiled, at most 1", OURS, LIGER, 1.0, "seconds"),
        line("memory / TRL chunked, at most 0.5", OURS, TRL, 0.5, "mib"),
    ]
    for name in SPARSE:
        lines.append(line(f"{name}: time / CE alone, at most 1.10", name, CE, 1.1, "seconds"))
        lines.append(line(f"{name}: memory / CE alone, at most 1.10", name, CE, 1.1, "mib"))
    own = [row["errors"] for name, row in results.items() if name.startswith("ours")]
    worst = max((value for row in own for value in row.values()), default=float("nan"))
    lines.append(f"- largest error of ours, at most 2e-06: {worst:.1e}")
    return "\n".join(lines)


def plot(everything: dict[str, Results], path: Path) -> None:
    """Bars of time (minimum) over the floor's and of extra memory, a row of panels a size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(everything), 2, figsize=(11, 3.6 * len(everything)), squeeze=False
    )
    for (title, results), (left, right) in zip(everything.items(), panels, strict=True):
        names = [name for name in results if name not in (FLOOR, FLOOR_CACHED)][::-1]
        colours = ["#c44e52" if name.startswith("ours") else "#8c8c8c" for name in names]
        bars = left.barh(names, [min(results[n]["seconds"]) * 1000 for n in names], color=colours)
        left.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        if FLOOR in results:
            least = min(results[FLOOR]["seconds"]) * 1000
            left.axvline(least, color="black", linestyle="--", linewidth=1)
            left.annotate(" floor", (least, len(names) - 0.45), fontsize=8, va="bottom")
        bars = right.barh(names, [results[n].get("mib") or 0 for n in names], color=colours)
        right.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        right.set_yticklabels([])
        left.set_title(f"{title}\nms a step (least of all rounds)", fontsize=9)
        right.set_title("extra peak memory, MiB", fontsize=9)
        for panel in (left, right):
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print a table and the aims for each size, write JSON and plot where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--skip", type=int, default=0, help="sizes to leave out, from the first")
    parser.add_argument("--also", action="store_true", help=f"and {', '.join(MORE)}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contestants")
    parser.add_argument("--distillkit", metavar="PATH", help="a checkout of arcee-ai/DistillKit")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--plot", metavar="FILE", type=Path)
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if args.distillkit:  # by the environment, so that the processes for memory find it too
        os.environ["PYTHONPATH"] = f"{args.distillkit}:{os.environ.get('PYTHONPATH', '')}"
        sys.path.insert(0, args.distillkit)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        name, *numbers = args.memory_of
        print(memory_of(name, Size(*map(int, numbers))))
        return
    names = args.only or [*CONTESTANTS, *(MORE if args.also else ())]
    everything: dict[str, Results] = {}
    real = [name for name in names if name not in (FLOOR, FLOOR_CACHED)]
    for size in (SMALL if args.small else SIZES)[args.skip :]:
        mib = {name: memory_in_child(name, size, args.threads) for name in real}
        results = times_and_errors(names, size, args.repeats)
        for name, row in results.items():
            row["mib"] = mib.get(name)
        everything[str(size)] = results
        print(f"\n{size}, {args.threads} threads, torch {torch.__version__}\n")
        print(f"{markdown(results)}\n\n{goals(results)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    if args.plot:
        plot(everything, args.plot)


if __name__ == "__main__":
    main()
