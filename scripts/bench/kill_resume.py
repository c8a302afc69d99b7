"""`kill -9` at random moments, then the same command again: are the final weights bitwise the same?

    python scripts/bench/kill_resume.py [--times 10] [--folder /tmp/kill]

One small SALT run (fp32, one process) is made without interruption, then once more for every kill:
the process group is killed after a random share of the whole run's time (start-up, training and
saving included), and the run goes on with `llmkd resume`, or `llmkd salt` where the kill came
before the recipe was written down.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from llmkd.trainers.checkpoints import checkpoints, last_whole_checkpoint

LLAMA = {"model_type": "llama", "num_attention_heads": 2, "max_position_embeddings": 64}
LLAMA |= {"tie_word_embeddings": True}
RECIPE = {
    "dataset": "stdlib",
    "max_train_documents": 40,
    "tokenizer_vocab_size": 512,
    "max_length": 64,
    "max_eval_rows": 16,
    "teacher_model_config": {
        **LLAMA,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
    },
    "model_config": {**LLAMA, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128},
    "kd_ratio": 0.5,
    "teacher_temperature": 1.0,
    "max_steps": 240,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.003,
    "eval_strategy": "steps",
    "eval_steps": 60,
    "logging_steps": 20,
    "save_steps": 20,
    "save_total_limit": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def start(*words: str) -> subprocess.Popen:
    """`llmkd ...` in a process group of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-m", "llmkd.cli", *words], env=env, start_new_session=True, **quiet
    )


def finish(*words: str) -> float:
    """Seconds of a command that must end well."""
    began = time.monotonic()
    if start(*words).wait() != 0:
        raise SystemExit(f"llmkd {' '.join(words)} failed")
    return time.monotonic() - began


def same(one: Path, other: Path) -> bool:
    """Whether two model files hold the same tensors, bit for bit."""
    here, there = load_file(one), load_file(other)
    return here.keys() == there.keys() and all(torch.equal(v, there[k]) for k, v in here.items())


def main() -> None:
    """Print one line a kill and the count of equal results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llmkd-kill"))
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    recipe = args.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    whole = args.folder / "whole"
    finish("salt", str(recipe), "--output_dir", str(whole))  # fills the cache of packed rows
    shutil.rmtree(whole)
    seconds = finish("salt", str(recipe), "--output_dir", str(whole))
    dice, equal = random.Random(0), 0
    for turn in range(args.times):
        run = args.folder / f"killed-{turn}"
        after = dice.uniform(0.2, 0.98) * seconds
        process = start("salt", str(recipe), "--output_dir", str(run))
        time.sleep(after)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = [p.name for p in (*checkpoints(run / "teacher"), *checkpoints(run))]
        whole_one = last_whole_checkpoint(run)
        if (run / "recipe.yaml").is_file():
            finish("resume", str(run))
        else:
            finish("salt", str(recipe), "--output_dir", str(run))
        good = same(run / "model.safetensors", whole / "model.safetensors")
        equal += good
        last = whole_one.name if whole_one else "none"
        print(
            f"killed after {after:5.1f} s ({len(found)} checkpoints, goes on from {last}): "
            f"{'bitwise equal' if good else 'DIFFERENT'}",
            flush=True,
        )
    print(f"{equal} of {args.times} equal")


if __name__ == "__main__":
    main()
