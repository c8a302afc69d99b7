"""The scorer and the rows that train, checked; what is said about pairs before the first step."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset

from llmkd.data.levels import Levels
from llmkd.data.score_checks import check_score_rows, groups_of
from llmkd.data.score_collator import NEEDED, OPTIONAL, in_pairs
from llmkd.errors import DataError, RecipeError
from llmkd.teachers.loading import load_model
from llmkd.trainers.peft import with_adapter
from llmkd.trainers.score_config import ScoreConfig

logger = logging.getLogger(__name__)


def ready_scorer(model: Any, args: Any, levels: Levels, peft_config: Any) -> Any:
    """The model that trains, from a model, Hub id or folder; an adapter where one is configured."""
    if not isinstance(args, ScoreConfig):
        raise RecipeError.of("args", type(args).__name__, "ScoreTrainer takes a ScoreConfig")
    if isinstance(model, str):
        model = load_model(model)
    vocab = model.config.get_text_config().vocab_size
    if max(levels.ids_L) >= vocab:
        problem = f"the model's vocabulary has {vocab} entries"
        way = "find the levels with the model's own tokenizer"
        raise RecipeError.of("levels", list(levels.ids_L), problem, way)
    return model if peft_config is None else with_adapter(model, peft_config, args)


def ready_rows(rows: Any, key: str, model: Any, args: ScoreConfig, levels: Levels) -> Any:
    """Checked rows; a dict of such sets too. Of rows that are made when they are asked for
    (`ImageRows`) only the first is looked at.
    """
    if rows is None:
        return None
    if isinstance(rows, dict):
        for name, some in rows.items():
            ready_rows(some, f"{key}.{name}", model, args, levels)
        return rows
    if not isinstance(rows, Dataset) and not hasattr(rows, "__getitem__"):
        raise DataError.of(
            key,
            type(rows).__name__,
            "tokenized rows must have a length and numbers: they are checked before the first step",
            "Dataset.from_list([...]) or Dataset.from_generator(...)",
        )
    config = model.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None)
    if args.max_length is not None:
        window = min(args.max_length, window or args.max_length)
    looked_at: Any = rows
    if not isinstance(rows, Dataset):  # images are read when they are asked for: only the first
        looked_at = Dataset.from_list([_numbers(rows[at]) for at in range(min(1, len(rows)))])
    check_score_rows(looked_at, key, levels, vocab=config.vocab_size, window=window)
    return rows


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in (*NEEDED, *OPTIONAL) if name in row}


def check_groups(rows: Any, args: ScoreConfig) -> None:
    """DataError where no pair can ever be drawn; a warning that counts the rows without one."""
    if rows is None or not args.fidelity_weight:
        return
    known = groups_of(rows, need_std=args.pair_loss == "fidelity")
    if known is None:
        return
    group_N, able_N = known
    alone = int((able_N & ~in_pairs(group_N, able_N)).sum())
    without = int((~able_N).sum())
    if alone + without == len(rows):
        raise DataError.of(
            "fidelity_weight",
            args.fidelity_weight,
            f"no pair can be drawn: {alone} of {len(rows)} rows are alone in their group, "
            f"{without} have no known spread (score_std)",
            "--fidelity_weight 0 trains without pairs",
            "--pair_loss binary pairs rows whose raters' spread is unknown",
            "one group (group_column) for all rows whose scores are of one scale",
            "more training rows",
        )
    if alone + without:
        logger.warning(
            "%d of %d rows draw no pair: %d are alone in their group, "
            "%d have no known spread (score_std)",
            alone + without,
            len(rows),
            alone,
            without,
        )
