"""What the settings of a stage may not be, whatever its models."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from llmkd.errors import RecipeError
from llmkd.models.latent_student import PROJECTIONS
from llmkd.objectives.latent import ATTENTION_FORMS
from llmkd.objectives.layer_map import check_layer_map
from llmkd.objectives.prediction import SOFT_FORMS
from llmkd.trainers.arguments import check_save_limit

if TYPE_CHECKING:
    from llmkd.trainers.latent_config import LatentDistillConfig

LOSSES = ("latent", "soft", "hard")
ATTENTION = (*ATTENTION_FORMS, "none")
CHOICES = (("attn", ATTENTION), ("soft", SOFT_FORMS), ("projection", PROJECTIONS))
LARGEST_SEED = 2**32 - 1  # numpy's


def check_config(args: LatentDistillConfig) -> None:
    """RecipeError for values that no stage can have."""
    check_layer_map(args.layer_map, "layer_map")
    for key, known in CHOICES:
        if getattr(args, key) not in known:
            raise RecipeError.of(key, getattr(args, key), "unknown", f"known: {', '.join(known)}")
    for key in ("attn_weight", "hidden_weight", "soft_weight", "hard_weight", "nkd_gamma"):
        if not 0 <= getattr(args, key) < math.inf:
            raise RecipeError.of(key, getattr(args, key), "must be at least 0, and finite")
    if not 0 < args.soft_temperature < math.inf:
        problem = "must be above 0, and finite"
        raise RecipeError.of("soft_temperature", args.soft_temperature, problem)
    _check_unread(args)
    _check_shared(args)


def _check_unread(args: LatentDistillConfig) -> None:
    for key in ("label_smoothing_factor", "neftune_noise_alpha"):
        if getattr(args, key):
            raise RecipeError.of(key, getattr(args, key), "no loss here reads it", "leave it out")


def _check_shared(args: LatentDistillConfig) -> None:
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    for key in (*sizes, "gradient_accumulation_steps"):
        if getattr(args, key) < 1:
            raise RecipeError.of(key, getattr(args, key), "must be at least 1")
    if not 0 <= args.seed <= LARGEST_SEED:
        raise RecipeError.of("seed", args.seed, f"must lie in 0..{LARGEST_SEED:,}")
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise RecipeError.of(
            "num_train_epochs",
            args.num_train_epochs,
            f"and max_steps {args.max_steps} leave nothing to train",
            "--num_train_epochs 3, or --max_steps 1000",
            "to leave a stage out, take it out of stages",
        )
    if args.attn != "none":
        for key in ("gradient_checkpointing", "torch_compile"):
            if getattr(args, key):
                raise RecipeError.of(
                    key,
                    True,
                    f"attention maps (attn {args.attn}) are recorded while the model runs once",
                    f"--{key} false",
                    "--attn none: hidden states alone",
                )
    check_save_limit(args)


def check_losses(losses: Any, key: str) -> tuple[str, ...]:
    """Names of a stage's losses, each once; RecipeError otherwise."""
    if isinstance(losses, str):
        losses = [losses]
    known = isinstance(losses, list | tuple) and all(name in LOSSES for name in losses)
    if not known or not losses:
        raise RecipeError.of(key, losses, "must be a list", f"of {', '.join(LOSSES)}")
    return tuple(name for name in LOSSES if name in losses)


def check_weights(losses: Collection[str], args: LatentDistillConfig) -> None:
    """RecipeError where weights leave nothing of a stage's latent loss, or of all its losses."""
    parts = {
        "latent": (args.attn_weight if args.attn != "none" else 0)
        + (args.hidden_weight if args.hidden else 0),
        "soft": args.soft_weight,
        "hard": args.hard_weight,
    }
    nothing = [name for name in LOSSES if name in losses and not parts[name]]
    if "latent" in nothing:
        off = args.attn == "none" and not args.hidden
        key, value = ("attn", "none") if off else ("attn_weight", args.attn_weight)
        with_it = f"hidden {str(args.hidden).lower()}, hidden_weight {args.hidden_weight}"
        raise RecipeError.of(
            key,
            value,
            f"and {'hidden false' if off else with_it} leave no latent loss",
            "--hidden true" if off else "a weight above 0 for a part that is on",
            "or leave latent out of the stage's losses",
        )
    if nothing and len(nothing) == len(set(losses)):
        key = f"{nothing[0]}_weight"
        raise RecipeError.of(key, 0.0, f"leaves the stage without a loss ({', '.join(nothing)})")
