"""What every trainer's arguments are held to, beside its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkd.errors import RecipeError

SIZES = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
RATES = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")
UNREAD = ("label_smoothing_factor", "neftune_noise_alpha")  # by losses of ours


def check_sizes(args: Any, least: Mapping[str, int]) -> None:
    """RecipeError where a batch size is below 1 or a key of `least` below its value."""
    for key in (*least, *SIZES):
        value = getattr(args, key)
        if value is not None and value < least.get(key, 1):
            raise RecipeError.of(key, value, f"must be at least {least.get(key, 1)}")


def check_rates(args: Any) -> None:
    """RecipeError where a rate is negative, infinite or no number."""
    for key in RATES:
        if not 0 <= float(getattr(args, key) or 0.0) < float("inf"):
            raise RecipeError.of(key, getattr(args, key), "must be a number, at least 0")


def check_unread(args: Any) -> None:
    """RecipeError for settings of upstream's losses that ours do not read."""
    for key in UNREAD:
        if getattr(args, key):
            raise RecipeError.of(key, getattr(args, key), "no loss here reads it", "leave out")


def check_save_limit(args: Any) -> None:
    """RecipeError for a single checkpoint: a crash while saving would leave none."""
    if args.save_total_limit == 1:
        raise RecipeError.of(
            "save_total_limit",
            1,
            "the only checkpoint is deleted before its successor is known to be whole",
            "--save_total_limit 2",
        )
