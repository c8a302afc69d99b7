"""Recipe keys that say which preference file is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkd.errors import RecipeError

LABELS = ("auto", "pref_logit", "probability", "votes", "reward", "hard")


@dataclass(kw_only=True)
class PreferenceConfig:
    """Pairs that somebody judged before, in TRL's preference formats, with hard or soft labels."""

    preference_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local file or folder (jsonl, json, parquet, csv) with chosen and "
            "rejected (or response_1 and response_2) and prompt; a prompt that stands in both "
            "responses is found. Text, or the messages of a chat."
        },
    )
    preference_dataset_name: str | None = field(
        default=None, metadata={"help": "Configuration (subset) name of a Hub dataset."}
    )
    preference_split: str = field(default="train", metadata={"help": "Split to take pairs from."})
    preference_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    preference_label: str = field(
        default="auto",
        metadata={
            "help": "How sure the preference for chosen (or response_1) is: pref_logit, "
            "probability, votes (columns wins and votes), reward (reward_chosen and "
            "reward_rejected, or score_ and 1, 2), hard (chosen won), or auto: what the file has."
        },
    )
    hard_label_clip: float = field(
        default=0.01,
        metadata={
            "help": "Probabilities are clipped to [this, 1 - this] before the logit; a hard label "
            "is logit(1 - this). In (0, 0.5)."
        },
    )
    reward_temperature: float = field(
        default=1.0,
        metadata={"help": "Divides reward gaps: rewards have a scale of their own. Above 0."},
    )
    drop_long_rows: bool = field(
        default=False,
        metadata={"help": "Leave out pairs longer than the window (counted) instead of refusing."},
    )
    max_pairs: int | None = field(
        default=None, metadata={"help": "Keep this many training pairs, after the shuffle."}
    )
    held_out_pairs: int = field(
        default=0, metadata={"help": "Pairs kept back for evaluation; none shares a prompt."}
    )
    preference_seed: int = field(
        default=0, metadata={"help": "Seed of the shuffle and the held-out split."}
    )

    def __post_init__(self) -> None:
        if self.preference_label not in LABELS:
            known = f"known: {', '.join(LABELS)}"
            raise RecipeError.of("preference_label", self.preference_label, "unknown", known)
        if not 0.0 < self.hard_label_clip < 0.5:
            raise RecipeError.of("hard_label_clip", self.hard_label_clip, "must lie in (0, 0.5)")
        if not 0.0 < self.reward_temperature < float("inf"):
            problem = "must be above 0, and finite"
            raise RecipeError.of("reward_temperature", self.reward_temperature, problem)
        for key, least in (("max_pairs", 1), ("held_out_pairs", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise RecipeError.of(key, value, f"must be at least {least}")
