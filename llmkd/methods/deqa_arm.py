"""One arm of a DeQA-Score run: its targets, its training, its scorer in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import set_seed
from trl import get_peft_config, get_quantization_config

from llmkd.data.score_tokens import ImageRows, group_ids
from llmkd.files import move_into
from llmkd.methods.deqa_config import ScorerModelConfig, TargetConfig
from llmkd.methods.deqa_plan import Plan
from llmkd.methods.deqa_targets import LevelTarget
from llmkd.methods.run_folder import RunFolder, check_room, result_settings
from llmkd.methods.steps import global_batch
from llmkd.methods.train_folder import begin_or_reuse, disk_needed, save_trained, train_in
from llmkd.models.scorer import save_levels
from llmkd.models.scorer_files import load_level_model
from llmkd.teachers.loading import load_model
from llmkd.trainers import ScoreConfig, ScoreTrainer
from llmkd.trainers.bar import quiet_bar
from llmkd.trainers.callbacks import MetricsFile
from llmkd.trainers.score_ready import check_groups

SHOWN = ("loss", "level_kl", "answer_ce", "fidelity", "in_level", "level_mass", "order", "unpaired")


@dataclass
class Arm:
    """A recipe with an arm's changes, and the folder its scorer lands in; the single unnamed arm
    takes the run's own.
    """

    plan: Plan
    name: str
    changes: dict[str, Any]

    def __post_init__(self) -> None:
        plan = self.plan
        assert plan.rows is not None
        self.recipe = plan.recipe.with_changes(self.changes)
        self.folder = plan.folder / self.name if self.name else plan.folder
        self.label = self.name or "deqa"
        self.args = self.recipe.build_one(
            ScoreConfig, output_dir=str(self.folder), push_to_hub=False
        )
        self.model = self.recipe.build_one(ScorerModelConfig)
        target = LevelTarget.of(self.recipe.build_one(TargetConfig), plan.asked)
        self.target = target.fitted(plan.rows.train)
        self.run = RunFolder(self.folder, main=plan.main)
        self.settings = result_settings(plan.settings(self.changes))
        self.key = plan.key(self.changes, global_batch(self.args))

    def rows(self, split: str) -> Dataset | ImageRows:
        """A split's rows with this arm's targets, in the trainer's format."""
        given = getattr(self.plan.rows, split)
        return self.plan.tokenized(split, self.args.seed, self.target(given))

    def check(self) -> None:
        """Everything that can be refused before the first file is written: a folder with another
        run, texts without room, rows without a pair.
        """
        rows = self.plan.rows
        assert rows is not None
        if not self.plan.replaces:
            claim = partial(self.run.claim, self.key, self.settings)
            self.plan.unless_overwritten(claim)
        finished = self.run.finished(self.key) and not self.plan.replaces
        if broadcast_object_list([finished])[0]:
            return  # its rows were checked before it was trained
        for split in ("train", "held_out", "validation"):
            if getattr(rows, split):
                _ = self.rows(split)
        if self.args.fidelity_weight:
            stds = [row["std"] for row in rows.train]
            groups = {"group_id": group_ids(rows.train), "score_std": stds}
            check_groups(Dataset.from_dict(groups), self.args)


def train(arm: Arm) -> dict[str, Any]:
    """Train, resume or reuse one arm; returns its `run.json`."""
    facts = begin_or_reuse(arm.run, arm.key, arm.settings, name=arm.label, say=arm.plan.say)
    if facts is not None:
        return facts
    recipe = {**arm.recipe.public(), "output_dir": str(arm.folder)}
    return train_in(
        arm.run,
        arm.key,
        name=arm.label,
        facts=_facts(arm),
        recipe={k: v for k, v in recipe.items() if k not in ("arms", "overwrite_run")},
        make=lambda: make_trainer(arm),
        save=lambda trainer: save(arm, trainer),
        say=arm.plan.say,
    )


def make_trainer(arm: Arm) -> ScoreTrainer:
    """The trainer of one arm with its model and rows; while it trains it is asked about the
    validation rows, or the held-out ones where there are none.
    """
    # Each trainer brings its own accelerator; without the reset DeepSpeed refuses a second one.
    AcceleratorState._reset_state()
    plan = arm.plan
    assert plan.levels is not None and plan.rows is not None
    arm.target.counts.clear()
    rows = arm.rows("train")
    told = ", ".join(f"{count} {name}" for name, count in arm.target.counts.items() if count)
    plan.say(f"{arm.label}: targets by {arm.target.words}" + (f" ({told})" if told else ""))
    model = _model(arm)
    size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    check_room(arm.folder, disk_needed(size, arm.args))
    set_seed(arm.args.seed)  # a fresh adapter is drawn before the trainer sets its seed
    trainer = ScoreTrainer(
        model,
        arm.args,
        levels=plan.levels,
        peft_config=get_peft_config(arm.model),
        train_dataset=rows,
        eval_dataset=arm.rows("validation" if plan.rows.validation else "held_out"),
        processing_class=plan.processor,
        callbacks=[MetricsFile(arm.folder)],
    )
    quiet_bar(trainer, arm.label)
    return trainer


def _model(arm: Arm) -> Any:
    name, config = str(arm.model.model_name_or_path), arm.model
    options: dict[str, Any] = {
        "revision": config.model_revision,
        "dtype": config.dtype,
        "attn": config.attn_implementation,
    }
    if arm.plan.sees:
        return load_level_model(name, **options)
    return load_model(name, **options, quantization=get_quantization_config(config))


def save(arm: Arm, trainer: ScoreTrainer) -> None:
    """Scorer, tokenizer or processor and `levels.json` into the folder; ends its run."""
    aside = arm.folder / ".model.part"
    save_trained(trainer, aside, arm.model, main=arm.run.main)
    if not arm.run.main:
        return
    save_levels(aside, arm.plan.saved_levels())
    move_into(aside, arm.folder)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    arm.run.end(
        train={name: lines[-1].get(name) for name in SHOWN if name in lines[-1]} if lines else {},
        tokens=trainer.state.num_input_tokens_seen,
        steps=trainer.state.global_step,
    )


def _facts(arm: Arm) -> dict[str, Any]:
    args = arm.args
    return {
        "kind": "deqa",
        "name": arm.label,
        "seed": args.seed,
        **arm.plan.facts(),
        "label": arm.target.words,
        "schedule": {
            "fidelity_weight": args.fidelity_weight,
            "level_weight": args.level_weight,
            "in_level_weight": args.in_level_weight,
            "std_mode": args.std_mode,
            "kl_over": args.kl_over,
            "batch_rows": global_batch(args),
            "learning_rate": args.learning_rate,
            "use_peft": bool(arm.model.use_peft),
        },
        "settings": arm.settings,
    }
