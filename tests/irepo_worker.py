"""Train a tiny policy on the pairs of `pair_kit` under `accelerate launch`, and save it.

python tests/irepo_worker.py FOLDER SETTINGS_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from conftest import tiny_llama
from pair_kit import irepo_args, pair_rows
from transformers import AutoModelForCausalLM

from llmkd import IrepoTrainer
from llmkd.launch import leave

ROWS, HELD_OUT = 12, 7


def run(folder: Path, settings: dict) -> IrepoTrainer:
    """Three steps of four pairs, logs and held-out metrics beside the model."""
    start, adapted = folder.parent / "start", settings.pop("adapted", False)
    args = irepo_args(folder, **settings)  # before the model: ZeRO-3 shards it while it is loaded
    model = AutoModelForCausalLM.from_pretrained(start) if start.exists() else tiny_llama(1)
    torch.manual_seed(0)  # the adapter begins alike everywhere
    options = {}
    if adapted:
        from peft import LoraConfig

        modules = ["q_proj", "v_proj"]
        options["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=modules)
    rows, held_out = pair_rows(ROWS), pair_rows(HELD_OUT, seed=9)
    trainer = IrepoTrainer(model, args, train_dataset=rows, eval_dataset=held_out, **options)
    trainer.train()
    scores = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    if trainer.is_world_process_zero():
        lines = [line for line in trainer.state.log_history if "loss" in line]
        tokens = trainer.state.num_input_tokens_seen
        found = {"lines": lines, "scores": scores, "tokens": tokens}
        (folder / "found.json").write_text(json.dumps(found))
    return trainer


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
