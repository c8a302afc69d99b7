"""The second half of an iteration: regress the policy's log-ratios on the preference logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset, load_from_disk
from transformers import set_seed
from trl import get_peft_config

from llmkd.files import digest, move_into
from llmkd.methods.irepo_policy import Policy, load_policy
from llmkd.methods.irepo_sample import Iteration, check_not_all_ties, clock, write_pairs
from llmkd.methods.run_folder import RunFolder, check_room, result_settings
from llmkd.methods.steps import global_batch
from llmkd.methods.train_folder import begin_or_reuse, disk_needed, final_scores, train_in
from llmkd.trainers import IrepoConfig, IrepoTrainer
from llmkd.trainers.bar import quiet_bar
from llmkd.trainers.callbacks import MetricsFile

SHOWN = ("loss", "accuracy", "margin", "target", "logratio_reference", "logratio_initial")


@dataclass
class Regression:
    """One training: the pairs, and the folder the iterate lands in."""

    it: Iteration
    pairs: Dataset

    def __post_init__(self) -> None:
        plan = self.it.plan
        self.folder = self.it.folder / "model"
        seed = plan.training.seed + self.it.number
        self.args = plan.recipe.build_one(
            IrepoConfig, output_dir=str(self.folder), push_to_hub=False, seed=seed
        )
        self.run = RunFolder(self.folder, main=plan.main)
        self.settings = result_settings(plan.settings)
        rows: Any = self.pairs
        columns = [rows[name] for name in ("ids_1", "ids_2", "pref_logit", "ref_logps_1")]
        data = digest([list(column) for column in columns])
        self.key = digest([plan.key, self.it.number, data, global_batch(self.args)])

    @property
    def adapts(self) -> bool:
        """Whether what is trained is an adapter."""
        return bool(self.it.plan.policy.use_peft)


def given_pairs(it: Iteration) -> None:
    """`pairs/` of a preference file, with log-probabilities of the reference as columns."""
    given = it.plan.pairs
    assert given is not None
    rows: list[Any] = list(given.train)
    it.facts |= {
        "prompts": len({str(row["prompt_ids"]) for row in rows}),
        "responses": 2 * len(rows),
        "label": given.label,
    }
    check_not_all_ties(rows)
    with clock(it, "reference"):
        write_pairs(it, rows)


def regress(it: Iteration) -> Policy:
    """Train, resume or reuse the next iterate."""
    plan = it.plan
    one = Regression(it, load_from_disk(str(it.folder / "pairs")))  # type: ignore[arg-type]
    with clock(it, "train"):
        facts = begin_or_reuse(one.run, one.key, one.settings, name=it.label, say=plan.say)
        if facts is None:
            facts = train_in(
                one.run,
                one.key,
                name=it.label,
                facts=_facts(one),
                recipe=plan.recipe.public(),
                make=lambda: make_trainer(one),
                save=lambda trainer: save(one, trainer),
                say=plan.say,
            )
    it.facts |= {
        "pairs": len(one.pairs),
        "mean_abs_logit": sum(abs(x) for x in one.pairs["pref_logit"]) / len(one.pairs),
        "train": facts["train"],
        "tokens": facts.get("tokens"),
    }
    if scores := facts.get("held_out_pairs"):
        it.facts["held_out_pairs"] = scores
    start = plan.start
    assert start is not None
    if one.adapts:
        return Policy(start.source, start.revision, str(one.folder))
    return Policy(str(one.folder))


def make_trainer(one: Regression) -> IrepoTrainer:
    """The trainer of one iteration with its policy and pairs."""
    # Each trainer brings its own accelerator; without the reset DeepSpeed refuses a second one.
    AcceleratorState._reset_state()
    plan, policy = one.it.plan, one.it.policy
    model = load_policy(policy, plan.policy, trainable=True)
    size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    check_room(one.folder, disk_needed(0 if one.adapts else size, one.args))
    fresh = one.adapts and policy.adapter is None
    given = plan.pairs
    set_seed(one.args.seed)  # a fresh adapter is drawn before the trainer sets its seed
    trainer = IrepoTrainer(
        model,
        one.args,
        eval_dataset=None if given is None else given.held_out,
        peft_config=get_peft_config(plan.policy) if fresh else None,
        train_dataset=one.pairs,
        processing_class=plan.tokenizer,
        callbacks=[MetricsFile(one.folder)],
    )
    quiet_bar(trainer, one.it.label)
    return trainer


def save(one: Regression, trainer: IrepoTrainer) -> None:
    """Model or adapter and tokenizer into the folder; ends its run."""
    scores = final_scores(trainer) if trainer.eval_dataset is not None else {}
    aside = one.folder / ".model.part"
    trainer.save_model(str(aside))
    PartialState().wait_for_everyone()
    if not one.run.main:
        return
    move_into(aside, one.folder)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    shown = {name: lines[-1].get(name) for name in SHOWN} if lines else {}
    known = (*SHOWN, "pairs")
    one.run.end(
        train=shown,
        held_out_pairs={k: scores[f"eval_{k}"] for k in known if f"eval_{k}" in scores},
        tokens=trainer.state.num_input_tokens_seen,
        steps=trainer.state.global_step,
    )


def _facts(one: Regression) -> dict[str, Any]:
    plan, args = one.it.plan, one.args
    return {
        "kind": "iterate",
        "name": one.it.label,
        "seed": args.seed,
        "data": {"pairs": len(one.pairs)},
        "policy": {"from": vars(one.it.policy)},
        "schedule": {
            "loss": args.loss,
            "beta": args.beta,
            "reference": args.reference,
            "batch_pairs": global_batch(args),
            "learning_rate": args.learning_rate,
        },
        "settings": one.settings,
        "run": str(Path(plan.folder)),
    }
