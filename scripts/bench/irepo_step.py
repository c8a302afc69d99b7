"""One training step on pairs: IrepoTrainer against TRL's DPOTrainer with precomputed references.

    python scripts/bench/irepo_step.py --model FOLDER [--rounds 3] [--steps 8] [--bf16]

Everybody gets the same model, pairs (token ids), order, batch, AdamW, clipping and dtype, without
gradient checkpointing; references are computed before the clock starts. One contestant runs in one
process (peak memory), contestants take turns (a busy machine slows all of them). Time is the median
over all steps after the first, by the clock and, on a processor, in CPU seconds of the process,
which other processes disturb less; memory is the peak during those steps above what the process
held before the model was loaded. Without --model a new model of SmolLM2-135M's shape is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

CONTESTANTS = ("trl dpo", "llmkd dpo", "llmkd irepo")
BETA = 0.1


class Watch(TrainerCallback):
    """Seconds between the ends of steps; the peak of memory from the first one on."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time, and after the first step forget what was needed before."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))
        if len(self.ends) == 1:
            reset_peak()


def reset_peak() -> None:
    """From here on `peak_mib` counts anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most memory held since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def pairs(count: int, vocab: int, prompt: int, completion: int) -> list[dict[str, Any]]:
    """Random ids; prompts and completions from half to the whole of the given lengths."""
    make = np.random.default_rng(0)

    def ids(longest: int) -> list[int]:
        return make.integers(3, vocab, make.integers(longest // 2, longest + 1)).tolist()

    return [
        {"prompt_ids": ids(prompt), "one": ids(completion), "two": ids(completion)}
        for _ in range(count)
    ]


def new_model(folder: str | None, dtype: torch.dtype) -> Any:
    """The policy everybody starts from."""
    torch.manual_seed(0)
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(shape).to(dtype)


def with_lora(model: Any) -> Any:
    """An adapter on the attention's projections."""
    from peft import LoraConfig, get_peft_model

    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=modules))


def trainer_of(name: str, model: Any, rows: list[dict[str, Any]], shared: dict[str, Any]) -> Any:
    """A contestant, ready to train."""
    if name == "trl dpo":
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        class Ready(DPOTrainer):
            """The pairs are token ids already."""

            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

        from tokenizers import Tokenizer, models

        vocabulary = {"<end>": 0, "<unk>": 1}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<end>", eos_token="<end>"
        )
        names = {"prompt_ids": "prompt_ids", "one": "chosen_ids", "two": "rejected_ids"}
        made = Dataset.from_list([{names[k]: row[k] for k in names} for row in rows])
        args = DPOConfig(beta=BETA, precompute_ref_log_probs=True, max_length=None, **shared)
        return Ready(model, args=args, train_dataset=made, processing_class=tokenizer)
    from llmkd import IrepoConfig, IrepoTrainer

    names = {"prompt_ids": "prompt_ids", "one": "ids_1", "two": "ids_2"}
    logits = np.random.default_rng(1).normal(size=len(rows))
    made = [
        {**{names[k]: row[k] for k in names}, "pref_logit": abs(logit) if "dpo" in name else logit}
        for row, logit in zip(rows, logits, strict=True)
    ]
    args = IrepoConfig(beta=BETA, loss=name.split()[1], **shared)
    return IrepoTrainer(model, args, train_dataset=Dataset.from_list(made))


def one(options: argparse.Namespace) -> None:
    """A contestant in this process; prints JSON."""
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    reset_peak()
    before = peak_mib()
    model = new_model(options.model, dtype)
    rows = pairs(
        options.steps * options.batch, model.config.vocab_size, options.prompt, options.completion
    )
    if options.lora:
        model = with_lora(model)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "output_dir": folder, "max_steps": options.steps, "learning_rate": 1e-6,
            "per_device_train_batch_size": options.batch, "optim": "adamw_torch_fused",
            "gradient_checkpointing": False, "bf16": False, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
            "use_cpu": not torch.cuda.is_available(), "train_sampling_strategy": "sequential",
        }  # fmt: skip
        trainer = trainer_of(options.one, model, rows, shared)
        trainer.add_callback(watch)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    seconds, busy = np.diff(watch.ends, axis=0).T.tolist()
    found = {"seconds": seconds, "busy": busy, "mib": peak_mib() - before, "losses": losses}
    print("RESULT " + json.dumps(found))


def turn(name: str, options: argparse.Namespace, lora: bool) -> dict[str, Any]:
    """One contestant's round in a process of its own."""
    command = [sys.executable, __file__, "--one", name, *sys.argv[1:]]
    command += ["--lora"] if lora else []
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def compare(options: argparse.Namespace, lora: bool) -> None:
    """All rounds of full fine-tuning or of LoRA; prints Markdown rows."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.rounds):
        for name in CONTESTANTS:
            found[name].append(turn(name, options, lora))
    gap = max(
        abs(one - other)
        for one, other in zip(
            found["trl dpo"][0]["losses"], found["llmkd dpo"][0]["losses"], strict=True
        )
    )
    medians = {
        name: (
            *(
                statistics.median(s for each in rounds for s in each[clock])
                for clock in ("seconds", "busy")
            ),
            max(each["mib"] for each in rounds),
        )
        for name, rounds in found.items()
    }
    seconds, busy, mib = medians["trl dpo"]
    for name, (own, own_busy, peak) in medians.items():
        kind = "LoRA" if lora else "full"
        print(
            f"| {kind} | {name} | {1000 * own:.0f} | {seconds / own:.2f} x "
            f"| {1000 * own_busy:.0f} | {busy / own_busy:.2f} x "
            f"| {peak:.0f} | {peak / mib:.2f} x |",
            flush=True,
        )
    print(f"largest difference of the dpo losses: {gap:.1e}", flush=True)


def main() -> None:
    """Full fine-tuning and LoRA, every contestant in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a causal LM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--prompt", type=int, default=96, help="tokens of the longest prompt")
    parser.add_argument("--completion", type=int, default=128, help="of the longest completion")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16")
    parser.add_argument("--only", choices=("full", "lora"))
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    print("| weights | trainer | ms a step | speed | CPU ms | speed | peak MiB | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ("full", "lora"):
        if options.only in (None, kind):
            compare(options, kind == "lora")


if __name__ == "__main__":
    main()
