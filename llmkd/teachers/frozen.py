"""A model that only answers: frozen, checked for NaN, placed where the run's ranks want it."""

from __future__ import annotations

import gc
from typing import Any

import torch

from llmkd.errors import TeacherError


def freeze(model: Any, name: str) -> None:
    """Evaluation mode, no gradients; TeacherError naming the first weight with NaN or infinity."""
    model.requires_grad_(False)
    model.eval()
    # Under ZeRO-3 each rank sees its own shard; together they see every weight.
    for weight_name, weight in model.named_parameters():
        values = getattr(weight, "ds_tensor", weight)
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise TeacherError.of(
                "teacher",
                name,
                f"its weight {weight_name} holds NaN or infinity",
                "download or export it again; a truncated or overflowed file looks like this",
            )


def place(model: Any, accelerator: Any) -> Any:
    """The model where it will answer: sharded under ZeRO-3 and FSDP, else one copy a rank."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from trl.models.utils import prepare_deepspeed

        model = prepare_deepspeed(model, accelerator)
    elif accelerator.distributed_type == DistributedType.FSDP:
        from trl.models.utils import prepare_fsdp

        model = prepare_fsdp(model, accelerator)
    else:
        model.to(accelerator.device)
    model.eval()
    return model


def let_go(model: Any) -> None:
    """Free what a placed model holds beside its weights; the caller drops its reference after."""
    if hasattr(model, "destroy"):  # DeepSpeed engine: drops hooks and partitioned shards
        model.destroy()


def collect() -> None:
    """Give memory of dropped weights back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
