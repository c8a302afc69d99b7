"""A progress bar that stays one line: the numbers stand beside it instead of above it."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

SHOWN = {"loss": "loss", "eval_loss": "held-out", "kd_weight": "kd"}


class Bar(ProgressCallback):
    """Upstream's bar with a name; log lines go to `metrics.jsonl`, not to the screen."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)
            self.training_bar.initial = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Put the latest numbers beside the bar."""
        if state.is_world_process_zero and self.training_bar is not None:
            for key, label in SHOWN.items():
                if key in (logs or {}):
                    self.shown[label] = f"{logs[key]:.4g}"
            self.training_bar.set_postfix(self.shown)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No second bar: evaluations are short and would push the first one up the screen."""
        if self.training_bar is None:
            super().on_prediction_step(args, state, control, **kwargs)


def quiet_bar(trainer: Trainer, name: str) -> None:
    """Replace upstream's progress callback by `Bar` (nothing where tqdm is off)."""
    for kind in (ProgressCallback, PrinterCallback):
        removed: TrainerCallback | None = trainer.pop_callback(kind)
        if removed is not None and kind is ProgressCallback:
            trainer.add_callback(Bar(name))
