"""Scoring against `generate` and a whole forward; a training step against plain SFT (TRL).

    OMP_NUM_THREADS=1 python scripts/bench/deqa_speed.py MODEL DATA.jsonl

DATA has `text` and `ratings` (-4 to 4). Each variant runs in a process of its own, on the same rows
and batches; variants take turns. CPU seconds of the process are compared (wall time on a shared
machine is noise); memory is the peak above what stood after loading.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from deqa_rivals import LORA

SCORING = (
    "ours",
    "ours, no prefix cache",
    "whole forward",
    "last logits",
    "generate 1",
    "generate answer",
)
# TRL's head reads the answer's positions alone where Triton runs, all positions on a CPU; "answer's
# positions" asks it for the former here.
TRAINING = (
    "score_trainer",
    "score_trainer, no pairs",
    "trainer_hf",
    "sft_trl, answer's positions",
    "sft_trl",
)
ROWS, BATCH, STEPS, WARM = 96, 16, 5, 1
SMALL = 8  # rows of a training step

COMMON: dict[str, Any] = {
    "output_dir": "/tmp/deqa-speed",
    "per_device_train_batch_size": SMALL,
    "max_steps": STEPS,
    "learning_rate": 1e-4,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 4,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def world(model: str, data: str) -> Any:
    """Model, tokenizer, levels, encoder, rated rows."""
    from transformers import AutoTokenizer

    from llmkd.data.levels import LevelConfig
    from llmkd.data.score_config import ScoreDataConfig
    from llmkd.data.score_rows import load_score_rows
    from llmkd.data.score_tokens import ScoreEncoder, ScorePrompt
    from llmkd.teachers.loading import load_model

    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = LevelConfig(questions=["How positive is this text?"], answer_prefix="The sentiment is")
    levels = asked.find(tokenizer)
    config = ScoreDataConfig(
        score_dataset=data, ratings_column="ratings", score_low=-4, score_high=4
    )
    rows = load_score_rows(config, lambda _: None, values=levels.values_L).train[: 4 * ROWS]
    encoder = ScoreEncoder(tokenizer, levels, ScorePrompt.of(asked), 256)
    return load_model(model).eval(), tokenizer, levels, encoder, rows


def scoring(variant: str, made: Any) -> dict[str, Any]:
    """CPU seconds a row, and what was said."""
    import torch

    from llmkd.models.scorer import Scorer

    model, tokenizer, levels, encoder, rows = made
    rows = rows[:ROWS]
    ids_L, values_L = list(levels.ids_L), np.array(levels.values_L)
    start, before = time.process_time(), peak_mib()
    if variant.startswith("ours"):
        scorer = Scorer(
            model,
            levels,
            processor=tokenizer,
            prompt=encoder.prompt,
            prefix_cache="no" not in variant,
            batch_size=BATCH,
        )
        said_N = scorer.score(rows).mean_N
    else:
        tokenizer.padding_side = "left"
        prompts = [encoder.prompted(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda place: -len(prompts[place].ids))
        said_N = np.zeros(len(rows))
        for first in range(0, len(rows), BATCH):
            some = order[first : first + BATCH]
            ids = [{"input_ids": prompts[place].ids} for place in some]
            if variant == "generate answer":
                ids = [{"input_ids": one["input_ids"][: -len(encoder.prefix)]} for one in ids]
            batch = tokenizer.pad(ids, return_tensors="pt")
            with torch.no_grad():
                if variant in ("whole forward", "last logits"):
                    less = {"logits_to_keep": 1} if variant == "last logits" else {}
                    logits_BL = model(**batch, **less).logits[:, -1, ids_L].double()
                    said_N[some] = (logits_BL.softmax(-1).numpy() * values_L).sum(-1)
                else:
                    count = 1 if variant == "generate 1" else len(encoder.prefix) + 2
                    model.generate(
                        **batch, do_sample=False, max_new_tokens=count, min_new_tokens=count
                    )
    seconds = time.process_time() - start
    return {"seconds": seconds / ROWS, "memory": peak_mib() - before, "said": said_N.tolist()}


def training(variant: str, made: Any) -> dict[str, Any]:
    """CPU seconds a step, the first ones left out."""
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback

    from llmkd.data.score_tokens import tokenize_scores
    from llmkd.labels.score import SCORE_BUILDERS
    from llmkd.trainers import ScoreConfig, ScoreTrainer

    model, tokenizer, levels, encoder, rows = made
    gauss = SCORE_BUILDERS["gauss_tilt"].function

    def target(some: Any) -> Any:
        columns = [[row[name] for row in some] for name in ("mean", "std")]
        return gauss(*columns, levels.values_L).probs_NL

    ready: Any = tokenize_scores(rows[: SMALL * STEPS], encoder, target).rows
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **keys: Any) -> None:
            marks.append(time.process_time())

    peft = LoraConfig(r=16, lora_alpha=32, target_modules=LORA)
    torch.manual_seed(0)
    before = peak_mib()
    if not variant.startswith("score_trainer"):
        trainer: Any = plain_trainer(variant, model, tokenizer, ready, peft)
    else:
        weight = 0.0 if "no pairs" in variant else 1.0
        trainer = ScoreTrainer(
            model,
            ScoreConfig(**COMMON, fidelity_weight=weight),
            levels=levels,
            peft_config=peft,
            train_dataset=ready,
            processing_class=tokenizer,
        )
    trainer.add_callback(Clock())
    trainer.train()
    seconds = (marks[-1] - marks[WARM - 1]) / (len(marks) - WARM)
    return {"seconds": seconds, "memory": peak_mib() - before}


def plain_trainer(variant: str, model: Any, tokenizer: Any, ready: Any, peft: Any) -> Any:
    """Cross-entropy of the answer by TRL's trainer or transformers', which makes all logits."""
    import trl.trainer.utils
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    rows = {"input_ids": ready["input_ids"]}
    if variant == "trainer_hf":
        return Trainer(
            get_peft_model(model, peft),
            TrainingArguments(**COMMON),
            train_dataset=Dataset.from_dict({**rows, "labels": ready["labels"]}),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
    if variant != "sft_trl":
        trl.trainer.utils._use_triton = lambda device: True  # picks rows here, not kernels
    rows["completion_mask"] = [[int(one != -100) for one in row["labels"]] for row in ready]
    config = SFTConfig(**COMMON, gradient_checkpointing=False, completion_only_loss=True)
    return SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=peft,
    )


def compare(args: argparse.Namespace, kind: str, variants: tuple[str, ...]) -> None:
    """Run all variants in turn and print medians, ranges and ratios to the last one."""
    found: dict[str, list[Any]] = {name: [] for name in variants}
    for _ in range(args.repeats):
        for name in variants:
            words = [sys.executable, __file__, args.model, args.data, "--one", f"{kind}:{name}"]
            said = subprocess.run(words, capture_output=True, text=True)
            if said.returncode:
                sys.exit(said.stderr[-2000:])
            found[name].append(json.loads(said.stdout.strip().splitlines()[-1]))
    base = np.median([one["seconds"] for one in found[variants[-1]]])
    unit = "row" if kind == "scoring" else "step"
    print(f"\n| {kind} | CPU ms a {unit} (range) | times as fast as {variants[-1]} | peak MiB |")
    print("|---|---|---|---|")
    for name, runs in found.items():
        times = 1000 * np.array([one["seconds"] for one in runs])
        memory = np.median([one["memory"] for one in runs])
        middle, low, high = np.median(times), times.min(), times.max()
        speed = 1000 * base / middle
        print(f"| {name} | {middle:.0f} ({low:.0f}, {high:.0f}) | {speed:.2f} | {memory:.0f} |")
    if kind == "scoring":
        ours, plain = (np.array(found[name][0]["said"]) for name in (variants[0], variants[2]))
        print(f"\nlargest difference of scores to the whole forward: {abs(ours - plain).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of scoring and of a training step.")
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, variant = args.one.split(":")
        made = world(args.model, str(Path(args.data).resolve()))
        run = scoring if kind == "scoring" else training
        print(json.dumps(run(variant, made)))
        return
    compare(args, "scoring", SCORING)
    compare(args, "training", TRAINING)


if __name__ == "__main__":
    main()
