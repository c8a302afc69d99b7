"""What somebody said about the K responses to one prompt: scores, votes, or logits of preference.

All three give logits [K, K]: entry i, j is logit P(i is preferred to j) in nats, so the table is
antisymmetric with a diagonal of 0; NaN where a pair was not asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from llmkd.labels.votes import score_logit, vote_logit


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A number for each response; the logit of a pair is the difference (Bradley-Terry).

    `variance_K` makes the scores distributions, independent of each other: the logit is then that
    of Phi((m_i - m_j) / sqrt(v_i + v_j)).
    """

    scores_K: np.ndarray
    variance_K: np.ndarray | None = None

    @property
    def count(self) -> int:
        """How many responses that were."""
        return len(self.scores_K)

    def logits(self) -> np.ndarray:
        """[K, K] in nats."""
        s_K, v_K = self.scores_K, self.variance_K
        if v_K is None:
            return s_K[:, None] - s_K[None, :]
        return score_logit(s_K[:, None], v_K[:, None], s_K[None, :], v_K[None, :])


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """`wins_KK[i, j]` of `votes_KK[i, j]` votes preferred i to j; ties are half a win each.

    `first_KK` is the lean towards whichever was shown first, in nats: Haldane's logit of the votes
    for the first shown, in both orders together; NaN where nobody voted.
    """

    wins_KK: np.ndarray
    votes_KK: np.ndarray
    first_KK: np.ndarray | None = None

    @property
    def count(self) -> int:
        """How many responses that were."""
        return len(self.wins_KK)

    def logits(self) -> np.ndarray:
        """[K, K] by Haldane's log((w + 1/2) / (h - w + 1/2)); NaN where nobody voted."""
        logits_KK = np.where(
            self.votes_KK > 0, vote_logit(self.wins_KK, self.votes_KK), np.float64("nan")
        )
        np.fill_diagonal(logits_KK, 0.0)
        return logits_KK


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """Logits as they are; `first_KK[i, j]` is the lean towards whichever was shown first, in nats
    (half the sum of the two orders' logits for the first), NaN where only one order was asked.
    """

    logits_KK: np.ndarray
    first_KK: np.ndarray | None = None

    @property
    def count(self) -> int:
        """How many responses that were."""
        return len(self.logits_KK)

    def logits(self) -> np.ndarray:
        """[K, K] in nats."""
        return self.logits_KK


Annotation: TypeAlias = Scores | Votes | Logits
