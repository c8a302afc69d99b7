"""What a scorer's step sums: the losses of a batch, and the table of held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from llmkd.data.levels import Levels
from llmkd.data.score_collator import NOBODY, draw_partners, in_pairs
from llmkd.models.answer_logits import Answer
from llmkd.objectives.score import (
    LevelMoments,
    binary_rating,
    fidelity,
    in_level,
    level_kl,
    level_moments,
)
from llmkd.objectives.token import IGNORE
from llmkd.trainers.score_config import ScoreConfig
from llmkd.types import LossTerm

if TYPE_CHECKING:
    from transformers import EvalPrediction

# which of a step's counts (rows, tokens, pairs) divides a loss
COUNTED_BY = {"level_kl": 0, "answer_ce": 1, "fidelity": 2, "in_level": 0}
# columns of the held-out table
TABLE = (
    "level_kl answer_ce tokens in_level level_mass mean std target_mean target_std group".split()
)


@dataclass(frozen=True)
class ScoreLosses:
    """The losses of a batch as sums over rows, tokens and pairs."""

    levels: Levels
    args: ScoreConfig

    @property
    def weights(self) -> dict[str, float]:
        """What each loss that is on weighs, as a mean over what it counts."""
        args = self.args
        level, inside = args.sides * args.level_weight, args.sides * args.in_level_weight
        found = {"level_kl": level, "answer_ce": level}
        found |= {"fidelity": args.fidelity_weight, "in_level": inside}
        return {name: weight for name, weight in found.items() if weight > 0}

    def terms(self, answer: Answer, inputs: dict[str, Any]) -> dict[str, LossTerm]:
        """Those that are on; `partner` [B] says who is paired with whom."""
        ids_L, values_L = self._scale(answer.level_BV.device)
        rest = -answer.rest_B.sum()
        found = {
            "level_kl": self._kl(answer.level_BV, inputs["target"], ids_L),
            "answer_ce": LossTerm(rest, answer.rest_count_B.sum()),
        }
        if "in_level" in self.weights:
            found["in_level"] = in_level(answer.level_BV, ids_L)
        if "fidelity" in self.weights:
            predicted = level_moments(answer.level_BV, ids_L, values_L)
            target = LevelMoments(inputs["score_mean"], inputs["score_std"])
            found["fidelity"] = self.of_pairs(predicted, target, inputs["partner"])
        return {name: term for name, term in found.items() if name in self.weights}

    def of_pairs(
        self, predicted: LevelMoments, target: LevelMoments, partner_B: Tensor
    ) -> LossTerm:
        """The loss of pairs (row, partner), a sum over the rows that have a partner."""
        row_P = (partner_B != NOBODY).nonzero().squeeze(-1)
        pairs = row_P, partner_B[row_P]
        (pred_a, pred_b), (true_a, true_b) = (
            [moments.take(side_P) for side_P in pairs] for moments in (predicted, target)
        )
        if self.args.pair_loss == "fidelity":
            mode: Any = self.args.std_mode
            return fidelity(pred_a, pred_b, true_a, true_b, std_mode=mode)
        form = "bce" if self.args.pair_loss == "binary_bce" else "fidelity"
        means = pred_a.mean_N, pred_b.mean_N, true_a.mean_N, true_b.mean_N
        return binary_rating(*means, form=form, half_ties=True)

    def partners(self, batch: dict[str, Tensor], seed: Sequence[int] | int) -> Tensor:
        """Whom each row is paired with, [B]; `NOBODY` for those in no pair."""
        partner_B = draw_partners(*self._groups(batch), seed)
        return torch.from_numpy(partner_B).to(batch["group_id"].device)

    def counts(self, batch: dict[str, Tensor]) -> list[int]:
        """Rows, answer tokens but the level's, and pairs: what `COUNTED_BY` points to."""
        labels, at_B1 = batch["labels"], batch["level_at"][:, None]
        tokens = (labels[:, 1:] != IGNORE).sum() - (labels.gather(1, at_B1) != IGNORE).sum()
        return [len(labels), int(tokens), int(in_pairs(*self._groups(batch)).sum())]

    def _groups(self, batch: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        return batch["group_id"].cpu().numpy(), self._able(batch["score_std"].cpu().numpy())

    def _able(self, std_B: np.ndarray) -> np.ndarray:
        """Which rows can stand in a pair: all, or those whose raters' std is known."""
        return np.isfinite(std_B) | (self.args.pair_loss != "fidelity")

    @torch.no_grad()
    def table(self, answer: Answer, inputs: dict[str, Any]) -> Tensor:
        """Held-out rows [B, len(TABLE) + L] in float64: what `TABLE` names, then probabilities."""
        ids_L, values_L = self._scale(answer.level_BV.device)
        moments = level_moments(answer.level_BV, ids_L, values_L)
        assert moments.probs_NL is not None
        rows = []
        for at in range(len(answer.level_BV)):
            some = slice(at, at + 1)
            kl = self._kl(answer.level_BV[some], inputs["target"][some], ids_L)
            inside = in_level(answer.level_BV[some], ids_L)
            sums = kl.total, -answer.rest_B[at], answer.rest_count_B[at], inside.total
            known = moments.mean_N[at], moments.std_N[at], inputs["score_mean"][at]
            ends = inputs["score_std"][at], inputs["group_id"][at]
            row = *sums, kl.metrics["level_mass"], *known, *ends, *moments.probs_NL[at]
            rows.append(torch.stack([one.double() for one in row]))
        return torch.stack(rows)

    def held_out(self, found: EvalPrediction) -> dict[str, float]:
        """Metrics of the whole table: losses as in training, with pairs drawn once from all rows;
        plcc, srcc and mae of the predicted means, without those that constant means leave open.
        """
        rows: Any = found.predictions
        column = {name: np.asarray(rows[:, at], float) for at, name in enumerate(TABLE)}
        means = {name: float(column[name].mean()) for name in ("level_kl", "in_level")}
        means["answer_ce"] = float(column["answer_ce"].sum() / max(column["tokens"].sum(), 1.0))
        metrics = {"rows": float(len(rows)), "level_mass": float(column["level_mass"].mean())}
        if "fidelity" in self.weights:
            partner_N = draw_partners(column["group"], self._able(column["target_std"]), 0)
            tensors = {name: torch.from_numpy(values) for name, values in column.items()}
            predicted = LevelMoments(tensors["mean"], tensors["std"])
            target = LevelMoments(tensors["target_mean"], tensors["target_std"])
            term = self.of_pairs(predicted, target, torch.from_numpy(partner_N))
            pairs = int(term.count)
            means["fidelity"] = float(term.total) / max(pairs, 1)
            metrics |= {
                "pairs": float(pairs),
                "order": float(term.metrics["order"]) / max(pairs, 1),
            }
        parts = {name: means[name] for name in self.weights}
        loss = sum(weight * parts[name] for name, weight in self.weights.items())
        metrics |= {"loss": loss, "level_kl": means["level_kl"], **parts}
        return metrics | _agreement(column["mean"], column["target_mean"])

    def _kl(self, level_BV: Tensor, target_BL: Tensor, ids_L: Tensor) -> LossTerm:
        return level_kl(level_BV, target_BL, ids_L, closed_set=self.args.kl_over == "closed")

    def _scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ids_L = torch.tensor(self.levels.ids_L, device=device)
        return ids_L, torch.tensor(self.levels.values_L, dtype=torch.float64, device=device)


def _agreement(mean_N: np.ndarray, target_N: np.ndarray) -> dict[str, float]:
    found = {"mae": float(np.abs(mean_N - target_N).mean())}
    if len(mean_N) > 1 and np.ptp(mean_N) > 0 and np.ptp(target_N) > 0:
        found["plcc"] = float(np.corrcoef(mean_N, target_N)[0, 1])
        ranks = rankdata(mean_N), rankdata(target_N)
        found["srcc"] = float(np.corrcoef(*ranks)[0, 1])
    return found
