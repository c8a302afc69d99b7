"""What of a policy and its pairs can be refused or warned of before training, and the held-out
metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction

from llmkd.data.pair_checks import check_pairs
from llmkd.errors import DataError, RecipeError
from llmkd.teachers.loading import load_model
from llmkd.trainers.irepo_config import IrepoConfig
from llmkd.trainers.irepo_reference import References
from llmkd.trainers.peft import with_adapter
from llmkd.types import LossTerm

if TYPE_CHECKING:
    from llmkd.trainers.irepo import IrepoTrainer

# rates that functional dropout reads, in attention and elsewhere
DROPOUTS = ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout", "layerdrop")
logger = logging.getLogger(__name__)


def ready_policy(model: Any, args: Any, peft_config: Any) -> Any:
    """The model that trains, from a model, Hub id or folder; an adapter where one is configured."""
    if not isinstance(args, IrepoConfig):
        raise RecipeError.of("args", type(args).__name__, "IrepoTrainer takes an IrepoConfig")
    if isinstance(model, str):
        model = load_model(model)
    if peft_config is not None:
        model = with_adapter(model, peft_config, args)
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in DROPOUTS:
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    return model


def ready_pairs(rows: Any, key: str, policy: Any, args: IrepoConfig, made: References) -> Any:
    """Checked pairs, numbered where their references must be computed; a dict of such sets too."""
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {
            name: ready_pairs(some, f"{key}.{name}", policy, args, made)
            for name, some in rows.items()
        }
    if not isinstance(rows, Dataset):
        raise DataError.of(
            key,
            type(rows).__name__,
            "pairs are a datasets.Dataset: they are checked, and counted, before the first step",
            "Dataset.from_list([...]) or Dataset.from_generator(...)",
        )
    config = policy.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None)
    if args.max_length is not None:
        window = min(args.max_length, window or args.max_length)
    check_pairs(rows, key, vocab=config.vocab_size, window=window)
    return made.number(rows)


def warn_of_hard_labels(rows: Any, args: IrepoConfig) -> None:
    """Warn where every logit has one size: hard labels, and then the square loss is IPO."""
    if rows is None or len(rows) < 2:
        return
    sizes = np.abs(np.asarray(rows["pref_logit"], float))
    size = float(sizes[0]) if args.max_logit is None else min(float(sizes[0]), args.max_logit)
    if not size or not np.allclose(sizes, sizes[0], rtol=1e-6, atol=0.0):
        return
    if args.loss in ("irepo", "irepo_weighted", "rebel"):
        means = (
            f"{args.loss} is then IPO at tau = beta / (2 |logit|) = {args.beta / (2 * size):.4g}"
        )
    elif args.loss == "soft_dpo":
        means = f"soft_dpo is then DPO with label_smoothing {1 / (1 + np.exp(size)):.4g}"
    else:
        return
    logger.warning(
        "pref_logit: all %d pairs have |logit| = %.4g, as hard labels have once they are clipped. "
        "%s: how sure each preference is plays no part. Votes or scores tell pairs apart.",
        len(rows),
        size,
        means,
    )


def reference_of_start(trainer: IrepoTrainer, sums_B2: Tensor) -> Tensor:
    """The reference before training is the model itself; DataError once it has moved."""
    if trainer.state.global_step == 0 and not trainer.references.tables:
        return sums_B2.detach()
    raise DataError.of(
        "ref_logps_1",
        None,
        "these pairs have no reference log-probabilities, and the model has moved since",
        "give the rows as eval_dataset when the trainer is made",
        "or add the columns: llmkd.models.log_probs.completion_log_probs of the starting model",
    )


def by_pair(
    term_of: Callable[[dict[str, Tensor], dict[str, Any]], LossTerm],
    ratios: dict[str, Tensor],
    inputs: dict[str, Any],
) -> tuple[Tensor, tuple[str, ...]]:
    """Loss and metrics pair by pair, [B, 1 + metrics], and the metrics' names."""
    rows, names = [], ()
    for at in range(len(inputs["pref_logit"])):
        some = slice(at, at + 1)
        one = {name: inputs[name][some] for name in ("labels", "pref_logit")}
        term = term_of({name: each_B2[some] for name, each_B2 in ratios.items()}, one)
        names = tuple(term.metrics)
        rows.append(torch.stack([term.total, *(term.metrics[name] for name in names)]))
    return torch.stack(rows), names


def held_out_metrics(trainer: IrepoTrainer, found: EvalPrediction) -> dict[str, float]:
    """Means over the pairs: loss and what `by_pair` names; `pairs` says how many."""
    rows: Any = found.predictions
    means = rows.astype("float64").mean(axis=0)
    named = dict(zip(("loss", *trainer.metric_names), map(float, means), strict=True))
    return named | {"pairs": float(len(rows))}
