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
            "help": "How the rows of stage 1 are chosen. random: the control; salt_ds: largest "
            "median loss over tokens in the scoring model's top k (SALT); el2n: largest error norm "
            "(Paul 2021); margin: smallest top-2 margin; kcenter: rows that cover the pool (Sener "
            "2018); rad: small margins, drawn robustly to a teacher's mistakes (Baykal 2022). "
            "Nothing: rows as they come."
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
        metadata={
            "help": "salt_ds: tokens the scoring model ranks below this do not count (paper: 10)."
        },
    )
    selection_min_kept: float = field(
        default=0.1,
        metadata={
            "help": "salt_ds: rows with a smaller share of counted tokens are never selected. Ours."
        },
    )
    selection_rad_mistakes: float | None = field(
        default=None,
        metadata={
            "help": "rad: rows of the pool on which the teacher is wrong; below 1 a share, from 1 "
            "on a count (paper: the teacher's error on held-out rows; default: 0.1, ours)."
        },
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
        wrong = self.selection_rad_mistakes or 0.0
        if not 0.0 <= wrong < float("inf") or (wrong > 1 and wrong % 1):
            raise RecipeError.of(
                "selection_rad_mistakes", wrong, "must be a share in [0, 1) or a whole number"
            )
