"""What a run writes down while it goes: `metrics.jsonl`, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmkd.trainers.checkpoints import cut_metrics

LEFT_OUT = ("epoch", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class MetricsFile(TrainerCallback):
    """Append every log line of rank 0 to `metrics.jsonl` in `folder`.

    On a resume, lines later than the checkpoint are dropped first, so that each step stands there
    once.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin a new file, or cut an old one back to where this run goes on."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_metrics(self.path, state.global_step if state.global_step else -1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one line; step and target tokens so far come first."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
        line |= {name: value for name, value in logs.items() if name not in LEFT_OUT}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
