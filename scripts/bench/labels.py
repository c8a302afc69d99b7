"""Each encoding of soft labels on real text: bytes, speed, and how far from the teacher it leads.

    python scripts/bench/labels.py --teacher FOLDER --dataset my_text.txt.gz [--distillkit PATH]

For each encoding: bytes a token, microseconds a token to encode and to decode, KL(label || teacher)
in nats a token, and the angle between a student's gradient (all its parameters, forward KL) from
the label and from the whole distribution, over a batch of --rows rows and over single rows.
The student is a small new model of the teacher's vocabulary, trained on hard labels for
--student_steps steps: a fresh one's gradient is almost the same whatever the target.
DistillKit's codec is measured on the same logits where --distillkit names a folder that holds
`distillkit/compression`; it is no dependency.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmkd.data import DataConfig, PackedCollator, load_documents, load_tokenizer, prepare_rows
from llmkd.data.collator import for_the_model
from llmkd.labels import Layout, fit_lowrank, make_encoding
from llmkd.objectives import FusedLinearKD
from llmkd.objectives.token import IGNORE, shift_labels
from llmkd.teachers import LiveTeacher
from llmkd.teachers.causal_head import TASK, open_head
from llmkd.types import Head, HiddenTarget, SparseTarget, Target

STUDENT = {
    "model_type": "llama",
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "tie_word_embeddings": True,
}
MATRIX: list[tuple[str, dict[str, Any]]] = [
    *(("sampled", {"draws": n, "sampling": "systematic"}) for n in (12, 20, 32, 50, 100)),
    *(("sampled", {"draws": n, "sampling": "multinomial"}) for n in (20, 50, 100)),
    *(("topk", {"k": k, "tail": tail}) for k in (12, 50, 128) for tail in ("renorm", "bucket")),
    ("topk", {"k": 50, "value_bits": 8, "tail": "bucket"}),
    *(("hidden", {"dtype": d}) for d in ("int8", "bfloat16", "float32")),
    *(("lowrank", {"rank": r}) for r in (32, 64, 128, 256)),
]
DISTILLKIT = {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}


class Bench:
    """Teacher's hidden states of some rows, and a student whose gradient is asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer = load_tokenizer(args.teacher)
        config = DataConfig(dataset=args.dataset, max_length=args.max_length)
        rows = prepare_rows(load_documents(config), self.tokenizer, config)
        train = cast(Any, rows.train)
        self.collate = PackedCollator(int(cast(int, self.tokenizer.eos_token_id)))
        step = max(1, len(train) // args.rows)
        self.batch = self.collate([train[i * step] for i in range(args.rows)])
        self.lengths = [len(train[i * step]["input_ids"]) for i in range(args.rows)]
        teacher = LiveTeacher(args.teacher, dtype="float32")
        vocab = teacher.config().vocab_size
        teacher.check(vocab, self.tokenizer)
        teacher.load(Accelerator(cpu=True))
        answer = [
            teacher({k: v[i : i + 1] for k, v in self.batch.items()}) for i in range(args.rows)
        ]
        first = cast(HiddenTarget, answer[0])
        states = torch.cat([cast(HiddenTarget, one).hidden_BTH for one in answer]).float()
        head = Head(first.head.weight.detach().float().clone())
        self.full = HiddenTarget(states, head, first.shared)
        teacher.release()
        self.student = self._student(train, vocab, args)
        self.exact = self.gradient(self.full)

    def _student(self, rows: Any, vocab: int, args: argparse.Namespace) -> nn.Module:
        torch.manual_seed(0)
        config = AutoConfig.for_model(**STUDENT, vocab_size=vocab)
        student = AutoModelForCausalLM.from_config(config)
        open_head(student)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.1)
        for step in range(args.student_steps):
            some = [rows[(step * 4 + i) % len(rows)] for i in range(4)]
            loss = self.loss(student, self.collate(some), None)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return student

    def loss(self, student: nn.Module, batch: dict[str, Tensor], target: Target | None) -> Tensor:
        """Sum over the batch's predicted tokens of forward KL, or of CE without a target."""
        gold_BT = shift_labels(batch["labels"])
        mask_BT = gold_BT != IGNORE
        kd = FusedLinearKD()

        def task(hidden_BTH: Tensor, head: Head) -> dict[str, Tensor]:
            return {"sum": kd(hidden_BTH, head, target, mask_BT, gold_BT=gold_BT).total}

        with torch.autocast("cpu", torch.bfloat16, enabled=target is None):
            found = student(**for_the_model(batch), use_cache=False, **{TASK: task})
        return found["sum"] / mask_BT.sum()

    def gradient(self, target: Target) -> list[Tensor]:
        """Gradient of all parameters for each row, [rows][parameters], as flat vectors."""
        found = []
        for row in range(len(self.lengths)):
            self.student.zero_grad()
            part = {name: value[row : row + 1] for name, value in self.batch.items()}
            places = torch.arange(
                row * part["input_ids"].shape[1], (row + 1) * part["input_ids"].shape[1]
            )
            one = target.take(places)
            self.loss(self.student, part, one).backward()
            flat = [p.grad.reshape(-1) for p in self.student.parameters() if p.grad is not None]
            found.append(torch.cat(flat).clone())
        return found

    def angles(self, target: Target) -> tuple[float, float]:
        """Degrees between the gradients from a label and from the full distribution: of the whole
        batch, and the mean over single rows."""
        mine = self.gradient(target)
        single = [degrees(a, b) for a, b in zip(mine, self.exact, strict=True)]
        return degrees(sum(mine), sum(self.exact)), sum(single) / len(single)  # pyright: ignore[reportArgumentType]

    def kl(self, target: Target) -> float:
        """Mean KL(label || teacher) in nats a token; finite for sparse labels as well."""
        total, count = 0.0, 0
        for row, length in enumerate(self.lengths):
            hidden = self.full.hidden_BTH[row, :length]
            log_p = torch.log_softmax(self.full.head(hidden)[:, : self.full.shared], -1)
            width = self.full.hidden_BTH.shape[1]
            some = target.take(torch.arange(row * width, row * width + length))
            if isinstance(some, HiddenTarget):
                log_l = torch.log_softmax(some.head(some.hidden_BTH.float())[:, : some.shared], -1)
                total += (log_l.exp() * (log_l - log_p)).sum().item()
            elif isinstance(some, SparseTarget):
                # of a top k: its listed tokens, scaled to sum to 1, whatever its tail is read as
                p = some.probs_BTK / some.probs_BTK.sum(-1, keepdim=True)
                listed = log_p.gather(-1, some.ids_BTK)
                total += (
                    torch.where(p > 0, p * (p.clamp_min(1e-30).log() - listed), 0.0).sum().item()
                )
            count += length
        return total / count


def degrees(one: Tensor, other: Tensor) -> float:
    """Angle between two vectors; in float64, a small angle hides behind float32's rounding."""
    one, other = one.double(), other.double()
    cosine = (one @ other) / (one.norm() * other.norm())
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine.item()))))


def timed(work: Callable[[], Any], tokens: int, repeats: int = 3) -> tuple[Any, float]:
    """The result, and microseconds a token (the best of a few)."""
    best, found = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - began)
    return found, best / tokens * 1e6


def measure(bench: Bench, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One encoding's line of the table."""
    full, tokens = bench.full, sum(bench.lengths)
    width = full.hidden_BTH.shape[-1]
    head = full.head
    label = " ".join([name, *(str(value) for value in settings.values())])
    tail = settings.get("tail", "renorm")
    settings = {key: value for key, value in settings.items() if key != "tail"}
    if name == "lowrank":
        flat = torch.cat([full.hidden_BTH[i, :n] for i, n in enumerate(bench.lengths)])
        # fitted on every second token, read on all
        fit = fit_lowrank(flat[::2], head, settings["rank"], shared=full.shared)
        codec, head = fit.codec(full.shared), fit.head
    else:
        codec = make_encoding(name, shared=full.shared, width=width, **settings)
    logits: list[Tensor] = []
    if codec.needs == "logits":
        logits = [full.head(full.hidden_BTH[i, :n]) for i, n in enumerate(bench.lengths)]

    def encode() -> list[Any]:
        source = logits or [full.hidden_BTH[i, :n] for i, n in enumerate(bench.lengths)]
        return [cast(Any, codec).encode(values, row=i) for i, values in enumerate(source)]

    rows, encoding_us = timed(encode, tokens)
    shape = Layout(tuple(bench.lengths), (0,) * len(bench.lengths), full.hidden_BTH.shape[1])
    found, decoding_us = timed(lambda: cast(Any, codec).decode(rows, shape), tokens)
    if codec.needs == "logits":
        ids, probs = cast(tuple[Tensor, Tensor], found)
        target: Target = SparseTarget(ids, probs, full.shared, tail)
    else:
        target = HiddenTarget(found.float(), head, full.shared)
    size = sum(column.nbytes for row in rows for column in row.values()) / tokens
    batch, row = bench.angles(target)
    return line(label, size, encoding_us, decoding_us, bench.kl(target), batch, row)


def measure_distillkit(bench: Bench, path: str) -> list[dict[str, Any]]:
    """DistillKit's recommended codec on the same logits, read as it does (top k renormalised) and
    with our tail bucket."""
    sys.path.insert(0, path)
    from distillkit.compression import (  # pyright: ignore[reportMissingImports]
        DistributionQuantizationConfig,
        LogprobCompressor,
        SpecialTerm,
    )

    full, tokens = bench.full, sum(bench.lengths)
    terms = [t if isinstance(t, int) else SpecialTerm(t) for t in DISTILLKIT["polynomial_terms"]]
    codec = LogprobCompressor(
        DistributionQuantizationConfig(
            d=full.shared,
            k=DISTILLKIT["k"],
            exact_k=DISTILLKIT["exact_k"],
            exact_dtype=torch.bfloat16,
            polynomial_terms=terms,
            delta_encoding=False,
        )
    )
    shape = full.hidden_BTH.shape[:2]
    flat = full.hidden_BTH.reshape(-1, full.hidden_BTH.shape[-1])
    parts = [full.head(some)[:, : full.shared] for some in flat.split(256)]

    def encode() -> list[Any]:
        found = []
        for logits in parts:
            top = torch.log_softmax(logits, -1).topk(DISTILLKIT["k"])
            found.append(codec.compress_from_sparse(top.indices, top.values))
        return found

    rows, encoding_us = timed(encode, len(flat))
    found, decoding_us = timed(lambda: [codec.decompress_to_sparse(r) for r in rows], len(flat))
    ids = torch.cat([one[0] for one in found]).reshape(*shape, -1)
    probs = torch.cat([one[1] for one in found]).float().exp().reshape(*shape, -1)
    size = sum(v.numel() for r in rows for v in r.values()) / len(flat)
    lines = []
    for tail in ("renorm", "bucket"):
        scale = (
            probs.sum(-1, keepdim=True)
            if tail == "renorm"
            else probs.sum(-1, keepdim=True).clamp_min(1)
        )
        target = SparseTarget(ids, probs / scale, full.shared, cast(Any, tail))
        batch, row = bench.angles(target)
        label = f"DistillKit k=128, {tail}"
        lines.append(line(label, size, encoding_us, decoding_us, bench.kl(target), batch, row))
    assert tokens
    return lines


def line(label: str, size: float, *values: float) -> dict[str, Any]:
    """One row of the table."""
    names = ("encode_us", "decode_us", "kl_nats", "angle_batch", "angle_row")
    return {"encoding": label, "bytes": size, **dict(zip(names, values, strict=True))}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table as markdown; `--json` keeps it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--student_steps", type=int, default=150)
    parser.add_argument("--distillkit")
    parser.add_argument("--only", help="encodings whose name begins so")
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    bench = Bench(args)
    print(f"{sum(bench.lengths)} tokens, {bench.full.shared} entries", flush=True)
    print("| encoding | B/token | encode µs | decode µs | KL nats | angle, batch | angle, row |")
    print("|---|---|---|---|---|---|---|")
    lines = []
    for name, settings in MATRIX:
        if args.only and not name.startswith(args.only):
            continue
        lines.append(measure(bench, name, settings))
        show(lines[-1])
    for found in measure_distillkit(bench, args.distillkit) if args.distillkit else []:
        lines.append(found)
        show(found)
    if args.json:
        Path(args.json).write_text(json.dumps(lines, indent=2))


def show(found: dict[str, Any]) -> None:
    """One line of the table, as soon as it is known."""
    print(
        f"| {found['encoding']} | {found['bytes']:.1f} | {found['encode_us']:.1f} | "
        f"{found['decode_us']:.2f} | {found['kl_nats']:.4f} | {found['angle_batch']:.1f}° | "
        f"{found['angle_row']:.1f}° |",
        flush=True,
    )


if __name__ == "__main__":
    main()
