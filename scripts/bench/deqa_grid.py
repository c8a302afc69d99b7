"""DeQA-Score's question: which label, and which loss on pairs, rates best? Two real sets.

    python scripts/bench/deqa_grid.py run OUT --model SMOLLM2 --tweets FILE --mlqe DIR --what PART
    python scripts/bench/deqa_grid_table.py OUT

PART is tweets, mlqe, mix, ridge or check; they may run side by side, finished runs stay.
Every run is `ScoreTrainer` and `Scorer` on SmolLM2-135M with LoRA on its upper layers. The layers
below are frozen: what they say of a row is computed once and remembered, which gives the numbers
of the whole model (`check`) at a fraction of the time.
"""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deqa_rivals import embedder, regression, ridge
from peft import LoraConfig
from torch import Tensor, nn

from llmkd.data.levels import LevelConfig
from llmkd.data.score_config import ScoreDataConfig
from llmkd.data.score_rows import load_score_rows
from llmkd.data.score_tokens import ScoreEncoder, ScorePrompt, tokenize_scores
from llmkd.files import write_json
from llmkd.methods.deqa_config import TargetConfig
from llmkd.methods.deqa_targets import LevelTarget
from llmkd.models.scorer import Scorer
from llmkd.teachers.loading import load_model
from llmkd.trainers import ScoreConfig, ScoreTrainer

GAUSS = {"form": "integral", "repaired": True}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "onehot_bin": ("onehot_bin", {}),
    "onehot_round": ("onehot_round", {}),
    "two_token": ("two_token", {}),
    "pooled_sigma": ("pooled_sigma", {}),
    "gauss_deqa": ("gauss_deqa", GAUSS),
    "gauss_tilt": ("gauss_tilt", {}),
    "histogram": ("histogram", {}),
}
MIXES = (  # arm and std_mode of its pairs, most wanted first
    [
        ("gauss_deqa", "none"),
        ("gauss_deqa", "fixed1"),
        ("gauss_deqa", "pred"),
        ("onehot_bin", "none"),
        ("onehot_bin", "fixed1"),
        ("onehot_round", "none"),
    ],
    [("gauss_deqa", "pred_detached"), ("gauss_deqa", "target")],
)
RATES = {"tweets": (3e-3, 6e-3), "mlqe": (1e-3, 3e-3), "mix": (3e-3,)}
SEEDS, TUNING = (0, 1, 2), 100
PARTS = ("tweets", "mlqe", "mix", "ridge", "check")
RATERS = {"tweets": (3, 10), "mlqe": (3,)}  # en-de has three raters a training row
TUNED = {"tweets": 10, "mlqe": 3}
TRAIN, MIXED, BATCH = 1000, 500, 16
ASKED = LevelConfig(questions=["{text}"], answer_prefix="The rating is")
TEXTS = {
    "tweets": ("{text}\nHow positive is this text?", "ratings", (-4, 4)),
    "mlqe": ("English: {src}\nGerman: {mt}\nHow good is the translation?", "scores", (0, 100)),
}


@dataclass(frozen=True)
class Job:
    """One run: a set (or `mix`), an arm, raters a training row, loss on pairs, rate, seed."""

    data: str
    arm: str
    raters: int
    rate: float
    seed: int
    pairs: str = "none"

    @property
    def name(self) -> str:
        return f"{self.data}-{self.arm}-r{self.raters}-{self.pairs}-lr{self.rate:g}-s{self.seed}"

    @property
    def split(self) -> str:
        """What is scored: validation rows to choose a rate, else the test rows."""
        return "validation" if self.seed == TUNING else "held_out"


class Remembered(nn.Module):
    """In place of the embedding: rows of ids to what the frozen layers make of them."""

    def __init__(self, lower: Any, pad: int) -> None:
        super().__init__()
        self.pad = pad
        # behind a list: neither parameters of the model that trains nor in its state
        self.hidden = [lower]
        self.known: dict[bytes, Tensor] = {}

    @property
    def weight(self) -> Tensor:
        return self.hidden[0].embed_tokens.weight

    @torch.no_grad()
    def forward(self, ids_BT: Tensor) -> Tensor:
        rows = [row[: int((row != self.pad).nonzero()[-1]) + 1] for row in ids_BT]
        keys = [row.numpy().tobytes() for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self.known}
        if new:
            width = max(map(len, new.values()))
            table = torch.full((len(new), width), self.pad)
            for place, row in enumerate(new.values()):
                table[place, : len(row)] = row
            found_NTH = self.hidden[0](input_ids=table, use_cache=False).last_hidden_state
            for place, (key, row) in enumerate(new.items()):
                self.known[key] = found_NTH[place, : len(row)].float().clone()
        out_BTH = torch.zeros(*ids_BT.shape, self.weight.shape[1])
        for place, key in enumerate(keys):
            out_BTH[place, : len(self.known[key])] = self.known[key]
        return out_BTH


class Half:
    """A causal model in two: layers that are remembered, layers that train."""

    def __init__(self, name: str, upper: int, pad: int) -> None:
        whole: Any = load_model(name)
        whole.requires_grad_(False)
        lower = copy.copy(whole.model)
        lower._modules = dict(whole.model._modules)
        count = len(whole.model.layers) - upper
        lower.layers, lower.norm = whole.model.layers[:count], nn.Identity()
        lower.config = copy.deepcopy(whole.config)
        lower.config.num_hidden_layers = count
        self.whole, self.count, self.upper = whole, count, upper
        self.memory = Remembered(lower, pad)

    def fresh(self) -> Any:
        """A causal model of the upper layers, untouched, over the memory."""
        kept = dict(self.whole.model._modules)
        made = copy.copy(self.whole)
        made._modules = dict(self.whole._modules)
        inner = copy.copy(self.whole.model)
        inner._modules = {**kept, "embed_tokens": self.memory}
        inner.layers = copy.deepcopy(self.whole.model.layers[self.count :])
        for place, layer in enumerate(inner.layers):
            layer.self_attn.layer_idx = place
        made.config = copy.deepcopy(self.whole.config)
        made.config.num_hidden_layers = self.upper
        made.config.tie_word_embeddings = False
        made.model, inner.config = inner, made.config
        return made


def read_rows(out: Path, data: str, raters: int | None = None, seed: int = 0) -> Any:
    """The rows of a set; test and validation rows keep all their ratings."""
    template, column, (low, high) = TEXTS[data]
    config = ScoreDataConfig(
        score_dataset=str(out / f"{data}.train.jsonl"),
        score_eval_dataset=str(out / f"{data}.test.jsonl"),
        text_template=template,
        ratings_column=column,
        score_low=low,
        score_high=high,
        raters_kept=raters,
        raters_seed=seed,
        validation_fraction=0.06 if data == "mlqe" else 0.13,
    )
    values = [float(value) for value in ASKED.level_values or []]
    return load_score_rows(config, lambda _: None, values=values)


class World:
    """Rows of both sets, the tokenizer, the model in two."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.args, self.out = args, Path(args.out)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.tokenizer.chat_template = None  # "text, question" as the spec; half the tokens
        self.levels = ASKED.find(self.tokenizer)
        self.encoder = ScoreEncoder(self.tokenizer, self.levels, ScorePrompt.of(ASKED), 256)
        self.half = Half(args.model, args.layers, self.tokenizer.pad_token_id)
        self.arms: list[str] = args.arms
        self.embed: Any = None
        self.read: dict[Any, Any] = {}

    def rows(self, data: str, raters: int, seed: int) -> dict[str, list[dict[str, Any]]]:
        """1,000 training rows and raters drawn by the seed; the rest is the same for all seeds."""
        if data == "mix":
            parts = [self.rows(one, raters, seed) for one in TEXTS]
            names = ("train", "validation", "held_out")
            joined = {name: [row for part in parts for row in part[name]] for name in names}
            joined["train"] = [row for part in parts for row in part["train"][:: TRAIN // MIXED]]
            return {k: [{**row, "row": n} for n, row in enumerate(v)] for k, v in joined.items()}
        if (data, raters, seed) not in self.read:
            found = read_rows(self.out, data, raters, seed)
            drawn = np.random.default_rng([seed, 7]).permutation(len(found.train))[:TRAIN]
            train = [found.train[place] for place in sorted(drawn)]
            held_out = found.held_out[:: self.args.every_test_row]
            made = {"train": train, "validation": found.validation, "held_out": held_out}
            named = {k: [{**row, "group": data} for row in v] for k, v in made.items()}
            self.read[data, raters, seed] = named
        return self.read[data, raters, seed]


def train(world: World, job: Job, rows: dict[str, Any]) -> Any:
    """A trained scorer and facts of its training."""
    label, options = ARMS[job.arm]
    target = LevelTarget.of(TargetConfig(label=label, label_options=options), ASKED)
    target = target.fitted(rows["train"])
    made = tokenize_scores(rows["train"], world.encoder, target, seed=job.seed).rows
    args = ScoreConfig(
        output_dir=str(world.out / "trainer"),
        fidelity_weight=0.0 if job.pairs == "none" else 1.0,
        std_mode="fixed1" if job.pairs == "none" else job.pairs,
        per_device_train_batch_size=BATCH,
        num_train_epochs=world.args.epochs,
        learning_rate=job.rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        bf16=not world.args.float32,
        seed=job.seed,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=20,
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(job.seed)
    peft = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
    )
    trainer = ScoreTrainer(
        world.half.fresh(),
        args,
        levels=world.levels,
        peft_config=peft,
        train_dataset=made,
        processing_class=world.tokenizer,
    )
    trainer.train()
    return trainer.model, trainer.state.log_history[-2:]


def one(world: World, job: Job) -> None:
    """Train, score validation and test rows, write the table of what was said."""
    path = world.out / "runs" / f"{job.name}.json"
    if path.is_file():
        return
    rows, start, cpu = world.rows(job.data, job.raters, job.seed), time.time(), time.process_time()
    found: dict[str, Any] = {}
    if job.arm == "regression":
        found = regression(world, job, rows)
    elif job.arm == "ridge":
        found = ridge(world.embed, job, rows)
    else:
        model, log = train(world, job, rows)
        trained = time.time() - start
        scorer = Scorer(
            model.eval(),
            world.levels,
            processor=world.tokenizer,
            prompt=ScorePrompt.of(ASKED),
            prefix_cache=False,
            batch_size=32,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=not world.args.float32):
            table = scorer.score(rows[job.split])
        said = {"mean": table.mean_N, "std": table.std_N, "probs": table.probs_NL}
        found[job.split] = {name: numbers.tolist() for name, numbers in said.items()}
        found |= {"log": log, "train_seconds": trained}
    found |= {"job": asdict(job), "seconds": time.time() - start}
    path.parent.mkdir(exist_ok=True)
    write_json(path, {**found, "cpu_seconds": time.process_time() - cpu})
    print(f"{job.name}: {found['seconds']:.0f} s, {job.split} {plcc(world, job):.4f}", flush=True)


def plcc(world: World, job: Job) -> float:
    """PLCC with all ratings of the rows scored, a mean over the sets."""
    found = json.loads((world.out / "runs" / f"{job.name}.json").read_text())[job.split]["mean"]
    rows = world.rows(job.data, job.raters, job.seed)[job.split]
    pairs = [(row["group"], said, row["mean"]) for row, said in zip(rows, found, strict=True)]
    by_set = [[(s, m) for g, s, m in pairs if g == group] for group in {p[0] for p in pairs}]
    return float(np.mean([np.corrcoef(np.array(some).T)[0, 1] for some in by_set]))


def best_rate(world: World, job: Job) -> float:
    """The rate of the best validation PLCC of a set's arm; its seed serves nothing else."""
    tried = [replace(job, rate=rate, seed=TUNING) for rate in RATES[job.data]]
    for trial in tried:
        one(world, trial)
    return max(tried, key=lambda trial: plcc(world, trial)).rate


def jobs(world: World, what: str) -> Iterator[Job]:
    """The part of the design, most wanted first; rates are tuned on the way."""
    if what == "ridge":
        for data, folder in (("tweets", world.args.english), ("mlqe", world.args.multilingual)):
            world.embed = embedder(folder)
            for seed, raters in itertools.product(SEEDS, RATERS[data]):
                yield Job(data, "ridge", raters, 0.0, seed)
        return
    if what == "mix":  # the rate of one set alone: pairs are not tuned
        for mixes in MIXES:
            for seed, (arm, pairs) in itertools.product(SEEDS, mixes):
                yield Job("mix", arm, 3, RATES["mix"][0], seed, pairs)
        return
    one_rate = world.args.rate
    rates = {
        arm: one_rate or best_rate(world, Job(what, arm, TUNED[what], 0.0, 0)) for arm in world.arms
    }
    for seed, raters in itertools.product(SEEDS, RATERS[what]):
        yield from (Job(what, arm, raters, rates[arm], seed) for arm in world.arms)


def prepare(args: argparse.Namespace) -> None:
    """Both sets as files of one form: a fixed test split of tweets, en-de's own."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tweets = [json.loads(line) for line in Path(args.tweets).read_text().splitlines()]
    order = np.random.default_rng(2014).permutation(len(tweets))
    cut = {"test": order[:1000], "train": order[1000:]}
    parts = {f"tweets.{k}": [tweets[place] for place in sorted(v)] for k, v in cut.items()}
    for name, file in (("train", "train"), ("test", "test20")):
        with (Path(args.mlqe) / f"{file}.ende.df.short.tsv").open() as lines:
            table = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        parts[f"mlqe.{name}"] = [
            {"src": r["original"], "mt": r["translation"], "scores": ast.literal_eval(r["scores"])}
            for r in table
        ]
    for name, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not (out / f"{name}.jsonl").is_file():
            (out / f"{name}.jsonl").write_text(text)


def check(world: World) -> None:
    """Scores of the model in two against those of the whole model."""
    rows = world.rows("tweets", 10, 0)["held_out"][:64]
    said = []
    for model in (world.half.fresh(), load_model(world.args.model)):
        how = {"processor": world.tokenizer, "prompt": ScorePrompt.of(ASKED)}
        scorer = Scorer(model.eval(), world.levels, prefix_cache=False, **how)
        said.append(scorer.score(rows).level_logits_NL)
    print("largest difference of level logits:", np.abs(said[0] - said[1]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("verb", choices=["run"])
    parser.add_argument("out")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tweets", required=True)
    parser.add_argument("--mlqe", required=True)
    parser.add_argument(
        "--what", choices=["tweets", "mlqe", "mix", "ridge", "check"], required=True
    )
    parser.add_argument("--english", help="frozen encoder of tweets (all-MiniLM-L6-v2)")
    parser.add_argument("--multilingual", help="frozen encoder of en-de (multilingual-e5-small)")
    parser.add_argument("--layers", type=int, default=10, help="upper layers that train")
    parser.add_argument("--float32", action="store_true", help="no bf16: CPUs without its kernels")
    parser.add_argument("--every_test_row", type=int, default=1, help="2: half of them")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rate", type=float, help="one for all arms of a set, tuned on nothing")
    parser.add_argument("--arms", nargs="+", default=[*ARMS, "regression"])
    args = parser.parse_args()
    prepare(args)
    world = World(args)
    if args.what == "check":
        check(world)
        return
    for job in jobs(world, args.what):
        one(world, job)


if __name__ == "__main__":
    main()
