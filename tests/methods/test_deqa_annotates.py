"""A scorer that `llmkd deqa` trained serves `llmkd irepo`: as an annotator with its spread, as a
reward.
"""

import deqa_kit
import irepo_kit
import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import norm

from llmkd.models.scorer import Scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A scorer, trained and measured."""
    place = tmp_path_factory.mktemp("scorer")
    deqa_kit.done(deqa_kit.recipe(place, max_train_rows=12, bootstrap_draws=0))
    return place / "run"


def aligned(tmp_path, folder, **keys):
    """A run whose one annotator is the scorer; its pairs."""
    annotator = {"type": "score", "model": str(folder), "name": "scorer", **keys}
    irepo_kit.done(irepo_kit.recipe(tmp_path, iterations=1, annotators=[annotator]))
    pairs = irepo_kit.pairs_of(tmp_path / "run", 1).to_list()
    assert pairs
    return pairs


def test_pairs_have_thurstones_logits(tmp_path, folder):
    pairs = aligned(tmp_path, folder)
    scorer = Scorer(str(folder))
    for pair in pairs:
        first, second = (scorer(pair[f"response_{side}"]) for side in (1, 2))
        gap = first["score"] - second["score"]
        p = norm.cdf(gap / np.hypot(first["std"], second["std"]))
        assert pair["pref_logit"] == pytest.approx(logit(p), abs=1e-4)
    assert any(abs(pair["pref_logit"]) > 1e-3 for pair in pairs)


def test_rewards_are_mean_minus_k_std(tmp_path, folder):
    pairs = aligned(tmp_path, folder, spread=False, k=0.5, scale=2.0)
    scorer = Scorer(str(folder))
    for pair in pairs:
        reward = scorer.score([pair["response_1"], pair["response_2"]]).reward_N(0.5)
        assert pair["pref_logit"] == pytest.approx(2.0 * (reward[0] - reward[1]), abs=1e-4)
