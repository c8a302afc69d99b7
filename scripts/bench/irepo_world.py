"""The world of `irepo_votes.py`: a small policy, a gold utility, and annotators with known noise.

Gold utility u = SCALE x VADER compound - 2 x (share of repeated trigrams); votes are Bernoulli
draws from sigma(u1 - u2), flipped at a known rate.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit
from vaderSentiment.vaderSentiment import (  # pyright: ignore[reportMissingImports]
    SentimentIntensityAnalyzer,
)

from llmkd.data.tokenizer import load_tokenizer
from llmkd.labels.pairs import choose_pairs
from llmkd.labels.preference import Votes
from llmkd.models.log_probs import completion_log_probs
from llmkd.models.sample import Sampler, SamplingConfig
from llmkd.teachers.loading import load_model

SCALE, K, TOKENS, HELD_OUT, HELD_K = 4.0, 4, 24, 256, 2


@dataclass(frozen=True)
class Cell:
    """Votes a pair, flip rate, prompts an iteration; `cyclic` annotators know no best response."""

    votes: int
    flips: float
    prompts: int
    cyclic: bool = False


CELLS = {
    "main": Cell(5, 0.2, 128),
    "one_vote": Cell(1, 0.2, 128),
    "clean": Cell(15, 0.0, 128),
    "flipped": Cell(5, 0.35, 128),
    "many": Cell(5, 0.2, 512),
    "cyclic": Cell(5, 0.0, 128, cyclic=True),
}


@cache
def _vader() -> Any:
    return SentimentIntensityAnalyzer()


def utility(text: str) -> float:
    """The gold utility of a response in nats."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return SCALE * _vader().polarity_scores(text)["compound"] - 2.0 * repeated


def gold_logits(texts: list[str], cyclic: bool) -> np.ndarray:
    """[K, K] logits of the noiseless annotator. The cyclic one: positive beats neutral, neutral
    beats negative, negative beats positive, by 2 nats.
    """
    if not cyclic:
        u_K = np.array([utility(text) for text in texts])
        return u_K[:, None] - u_K[None, :]
    tone_K = np.array([_vader().polarity_scores(text)["compound"] for text in texts])
    class_K = np.where(tone_K > 0.2, 0, np.where(tone_K < -0.2, 2, 1))
    gap_KK = (class_K[None, :] - class_K[:, None]) % 3
    return np.where(gap_KK == 1, 2.0, np.where(gap_KK == 2, -2.0, 0.0))


def vote(texts: list[str], cell: Cell, rng: np.random.Generator) -> Votes:
    """Votes on every pair of responses."""
    p_KK = expit(gold_logits(texts, cell.cyclic))
    p_KK = p_KK * (1 - cell.flips) + (1 - p_KK) * cell.flips
    upper_KK = np.triu(rng.binomial(cell.votes, p_KK), 1)
    votes_KK = cell.votes * (1.0 - np.eye(len(texts)))
    wins_KK = upper_KK + np.tril(cell.votes - upper_KK.T, -1)
    return Votes(wins_KK.astype(float), votes_KK)


class World:
    """Prompts, tokenizer, sampling and scoring; what all arms see alike is kept."""

    def __init__(self, policy: str, prompts: list[str]) -> None:
        self.source = policy
        self.tokenizer = load_tokenizer(policy, None, key="policy")
        rows = [(p, self.tokenizer(p)["input_ids"]) for p in prompts]
        rows = [(p, ids) for p, ids in rows if len(ids) <= 24]
        self.held_out, self.train = rows[:HELD_OUT], rows[HELD_OUT:]
        config = SamplingConfig(
            num_responses=K,
            max_new_tokens=TOKENS,
            temperature=1.0,
            sampling_batch_size=128,
            sampling_dtype="float32",
        )
        self.sampler = Sampler(config, self.tokenizer)
        self.known: dict[Any, Any] = {}

    def model(self) -> Any:
        """The start policy."""
        return load_model(self.source, dtype="float32")

    def sample(self, folder: str, rows: list[Any], count: int, seed: int) -> list[list[Any]]:
        """Samples of the model in a folder; the start policy's are drawn once."""
        key = (folder, count, seed, len(rows), rows[0][0])
        if folder == self.source and key in self.known:
            return self.known[key]
        self.sampler.load(folder)
        found = self.sampler.sample([ids for _, ids in rows], seed, count)
        self.sampler.release()
        if folder == self.source:
            self.known[key] = found
        return found

    def pairs(self, folder: str, cell: Cell, seed: int, step: int) -> list[dict[str, Any]]:
        """Sampled, voted on, and the best against the worst: one pair a prompt. `noisy_gap` is what
        a reward model of like precision would say.
        """
        first = (step * cell.prompts) % (len(self.train) - cell.prompts)
        rows = self.train[first : first + cell.prompts]
        found = self.sample(folder, rows, K, 1000 * seed + step)
        made = []
        for (prompt, prompt_ids), samples in zip(rows, found, strict=True):
            texts = [one.text for one in samples]
            unique = [texts.index(text) for text in dict.fromkeys(texts) if text.strip()]
            if len(unique) < 2:
                continue
            rng = np.random.default_rng([seed, step, zlib.crc32(prompt.encode())])
            kept = [texts[i] for i in unique]
            votes, gold_KK = vote(kept, cell, rng), gold_logits(kept, cell.cyclic)
            i, j, logit = choose_pairs(votes.logits(), "best_worst")[0]
            one_vote = float(rng.random() < votes.wins_KK[i, j] / cell.votes)
            made.append(
                {
                    "prompt_ids": prompt_ids,
                    "ids_1": samples[unique[i]].ids,
                    "ids_2": samples[unique[j]].ids,
                    "pref_logit": float(logit),
                    "one_vote": 2 * one_vote - 1,
                    "noisy_gap": float(gold_KK[i, j] + rng.normal(0, 2 / cell.votes**0.5)),
                    "best": samples[unique[int(np.nanargmax(votes.wins_KK.sum(1)))]].ids,
                }
            )
        return made

    def log_probs(self, model: Any, prompts: list[Any], ids: list[Any]) -> np.ndarray:
        """Token sums in nats."""
        return completion_log_probs(model, prompts, ids, batch_size=64)

    def score(self, folder: str, cell: Cell, seed: int) -> dict[str, float]:
        """Gold win rate against the start on held-out prompts, KL to it, and what the text is like.

        Win rate: mean over prompts and pairs of responses of P(new preferred), by sign of the gold
        gap with ties half; for the cyclic annotator by its own probability.
        """
        from llmkd.evaluation.policy import distinct, kl_on_samples

        rows = self.held_out
        base = self.sample(self.source, rows, HELD_K, 77)
        new = self.sample(folder, rows, HELD_K, 78 + seed)
        wins = []
        for mine, theirs in zip(new, base, strict=True):
            texts = [one.text for one in (*mine, *theirs)]
            gap = gold_logits(texts, cell.cyclic)[:HELD_K, HELD_K:]
            wins.append(np.mean(expit(gap) if cell.cyclic else 0.5 + 0.5 * np.sign(gap)))
        prompts = [ids for (_, ids), samples in zip(rows, new, strict=True) for _ in samples]
        answers = [one.ids for samples in new for one in samples]
        own = self.log_probs(load_model(folder, dtype="float32"), prompts, answers)
        start = self.log_probs(self.model(), prompts, answers)
        lengths = np.array([len(ids) for ids in answers])
        kl = kl_on_samples(own, start, lengths)
        return {
            "win": float(np.mean(wins)),
            "kl": kl["mean"],
            "kl_se": kl["se"],
            "perplexity_under_start": float(np.exp(-start.sum() / lengths.sum())),
            "distinct_2": float(distinct(answers, 2) or 0.0),
            "tokens": float(lengths.mean()),
            "utility": float(np.mean([utility(one.text) for s in new for one in s])),
        }


def read_prompts(path: str) -> list[str]:
    """The `prompt` column of a JSON Lines file."""
    import json

    return [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()]
