"""`llmkd label` against the bare forward of its teacher, on the same rows, rounds interleaved.

    python scripts/bench/label_throughput.py RECIPE.yaml [--key value ...] [--rows 32] [--rounds 3]

The bare forward collates, runs the model and makes its logits, as a loop without llmkd would; the
other side also encodes, packs, hashes and writes shards to a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from llmkd.data.collator import for_the_model
from llmkd.labels import StoreWriter
from llmkd.methods.label_job import LabelJob
from llmkd.methods.label_run import write_store
from llmkd.methods.recipe import read_recipe
from llmkd.methods.salt_config import TYPES, with_absolute_paths


def main() -> None:
    """Print seconds of both and their ratio, round by round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args, words = parser.parse_known_args()
    words += ["--label_store", tempfile.mkdtemp(prefix="llmkd-")]
    job = LabelJob(with_absolute_paths(read_recipe(words, TYPES)))
    teacher, encoding = job.find_teacher()
    job.load(teacher)
    plan = job.store_plan(teacher, encoding)
    plan = replace(plan, rows=plan.rows[: args.rows])
    labeller = job.labeller(teacher, encoding)
    rows = cast(Any, job.rows)
    tokens = sum(len(rows[int(n)]["input_ids"]) for n in plan.rows)

    def bare() -> None:
        for part in np.array_split(plan.rows, -(-len(plan.rows) // labeller.batch_size)):
            batch = for_the_model(labeller.batch([rows[int(n)] for n in part]))
            with teacher._accelerator.autocast():
                cast(Any, teacher.model)(**batch, use_cache=False).logits.float()

    def label() -> None:
        folder = Path(tempfile.mkdtemp(prefix="llmkd-")) / "store"
        with StoreWriter(folder, plan) as writer:
            write_store(writer, labeller, rows, [rows[int(plan.rows[0])]])
            writer.finish()

    ratios = []
    with torch.no_grad():
        bare()
        for _ in range(args.rounds):
            seconds = []
            for work in (bare, label):
                began = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[0] / seconds[1])
            print(
                f"bare forward {tokens / seconds[0]:.0f} tokens/s, "
                f"label {tokens / seconds[1]:.0f}, "
                f"ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(f"{encoding.name}: median {statistics.median(ratios):.3f} of the bare forward")


if __name__ == "__main__":
    sys.exit(main())
