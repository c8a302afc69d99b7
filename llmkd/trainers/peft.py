"""LoRA students: one place that turns a model into an adapter on a frozen base."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, TrainingArguments


def with_adapter(model: PreTrainedModel, peft_config: Any, args: TrainingArguments) -> Any:
    """Wrap `model` with `peft_config`; makes gradient checkpointing work on the frozen base.

    Raises ValueError from peft where a target module does not exist.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=bool(args.gradient_checkpointing)
        )
    elif args.gradient_checkpointing:
        # The embeddings are frozen: without this no input of a checkpointed layer has a gradient.
        model.enable_input_require_grads()
    return get_peft_model(model, peft_config)
