"""A student distilled by llmkd, by a plain `Trainer` with KL on logits, and by TextBrewer.

    PYTHONPATH=.:rivals python scripts/bench/ernie_rivals.py RUN --steps 400 --seeds 0 1 2

RUN is a finished `llmkd ernie-tiny` run: its fine-tuned teacher, its task rows and its student's
shape are taken. Every contestant gets the same teacher, first weights, head, rows, batch size,
steps, AdamW, linear schedule with warm-up and clipping, in float32 on one thread; batches are
drawn at random, each library with its own loader. One contestant runs in one process (peak
memory), contestants take turns (time). TextBrewer: `pip install --no-deps textbrewer==0.2.1.post1
tensorboard tensorboard-data-server`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llmkd.data import TaskCollator, pad_id
from llmkd.files import read_json
from llmkd.methods.ernie_config import TYPES
from llmkd.methods.ernie_plan import Plan
from llmkd.methods.ernie_student import make_student
from llmkd.methods.recipe import read_recipe
from llmkd.models.latent_student import LatentStudent, new_projections
from llmkd.models.student import with_task_head
from llmkd.objectives.layer_map import layer_map
from llmkd.teachers.latent import LatentTeacher
from llmkd.teachers.loading import load_model
from llmkd.trainers import LatentDistillConfig, LatentDistillTrainer

RATE, BATCH, WARM_UP = 1e-3, 64, 0.1


class Arena:
    """Rows, teacher and the student's first weights, the same for everybody."""

    def __init__(self, run: Path, seed: int, steps: int) -> None:
        argv = [str(run / "recipe.yaml"), "--seed", str(seed), "--output_dir", str(run)]
        argv += ["--stages", "prediction", "--arms", "{}", "--stage_settings", "{}"]
        recipe = read_recipe(argv, TYPES)
        self.plan, self.seed, self.steps = Plan.of(recipe), seed, steps
        self.plan.read()
        rows = self.plan.task_rows
        assert rows is not None
        self.rows = rows
        self.teacher = str(run / "teacher")
        body = make_student(self.plan, recipe)
        self.student: Any = with_task_head(
            body, kind=rows.kind, label_names=rows.label_names, seed=seed
        )
        self.collate = TaskCollator(pad_id(self.plan.tokenizer), kind=rows.kind)

    def args(self, folder: str, **extra: Any) -> dict[str, Any]:
        """Training arguments that `Trainer` and ours share."""
        shared = {
            "output_dir": folder,
            "max_steps": self.steps,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": 256,
            "learning_rate": RATE,
            "lr_scheduler_type": "linear",
            "warmup_steps": WARM_UP,
            "weight_decay": 0.01,
            "optim": "adamw_torch_fused",
            "seed": self.seed,
            "logging_steps": 100,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return {**shared, **extra}

    @torch.no_grad()
    def accuracy(self) -> float:
        """Of the student's argmax on the held-out rows."""
        self.student.eval()
        right, rows = 0, self.rows.held_out
        for start in range(0, len(rows), 256):
            batch = self.collate([rows[i] for i in range(start, min(start + 256, len(rows)))])
            labels = batch.pop("labels")
            batch.pop("rows", None)
            right += int((self.student(**batch).logits.argmax(-1) == labels).sum())
        return right / len(rows)


def by_trainer(arena: Arena, folder: str) -> float:
    """What a user writes first: `Trainer` with CE + batchmean KL; seconds a step."""
    from transformers import Trainer, TrainingArguments

    teacher: Any = load_model(arena.teacher, head="sequence").eval()

    class KDTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            inputs.pop("rows", None)
            outputs = model(**inputs)
            inputs.pop("labels")
            with torch.no_grad():
                wanted = teacher(**inputs).logits.log_softmax(-1)
            log_q = outputs.logits.log_softmax(-1)
            kl = F.kl_div(log_q, wanted, log_target=True, reduction="batchmean")
            return outputs.loss + kl

    args = TrainingArguments(**arena.args(folder), remove_unused_columns=False)
    rows = arena.rows.train
    trainer = KDTrainer(arena.student, args, train_dataset=rows, data_collator=arena.collate)
    return timed(arena, trainer.train)


def by_llmkd(arena: Arena, folder: str, losses: list[str], **extra: Any) -> float:
    """Our trainer; seconds a step."""
    teacher = LatentTeacher(arena.teacher, head="sequence")
    wide = teacher.config().get_text_config()
    own = arena.student.config
    projections = new_projections(
        "shared",
        layers=range(own.num_hidden_layers + 1),
        student_width=own.hidden_size,
        teacher_width=wide.hidden_size,
        seed=arena.seed,
    )
    trainer = LatentDistillTrainer(
        LatentStudent(arena.student, projections if "latent" in losses else None),
        LatentDistillConfig(**arena.args(folder, **extra)),
        losses=losses,
        teacher=teacher,
        kind=arena.rows.kind,
        train_dataset=arena.rows.train,
        data_collator=arena.collate,
    )
    return timed(arena, trainer.train)


def textbrewer_matches(own: Any, wide: Any) -> list[dict[str, Any]]:
    """Hidden states and attention of the layers that llmkd compares, as TextBrewer names them."""
    pairs = layer_map(own.num_hidden_layers, wide.num_hidden_layers)
    proj = ["linear", own.hidden_size, wide.hidden_size]
    matches: list[dict[str, Any]] = []
    for here, there in [(0, 0), *enumerate(pairs, 1)]:
        one = {"layer_S": here, "layer_T": there, "weight": 1.0}
        matches.append({**one, "feature": "hidden", "loss": "hidden_mse", "proj": [*proj]})
    for here, there in enumerate(pairs):
        one = {"layer_S": here, "layer_T": there - 1, "weight": 1.0}
        matches.append({**one, "feature": "attention", "loss": "attention_mse"})
    return matches


def by_textbrewer(arena: Arena, folder: str, *, latent: bool) -> float:
    """TextBrewer's GeneralDistiller: soft CE + hard labels, and with `latent` attention and hidden
    matches of the same layers (its attention loss reads probabilities as SDPA's models give none:
    eager attention, output_attentions); seconds a step.
    """
    import textbrewer  # pyright: ignore[reportMissingImports]
    from transformers import get_linear_schedule_with_warmup

    teacher: Any = load_model(arena.teacher, head="sequence", attn="eager").eval()
    student = arena.student
    if latent:
        student.set_attn_implementation("eager")

    def adapt(batch: Any, outputs: Any) -> dict[str, Any]:
        found = {"logits": outputs.logits, "inputs_mask": batch["attention_mask"]}
        if outputs.loss is not None:
            found["losses"] = outputs.loss
        if latent:
            found |= {"hidden": outputs.hidden_states, "attention": outputs.attentions}
        return found

    matches = textbrewer_matches(student.config, teacher.config) if latent else []
    distiller = textbrewer.GeneralDistiller(
        train_config=textbrewer.TrainingConfig(
            device="cpu", output_dir=folder, ckpt_steps=10**9, log_dir=None
        ),
        distill_config=textbrewer.DistillationConfig(
            temperature=1, hard_label_weight=1, kd_loss_weight=1, kd_loss_type="ce",
            intermediate_matches=matches,
        ),
        model_T=teacher, model_S=student, adaptor_T=adapt, adaptor_S=adapt,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(arena.seed)
    loader: Any = torch.utils.data.DataLoader(
        arena.rows.train,  # type: ignore[arg-type]
        batch_size=BATCH,
        shuffle=True,
        generator=generator,
        drop_last=True,
        collate_fn=lambda rows: {k: v for k, v in arena.collate(rows).items() if k != "rows"},
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    schedule = {"num_warmup_steps": int(WARM_UP * arena.steps), "num_training_steps": arena.steps}
    extra = {"output_hidden_states": True, "output_attentions": True} if latent else {}

    def train() -> None:
        with distiller:
            distiller.train(
                optimizer, loader, num_steps=arena.steps, max_grad_norm=1.0,
                scheduler_class=get_linear_schedule_with_warmup, scheduler_args=schedule,
                callback=None, **extra,
            )  # fmt: skip

    return timed(arena, train)


def timed(arena: Arena, train: Any) -> float:
    """Seconds a step of `train()`, loading of the teacher included where it is done there."""
    arena.student.train()
    began = time.perf_counter()
    train()
    return (time.perf_counter() - began) / arena.steps


CONTESTANTS: dict[str, Any] = {
    "Trainer + KL": by_trainer,
    "TextBrewer, logits": lambda a, f: by_textbrewer(a, f, latent=False),
    "llmkd prediction": lambda a, f: by_llmkd(a, f, ["soft", "hard"]),
    "llmkd prediction, grouped": lambda a, f: by_llmkd(
        a, f, ["soft", "hard"], train_sampling_strategy="group_by_length"
    ),
    "TextBrewer, latent + logits": lambda a, f: by_textbrewer(a, f, latent=True),
    "llmkd tsd": lambda a, f: by_llmkd(a, f, ["latent", "soft", "hard"]),
    "llmkd tsd, grouped": lambda a, f: by_llmkd(
        a, f, ["latent", "soft", "hard"], train_sampling_strategy="group_by_length"
    ),
}


def one(run: Path, name: str, seed: int, steps: int) -> None:
    """A contestant in this process; prints JSON."""
    torch.set_num_threads(1)
    arena = Arena(run, seed, steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        seconds = CONTESTANTS[name](arena, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"ms": 1000 * seconds, "mib": (peak - before) / 1024, "accuracy": arena.accuracy()}
    print("RESULT " + json.dumps(found))


def main() -> None:
    """Every contestant and seed in a process of its own; a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--one", help="run this contestant here (used by the script itself)")
    args = parser.parse_args()
    if args.one:
        one(args.run, args.one, args.seeds[0], args.steps)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for seed in args.seeds:
        for name in CONTESTANTS:
            command = [sys.executable, __file__, str(args.run), "--one", name]
            command += ["--seeds", str(seed), "--steps", str(args.steps)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            if not lines:
                print(f"{name}: failed: {done.stderr.strip().splitlines()[-1:]}")
                continue
            found[name].append(json.loads(lines[0].removeprefix("RESULT ")))
            print(name, seed, found[name][-1], flush=True)
    score = read_json(args.run / "teacher" / "eval.json")["task"]["accuracy"]
    print(
        f"\nteacher: {score:.2%}\n\n| | ms/step | x Trainer + KL | extra MiB | accuracy by seed |"
    )
    print("|---|---|---|---|---|")
    base = statistics.median(r["ms"] for r in found["Trainer + KL"])
    for name, rows in found.items():
        if rows:
            ms, mib = (statistics.median(r[key] for r in rows) for key in ("ms", "mib"))
            each = ", ".join(f"{r['accuracy']:.2%}" for r in rows)
            print(f"| {name} | {ms:.1f} | {ms / base:.2f} | {mib:.0f} | {each} |")


if __name__ == "__main__":
    main()
