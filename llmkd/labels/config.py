"""Recipe keys of a label store: which labels, where they lie."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields

from llmkd.errors import RecipeError
from llmkd.labels.dense import MOST_CLASSES
from llmkd.labels.encodings import AnyEncoding, make_encoding
from llmkd.types import TAILS


@dataclass(kw_only=True)
class LabelConfig:
    """Soft labels made once by `llmkd label` and read in training, without a teacher in memory."""

    label_store: str | None = field(
        default=None,
        metadata={
            "help": "Folder that `llmkd label` writes. Training that names it (or a Hub dataset) "
            "reads the labels there and needs no teacher in memory."
        },
    )
    label_store_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub label store."}
    )
    label_tail: str | None = field(
        default=None,
        metadata={
            "help": "What a top k's unlisted mass means: bucket (one event 'any other', default), "
            "renorm (nothing), smooth (spread evenly)."
        },
    )
    label_encoding: str = field(
        default="sampled",
        metadata={
            "help": "What is written: sampled (draws, unbiased, fewest bytes), topk, hidden (final "
            "hidden states: the whole distribution), lowrank (a projection of them), dense (every "
            "logit: heads of at most 4,096 classes)."
        },
    )
    label_draws: int = field(default=50, metadata={"help": "Draws a token of sampled, 1 to 255."})
    label_sampling: str = field(
        default="systematic",
        metadata={
            "help": "How sampled draws: systematic (evenly spaced on the cumulative distribution, "
            "ours) or multinomial (RS-KD's). Both are unbiased; the first has less variance."
        },
    )
    label_k: int = field(default=50, metadata={"help": "Tokens listed by topk."})
    label_value_bits: int = field(
        default=16, metadata={"help": "Bits of a log-probability of topk, 16 or 8."}
    )
    label_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Numbers of hidden and lowrank: int8 (default), bfloat16, float32 (hidden "
            "only); of dense: float32 (default), float16."
        },
    )
    label_rank: int = field(default=64, metadata={"help": "Numbers a token of lowrank."})
    label_rows: str = field(
        default="all",
        metadata={
            "help": "Rows to label: all of the train split, or stage1: only those that this "
            "recipe's KD stage trains on (seed, batch and kd_ratio decide)."
        },
    )
    label_seed: int = field(default=0, metadata={"help": "Seed of the draws."})
    label_batch_size: int = field(default=8, metadata={"help": "Rows the teacher reads at once."})
    label_rows_per_shard: int = field(
        default=256, metadata={"help": "Rows of a shard: what a killed run loses at most."}
    )
    label_fit_rows: int = field(
        default=32, metadata={"help": "Rows whose hidden states lowrank is fitted on."}
    )
    label_memory_mib: int = field(
        default=128, metadata={"help": "MiB that labelling may take for logits."}
    )
    overwrite_labels: bool = field(
        default=False, metadata={"help": "Delete a store of other settings in label_store first."}
    )

    def __post_init__(self) -> None:
        if self.label_tail is not None and self.label_tail not in TAILS:
            raise RecipeError.of("label_tail", self.label_tail, f"known: {', '.join(TAILS)}")
        if self.label_rows not in ("all", "stage1"):
            raise RecipeError.of("label_rows", self.label_rows, "known: all, stage1")
        for key in ("batch_size", "rows_per_shard", "fit_rows", "memory_mib"):
            if getattr(self, f"label_{key}") < 1:
                raise RecipeError.of(f"label_{key}", getattr(self, f"label_{key}"), "at least 1")
        # each encoding knows its own limits; those of a teacher come when there is one
        shared = MOST_CLASSES if self.label_encoding == "dense" else sys.maxsize
        self.encoding(shared=shared, width=sys.maxsize)

    def encoding(self, *, shared: int, width: int, temperature: float = 1.0) -> AnyEncoding:
        """The encoding named, for a teacher of that shared vocabulary and hidden size; RecipeError
        naming the key whose value it cannot have.
        """
        if self.label_encoding == "lowrank" and self.label_rank > width:
            raise RecipeError.of(
                "label_rank",
                self.label_rank,
                f"the teacher's hidden states have {width} numbers",
                f"1 to {width}",
            )
        return make_encoding(
            self.label_encoding,
            shared=shared,
            width=width,
            temperature=temperature,
            seed=self.label_seed,
            k=self.label_k,
            value_bits=self.label_value_bits,
            draws=self.label_draws,
            sampling=self.label_sampling,  # pyright: ignore[reportArgumentType]
            dtype=self.label_dtype,  # pyright: ignore[reportArgumentType]
            rank=self.label_rank,
        )


# Reading a store depends on where it is and on the tail; the rest says how one is written.
WRITING_KEYS = tuple(
    f.name
    for f in fields(LabelConfig)
    if f.name not in ("label_store", "label_store_revision", "label_tail")
)
