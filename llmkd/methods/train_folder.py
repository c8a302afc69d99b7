"""A trainer run into a run folder: begun, resumed or reused, whichever the folder says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config

from llmkd.hub import push_run
from llmkd.methods.run_folder import RunFolder
from llmkd.trainers.checkpoints import last_whole_checkpoint


def begin_or_reuse(
    run: RunFolder, key: str, settings: dict[str, Any], *, name: str, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """`run.json` of a folder that holds this very run, done; None where there is work to do.

    RunFolderError for a folder that holds another run.
    """
    run.claim(key, settings)
    facts = run.facts()
    if facts and run.finished(key):
        say(f"{name}: reused, {run.path} holds this very run (key {key})")
        return facts
    return None


def train_in(
    run: RunFolder,
    key: str,
    *,
    name: str,
    facts: dict[str, Any],
    recipe: dict[str, Any],
    make: Callable[[], Trainer],
    save: Callable[[Any], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train what `make` gives, from the folder's last whole checkpoint where there is one, and
    `save` it; returns `run.json`.

    `save` puts the model into the folder and ends the run, so that model files appear there only
    after training ended.
    """
    PartialState().wait_for_everyone()
    run.begin(key, facts, recipe)
    checkpoint = last_whole_checkpoint(run.path, clean=run.main)
    if checkpoint is not None:
        say(f"{name}: goes on from {checkpoint.name}")
    trainer = make()
    trainer.add_callback(_KeepTime(run))
    PartialState().wait_for_everyone()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    save(trainer)
    PartialState().wait_for_everyone()
    made = run.facts()
    assert made is not None
    return made


def final_scores(trainer: Any) -> dict[str, Any]:
    """Held-out metrics at the last step; taken from the log where they stand there already."""
    for line in reversed(trainer.state.log_history):
        if "eval_loss" in line and line["step"] == trainer.state.global_step:
            return line
    return trainer.evaluate()


def disk_needed(parameters: int, args: Any) -> int:
    """Bytes for a model and its checkpoints (weights and two Adam moments, 4 bytes each)."""
    kept = 0
    if args.save_strategy != "no":
        saves = max(1, round(1 / args.save_steps)) if args.save_steps < 1 else 3
        kept = (args.save_total_limit or saves) + 1
    return parameters * (4 + 12 * kept) + (64 << 20)


class _KeepTime(TrainerCallback):
    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.keep_time()


def save_trained(trainer: Any, aside: Path, config: ModelConfig, *, main: bool) -> None:
    """Model and tokenizer or processor into `aside`; all ranks call it.

    Of an adapter the merged weights, so that every tool opens the folder, and the adapter itself in
    `adapter/`. It stays alone, at the top, where the base is quantised, or sharded (ZeRO-3, FSDP)
    and so whole on no rank.
    """
    sharded = is_deepspeed_zero3_enabled() or (
        trainer.accelerator.distributed_type == DistributedType.FSDP
    )
    merges = config.use_peft and get_quantization_config(config) is None and not sharded
    trainer.save_model(str(aside / "adapter" if merges else aside))
    if merges and main:
        adapted: Any = trainer.accelerator.unwrap_model(trainer.model)
        adapted.merge_and_unload().save_pretrained(aside)
        trainer.processing_class.save_pretrained(aside)
    PartialState().wait_for_everyone()


def push_folder(folder: Path, args: Any, name: str, say: Callable[[str], None]) -> None:
    """Push a finished run as its training arguments say; main process only. HubError."""
    url = push_run(
        folder,
        args.hub_model_id or "",
        token=args.hub_token,
        private=args.hub_private_repo,
        revision=args.hub_revision,
    )
    say(f"pushed {name} to {url}")
