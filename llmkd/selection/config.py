"""Recipe keys that say which rows deserve the soft labels."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkd.errors import RecipeError


@dataclass(kw_only=True)
class SelectionConfig:
    """Rows of the KD stage; the rest of the run uses ordinary data."""

    selection: str | None = field(
        default=None,
        metadata={
            "help": "salt_ds (SALT's selection by an early small model), random (its control), or "
            "nothing: stage 1 takes rows as they come."
        },
    )
    selection_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The model that scores, an early checkpoint of the small LM. By default the "
            "one "
            "saved while this recipe trains its teacher, else the teacher itself (said in the log)."
        },
    )
    selection_top_k: int = field(
        default=10,
        metadata={"help": "Tokens the scoring model ranks below this do not count (paper: 10)."},
    )
    selection_min_kept: float = field(
        default=0.1,
        metadata={"help": "Rows with a smaller share of counted tokens are never selected. Ours."},
    )
    selection_early_ratio: float = field(
        default=0.125,
        metadata={
            "help": "When the early checkpoint is taken, as a share of the teacher's own steps "
            "(26K of 208K, recalled from the paper, not verified)."
        },
    )
    selection_batch_size: int = field(default=16, metadata={"help": "Rows scored at once."})
    selection_scores: str | None = field(
        default=None, metadata={"help": "Use this scores.parquet of `llmkd select` instead."}
    )

    def __post_init__(self) -> None:
        for key in ("selection_min_kept", "selection_early_ratio"):
            value = getattr(self, key)
            if not 0.0 <= value <= 1.0:
                raise RecipeError.of(key, value, "must lie in [0, 1]")
        for key in ("selection_top_k", "selection_batch_size"):
            if getattr(self, key) < 1:
                raise RecipeError.of(key, getattr(self, key), "must be at least 1")
