"""What the Hub's tests share: a run folder as llmkd leaves it, and reading a model back by HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TOKEN = "hf_" + "Ab3" * 11 + "Z"
READ_TOKEN = "hf_" + "Rd7" * 11 + "Q"
RUN: dict[str, Any] = {
    "schema": 1,
    "kind": "salt",
    "name": "salt",
    "status": "done",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "git": "0123abc",
    "seed": 17,
    "data": {
        "source": "stdlib",
        "fingerprint": "feedbeef00000001",
        "train_rows": 1000,
        "train_tokens": 256000,
        "eval_tokens": 12800,
        "max_length": 256,
        "packing": "bfd",
    },
    "teacher": {
        "source": "HuggingFaceTB/SmolLM2-135M",
        "revision": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        "fingerprint": "feedbeef00000002",
        "parameters": 134515008,
    },
    "student": {"source": "config", "parameters": 5712000},
    "schedule": {
        "kd_ratio": 0.2,
        "kd_weight": 0.667,
        "kd_steps": 20,
        "max_steps": 100,
        "transition": "step",
        "teacher_temperature": 1.0,
        "t2_scale": False,
    },
    "wall_seconds": 61.2,
    "tokens": 256000,
    "peak_memory_bytes": 2**30,
    "command": "llmkd salt recipes/salt/quickstart.yaml",
}
HELD_OUT = {"loss": 3.5121, "bits_per_byte": 1.725, "accuracy": 0.371, "tokens": 12800}
LM_EVAL = {
    "tasks": {
        "local_arc": {
            "metrics": {
                "acc": {"value": 0.25, "stderr": 0.0125, "higher_is_better": True},
                "acc_norm": {"value": None, "stderr": None, "higher_is_better": True},
            },
            "n": 24,
            "n_total": 2376,
            "num_fewshot": 0,
        }
    }
}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(63)} | {"<unk>": 63}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def write_run(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(RUN | changes))
    (folder / "recipe.yaml").write_text(
        "learning_rate: 0.002\nbf16: true\nper_device_train_batch_size: 16\n"
    )
    (folder / "eval.json").write_text(json.dumps({"held_out": HELD_OUT, "lm_eval": LM_EVAL}))
    lines = [{"step": 1, "tokens": 2560, "loss": 8.1, "learning_rate": 1e-4}]
    lines += [
        {
            "step": step,
            "tokens": step * 2560,
            "eval_loss": 9 - step / 20,
            "eval_accuracy": step / 300,
        }
        for step in range(4, 101, 4)
    ]
    text = "\n".join(map(json.dumps, lines))
    (folder / "metrics.jsonl").write_text(text + '\n{"step": 101, "eval_l')


def load_code(card: str) -> str:
    """The Python lines a card tells its reader to run."""
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    return found.group(1)


def logits_by_http(code: str, url: str, folder: Path, token: str | None) -> torch.Tensor:
    """Run `code` in a fresh process whose Hub is `url`, and take the model's logits."""
    folder.mkdir(parents=True, exist_ok=True)
    tail = (
        'import torch\nids = tokenizer("w1 w2 w3 w60", return_tensors="pt")["input_ids"]\n'
        f"torch.save(model.eval()(input_ids=ids).logits, {str(folder / 'logits.pt')!r})\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **({"HF_TOKEN": token} if token else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", code + tail],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt")


def expected_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3, 60]])
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
