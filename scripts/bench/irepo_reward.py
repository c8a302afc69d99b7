"""Train small reward models on pairs with human votes, for the real run of the README.

    python scripts/bench/irepo_reward.py --model ENCODER --pairs rated.jsonl --out DIR --seeds 0 1

Rows are prompt, response_1, response_2, wins, votes (as `llmkd judge --rated_pairs` reads them).
The loss is soft: cross-entropy between the vote share and sigma(r1 - r2). The encoder reads prompt
and response as a text pair, as llmkd's `reward` annotator does. Every fifth prompt is held out and
written to DIR/held_out.jsonl.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed


def held(row: dict[str, Any]) -> bool:
    """Whether a row's prompt is kept for checking."""
    return zlib.crc32(row["prompt"].encode()) % 5 == 0


def batches(rows: list[dict[str, Any]], size: int, seed: int) -> list[list[dict[str, Any]]]:
    """Shuffled batches, of like length inside."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    pools = [order[i : i + 8 * size] for i in range(0, len(order), 8 * size)]
    made = []
    for pool in pools:
        pool.sort(key=lambda i: len(rows[i]["response_1"]) + len(rows[i]["response_2"]))
        made += [[rows[i] for i in pool[j : j + size]] for j in range(0, len(pool), size)]
    return made


def train(args: argparse.Namespace, rows: list[dict[str, Any]], seed: int) -> None:
    """One model of the ensemble."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, use_safetensors=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01)
    steps = args.epochs * ((len(rows) + args.batch - 1) // args.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    step = 0
    model.train()
    for epoch in range(args.epochs):
        for batch in batches(rows, args.batch, 1000 * seed + epoch):
            texts = [row[f"response_{side}"] for side in (1, 2) for row in batch]
            prompts = [row["prompt"] for row in batch] * 2
            inputs: Any = tokenizer(
                prompts,
                texts,
                truncation=True,
                max_length=args.max_length,
                padding=True,
                return_tensors="pt",
            )
            with torch.autocast("cpu", torch.bfloat16):
                rewards = model(**inputs).logits.squeeze(-1).float()
            share = torch.tensor([row["wins"] / row["votes"] for row in batch])
            gap = rewards[: len(batch)] - rewards[len(batch) :]
            loss = F.binary_cross_entropy_with_logits(gap, share)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step % 20 == 0:
                print(f"seed {seed} step {step}/{steps} loss {loss.item():.3f}", flush=True)
    folder = args.out / f"reward-{seed}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--max_length", type=int, default=160)
    args = parser.parse_args()
    rows = [json.loads(line) for line in Path(args.pairs).read_text().splitlines()]
    args.out.mkdir(parents=True, exist_ok=True)
    kept = [row for row in rows if held(row)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
    (args.out / "held_out.jsonl").write_text("".join(lines))
    taught = [row for row in rows if not held(row)]
    print(f"{len(taught)} pairs to train on, {len(kept)} held out")
    for seed in args.seeds:
        train(args, taught, seed)


if __name__ == "__main__":
    main()
