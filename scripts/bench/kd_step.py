"""The KD step against its ideal: a student's CE step plus a teacher's forward, in one run.

    python scripts/bench/kd_step.py [--repeats 12]

Sizes are those of recipes/salt/quickstart.yaml. The ideal shares every line with the KD step but
the loss: torch's own CE for the step, a bare autocast forward for the teacher. Rounds of the three
are interleaved, so that a busy machine slows all of them; the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from llmkd.objectives import ce_kd_chunked, normalise
from llmkd.objectives.token import shift_labels
from llmkd.shipped import shipped
from llmkd.types import DenseLogits


def build(settings: dict, vocab: int) -> torch.nn.Module:
    """A new model of the recipe's shape."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings, vocab_size=vocab))


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    """Print the three medians and the share of the ideal throughput."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    repeats = parser.parse_args().repeats
    recipe = yaml.safe_load((shipped("recipes") / "salt" / "quickstart.yaml").read_text())
    rows, length = recipe["per_device_train_batch_size"], recipe["max_length"]
    vocab = recipe["tokenizer_vocab_size"]
    torch.manual_seed(0)
    student, teacher = (
        build(recipe["model_config"], vocab),
        build(recipe["teacher_model_config"], vocab),
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, vocab, (rows, length))
    gold = shift_labels(ids)
    mask = gold != -100

    def forward(model: torch.nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, use_cache=False).logits

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def ce_step() -> None:
        logits = forward(student).float()
        update(F.cross_entropy(logits.view(-1, vocab), gold.view(-1), ignore_index=-100))

    @torch.no_grad()
    def teacher_forward() -> torch.Tensor:
        return forward(teacher.eval())

    def kd_step() -> None:
        target = DenseLogits(teacher_forward(), vocab)
        term = ce_kd_chunked(forward(student).float(), target, mask, gold_BT=gold, kd_weight=0.667)
        update(normalise(term, int(mask.sum()), world_size=1))

    parts = {"CE step": ce_step, "teacher forward": teacher_forward, "KD step": kd_step}
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 2):
        for name, function in parts.items():
            seconds = timed(function)
            if turn >= 2:  # the first rounds warm up
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:16} {seconds * 1000:8.1f} ms")
    ideal = medians["CE step"] + medians["teacher forward"]
    print(f"KD step reaches {ideal / medians['KD step']:.3f} of the ideal throughput")


if __name__ == "__main__":
    main()
