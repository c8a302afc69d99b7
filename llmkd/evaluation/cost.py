"""What a token costs in floating point operations."""

from __future__ import annotations

from transformers import PretrainedConfig


def forward_flops(config: PretrainedConfig, length: int) -> float:
    """FLOPs of one forward pass for one token in rows of `length` tokens.

    TRL's count for models of Llama's shape (projections, attention over the whole row, head; the
    embedding is a look-up and costs nothing); for other shapes 2 per parameter outside the input
    embedding. Training is three times a forward.
    """
    from trl.trainer.utils import compute_flops_per_token

    try:
        return compute_flops_per_token(config, length) / 3
    except (AttributeError, TypeError):
        from llmkd.models.build import count_parameters

        embedding = config.vocab_size * config.hidden_size
        tied = getattr(config, "tie_word_embeddings", False)
        return 2.0 * (count_parameters(config) - (0 if tied else embedding))
