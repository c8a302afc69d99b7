"""iREPO and its relatives on votes of known noise, at matched KL: the experiment of the README.

    python scripts/bench/irepo_votes.py --policy FOLDER --prompts prompts.jsonl --out DIR \
        --cells main flipped --seeds 0 1 2 --part 0/2

One JSON file a run, so that a killed sweep goes on; `irepo_votes_table.py DIR` makes the tables.
`--part i/n` takes every n-th run. A prompt file has one {"prompt": ...} a line; the policy is a
folder. Needs vaderSentiment.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from irepo_world import CELLS, Cell, World, read_prompts
from transformers import Trainer, TrainingArguments, logging

from llmkd.files import write_json
from llmkd.trainers import IrepoConfig, IrepoTrainer

ITERATIONS = 3
# arm: (loss, which column is the label, reference)
OURS = {
    "irepo": ("irepo", "pref_logit", "previous"),
    "irepo_initial": ("irepo", "pref_logit", "initial"),
    "irepo_weighted": ("irepo_weighted", "pref_logit", "previous"),
    "soft_dpo": ("soft_dpo", "pref_logit", "previous"),
    "ipo": ("ipo", "pref_logit", "previous"),
    "rebel": ("rebel", "noisy_gap", "previous"),
    "robust_dpo": ("robust_dpo", "pref_logit", "previous"),
    "dpo_one_vote": ("dpo", "one_vote", "previous"),
}
ARMS = (*OURS, "trl_dpo", "best_of_4_sft")
KEY_ARMS = ("irepo", "soft_dpo", "ipo", "trl_dpo")
SFT_RATE = {0.1: 4.0, 0.3: 2.0, 1.0: 1.0, 3.0: 0.5}  # its knob is the learning rate, not beta


def common(out: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Optimizer settings that all arms share."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": args.batch,
        "num_train_epochs": args.epochs,
        "learning_rate": args.rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "use_cpu": True,
    }


def ours(arm: str, model: Any, pairs: list[Any], beta: float, cell: Cell, kwargs: Any) -> None:
    """Any loss of llmkd."""
    loss, column, reference = OURS[arm]
    rows = [{**pair, "pref_logit": pair[column]} for pair in pairs]
    flips = {"flip_rate": cell.flips} if loss == "robust_dpo" else {}
    chosen: dict[str, Any] = {**kwargs, "loss": loss, "beta": beta, "reference": reference, **flips}
    config = IrepoConfig(**chosen)
    IrepoTrainer(model, config, train_dataset=Dataset.from_list(rows)).train()


def trl_dpo(model: Any, pairs: list[Any], beta: float, kwargs: Any, tokenizer: Any) -> None:
    """TRL's DPOTrainer on the majority's winner of the same pairs, the same token ids."""
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = []
    for pair in pairs:
        ids = (pair["ids_1"], pair["ids_2"])
        chosen, rejected = ids if pair["pref_logit"] > 0 else ids[::-1]
        rows.append(
            {"prompt_ids": pair["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
        )
    config = DPOConfig(
        **kwargs, beta=beta, precompute_ref_log_probs=True, bf16=False, gradient_checkpointing=False
    )
    Tokenized(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    ).train()


def best_of_k(model: Any, pairs: list[Any], beta: float, kwargs: Any) -> None:
    """Cross-entropy on the response with the most votes; the learning rate is its knob."""

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(row["prompt_ids"]) + len(row["best"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for place, row in enumerate(rows):
            start, end = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row["best"])
            ids[place, :end] = torch.tensor(row["prompt_ids"] + row["best"])
            labels[place, start:end] = ids[place, start:end]
        return {"input_ids": ids, "labels": labels}

    args = TrainingArguments(
        **{**kwargs, "learning_rate": kwargs["learning_rate"] * SFT_RATE.get(beta, 1.0)},
        remove_unused_columns=False,
    )
    Trainer(model, args, train_dataset=Dataset.from_list(pairs), data_collator=collate).train()


def regress(
    arm: str, model: Any, pairs: list[Any], beta: float, cell: Cell, kwargs: Any, tokenizer: Any
) -> None:
    """One iteration's training, in place."""
    if arm == "trl_dpo":
        trl_dpo(model, pairs, beta, kwargs, tokenizer)
    elif arm == "best_of_4_sft":
        best_of_k(model, pairs, beta, kwargs)
    else:
        ours(arm, model, pairs, beta, cell, kwargs)


def run(
    world: World, name: str, arm: str, beta: float, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """All iterations of one arm, and its scores after each."""
    cell, began = CELLS[name], time.monotonic()
    scratch = Path(tempfile.mkdtemp(dir=args.out))
    folder, found = world.source, []
    from llmkd.teachers.loading import load_model

    for step in range(ITERATIONS):
        pairs = world.pairs(folder, cell, seed, step)
        model = load_model(folder, dtype="float32")
        if arm == "irepo_initial":
            prompts = [pair["prompt_ids"] for pair in pairs] * 2
            ids = [pair["ids_1"] for pair in pairs] + [pair["ids_2"] for pair in pairs]
            sums = world.log_probs(world.model(), prompts, ids).reshape(2, -1)
            for place, pair in enumerate(pairs):
                pair["initial_logps_1"], pair["initial_logps_2"] = sums[:, place].tolist()
        kwargs = common(str(scratch / "trainer"), args, 10 * seed + step)
        regress(arm, model, pairs, beta, cell, kwargs, world.tokenizer)
        folder = str(scratch / f"step-{step}")
        model.save_pretrained(folder)
        world.tokenizer.save_pretrained(folder)
        if step == ITERATIONS - 1 or args.every_step:
            found.append({"iteration": step + 1, **world.score(folder, cell, seed)})
    shutil.rmtree(scratch)
    return {
        "cell": name,
        "arm": arm,
        "beta": beta,
        "seed": seed,
        "scores": found,
        "seconds": round(time.monotonic() - began, 1),
        "settings": {"rate": args.rate, "epochs": args.epochs, "batch": args.batch},
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--policy", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cells", nargs="+", default=["main"], choices=[*CELLS])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--betas", nargs="+", type=float, default=[0.1, 0.3, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--every_step", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    world = World(args.policy, read_prompts(args.prompts))
    part, parts = map(int, args.part.split("/"))
    wanted = itertools.product(args.cells, args.seeds, args.betas, args.arms)
    for number, (cell, seed, beta, arm) in enumerate(wanted):
        path = args.out / f"{cell}-{arm}-b{beta:g}-s{seed}.json"
        if number % parts != part or path.exists():
            continue
        result = run(world, cell, arm, beta, seed, args)
        write_json(path, result)
        last = result["scores"][-1]
        shown = f"win {last['win']:.3f} KL {last['kl']:.2f} {result['seconds']} s"
        print(f"{path.stem}: {shown}", flush=True)


if __name__ == "__main__":
    main()
