"""A causal LM on this machine as a judge: which of two is better, or how good one is."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from llmkd.annotators.base import Item
from llmkd.annotators.batching import (
    Encoded,
    Parts,
    batches,
    fit,
    padded,
    require_finite,
    window_of,
)
from llmkd.annotators.checks import KEY
from llmkd.annotators.templates import (
    LETTERS,
    LEVEL_TEMPLATE,
    LEVELS,
    PAIR_TEMPLATE,
    check_levels,
    check_template,
    level_question,
    level_score,
    pair_question,
    prompt_text,
)
from llmkd.data.tokenizer import load_tokenizer, pad_id
from llmkd.errors import AnnotatorError, RecipeError, TeacherError
from llmkd.files import digest
from llmkd.labels.preference import Annotation, Logits, Scores
from llmkd.labels.votes import both_orders
from llmkd.teachers.frozen import collect, freeze
from llmkd.teachers.loading import (
    commit_of,
    load_config,
    load_model,
    model_fingerprint,
    whole_weights,
)

logger = logging.getLogger(__name__)
MODES = ("pair", "level")
PLAIN_CUE = "\n\nAnswer:"  # a model without a chat template goes on writing the question otherwise
LEAST_MASS = 0.01  # below it the judge would have said something else than one of the answers


class JudgeAnnotator:
    """`model`: Hub id or folder of a causal LM, read at its last position only.

    mode `pair`: `template` asks for A or B; the logit is log P(A) - log P(B), of both orders
    (`both_orders`), and the lean towards the first is kept. mode `level`: the probabilities of the
    words of `levels` ({word: value}), closed over them, give each response's mean and variance.
    Templates are filled as in `templates.py`, go through the judge's chat template if it has one,
    and end with `cue` (default: nothing, or PLAIN_CUE without a chat template).

    Questions longer than the window (or `max_length` tokens) lose the middle of the prompt, then of
    the responses; `counts` has how many were cut, of all questions. `answer_mass` is the mean
    probability of the answers asked for; a warning is logged where it is below LEAST_MASS.
    """

    def __init__(
        self,
        model: str,
        *,
        mode: str = "pair",
        template: str | None = None,
        levels: Mapping[str, float] | None = None,
        cue: str | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        attn: str | None = None,
        batch_size: int = 8,
        name: str | None = None,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise RecipeError.of("model", model, "must be a Hub id or a folder")
        if mode not in MODES:
            raise RecipeError.of("mode", mode, f"known: {', '.join(MODES)}")
        if batch_size < 1:
            raise RecipeError.of("batch_size", batch_size, "must be at least 1")
        self.source, self.mode, self.batch_size = model, mode, batch_size
        self.name = name or str(model)
        self.template = template or (PAIR_TEMPLATE if mode == "pair" else LEVEL_TEMPLATE)
        check_template("template", self.template, mode)
        self.levels = check_levels("levels", LEVELS if levels is None else levels)
        self._options: dict[str, Any] = {"revision": revision, "dtype": dtype, "attn": attn}
        config = load_config(model, revision, KEY)
        self.tokenizer: Any = load_tokenizer(model, revision, key=KEY, needs_end=False)
        self.window = window_of(config, self.tokenizer, max_length, model)
        self.cue = ("" if self.tokenizer.chat_template else PLAIN_CUE) if cue is None else cue
        words = LETTERS if mode == "pair" else tuple(self.levels)
        self._answers = answer_tokens(self.tokenizer, words, model)
        self._weights = model_fingerprint(model, commit_of(model, revision))
        self._model: Any = None
        self.counts = {"questions": 0, "cut": 0}
        self._mass = 0.0
        self._warned = False

    @property
    def fingerprint(self) -> str:
        """Hash of weights, templates, levels, window and the kind of weights."""
        levels = self.levels if self.mode == "level" else None
        chat = self.tokenizer.chat_template
        facts = [self.mode, self.template, levels, chat, self.cue, self.window]
        return digest(["judge", self._weights, self._options["dtype"], facts, self._answers])

    @property
    def answer_mass(self) -> float | None:
        """Mean probability of all the answers asked for; None before the first question."""
        questions = self.counts["questions"]
        return self._mass / questions if questions else None

    def load(self, device: Any) -> None:
        """The weights, whole on each rank, frozen, on `device`."""
        try:
            with whole_weights():
                self._model = load_model(self.source, key=KEY, **self._options)
            freeze(self._model, self.source)
        except TeacherError as error:
            problem = str(error).splitlines()[0].split(": ", 2)[-1]
            raise AnnotatorError.of(KEY, self.source, problem, "download it again") from error
        self._model.to(device)

    def release(self) -> None:
        """The weights out of memory."""
        self._model = None
        collect()

    def annotate(self, items: Sequence[Item]) -> list[Annotation]:
        """Logits with leans (pair) or scores with variances (level), one an item."""
        return self._pairs(items) if self.mode == "pair" else self._levels(items)

    def _pairs(self, items: Sequence[Item]) -> list[Annotation]:
        shown = [
            (item, order)
            for item in items
            for i, j in combinations(range(len(item.responses)), 2)
            for order in ((i, j), (j, i))
        ]
        said = iter([log_probs[0] - log_probs[1] for log_probs in self._ask(shown)])
        found: list[Annotation] = []
        for item in items:
            count = len(item.responses)
            asked_KK = np.full((count, count), np.nan)
            for i, j in combinations(range(count), 2):
                asked_KK[i, j], asked_KK[j, i] = next(said), next(said)
            logits_KK, first_KK = both_orders(asked_KK, asked_KK.T)
            np.fill_diagonal(logits_KK, 0.0)
            found.append(Logits(logits_KK, first_KK))
        return found

    def _levels(self, items: Sequence[Item]) -> list[Annotation]:
        asked = [(item, (place,)) for item in items for place in range(len(item.responses))]
        values_L = np.array(list(self.levels.values()))
        rated = iter([level_score(log_probs_L, values_L) for log_probs_L in self._ask(asked)])
        found: list[Annotation] = []
        for item in items:
            mean_var_K2 = np.array([next(rated) for _ in item.responses])
            found.append(Scores(mean_var_K2[:, 0], mean_var_K2[:, 1]))
        return found

    def _ask(self, asked: Sequence[tuple[Item, tuple[int, ...]]]) -> np.ndarray:
        """[N, W] log-probabilities of the answers to N questions, nats."""
        rows = [self._encoded(item, places) for item, places in asked]
        log_probs_NW = self._log_probs(rows)
        require_finite(log_probs_NW, self.source, [item.row for item, _ in asked])
        self.counts["questions"] += len(asked)
        self._mass += float(np.exp(log_probs_NW).sum())
        if not self._warned and self.answer_mass is not None and self.answer_mass < LEAST_MASS:
            self._warned = True
            logger.warning(
                "judge %s: the answers it is asked for have %.2g of the probability; it may not "
                "understand the question (keys template, cue)",
                self.name,
                self.answer_mass,
            )
        return log_probs_NW

    def _encoded(self, item: Item, places: tuple[int, ...]) -> Encoded:
        names = ("response_a", "response_b") if self.mode == "pair" else ("response",)
        shown = {name: item.responses[place] for name, place in zip(names, places, strict=True)}

        parts = {"prompt": prompt_text(item.prompt), **shown}
        found, shorter = fit(
            self.tokenizer, parts, (("prompt",), names), self._question, self.window
        )
        self.counts["cut"] += shorter
        if found is None:
            raise AnnotatorError.of(
                KEY,
                self.source,
                f"row {item.row}: its window of {self.window} tokens is too short for the "
                "template alone",
                "a shorter template, a larger max_length, or a judge with a longer window",
            )
        return found

    def _question(self, parts: Parts) -> Encoded:
        if self.mode == "pair":
            text = pair_question(self.template, **parts)
        else:
            levels = tuple(self.levels)
            text = level_question(self.template, parts["prompt"], parts["response"], levels)
        if not self.tokenizer.chat_template:
            ids = self.tokenizer(text + self.cue, verbose=False)["input_ids"]
            ends = self.tokenizer.eos_token_id  # some tokenizers end every text
            return {"input_ids": ids[:-1] if len(ids) > 1 and ids[-1] == ends else ids}
        turn = [{"role": "user", "content": text}]
        chat = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(chat + self.cue, add_special_tokens=False, verbose=False)
        return {"input_ids": ids["input_ids"]}

    @torch.inference_mode()
    def _log_probs(self, rows: Sequence[Encoded]) -> np.ndarray:
        """[N, W]: log-probability of each answer as the next token, its spellings summed."""
        takes = inspect.signature(self._model.forward).parameters
        found_NW = np.zeros((len(rows), len(self._answers)))
        for places in batches([len(row["input_ids"]) for row in rows], self.batch_size):
            device = self._model.device
            inputs: dict[str, Any] = padded(
                [rows[p] for p in places], pad=pad_id(self.tokenizer), side="left", device=device
            )
            if "position_ids" in takes:
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            if "logits_to_keep" in takes:
                inputs["logits_to_keep"] = 1
            logits_BV = self._model(**inputs, use_cache=False).logits[:, -1]
            log_probs_BV = logits_BV.float().log_softmax(dim=-1)
            answers = [log_probs_BV[:, ids].logsumexp(dim=1) for ids in self._answers]
            found_NW[places] = torch.stack(answers, dim=1).double().cpu().numpy()
        return found_NW


def answer_tokens(tokenizer: Any, words: Sequence[str], name: str) -> list[list[int]]:
    """The first tokens of each answer, with and without a blank before it.

    A spelling (with, without) counts where it tells all answers apart at their first token, and
    that token is more than a blank. RecipeError where neither does.
    """
    found: list[set[int]] = [set() for _ in words]
    for blank in ("", " "):
        firsts = [_first(tokenizer, blank, word) for word in words]
        if None not in firsts and len(set(firsts)) == len(words):
            for ids, first in zip(found, firsts, strict=True):
                ids.add(first)  # type: ignore[arg-type]
    if not found[0] or len(set.union(*found)) < sum(map(len, found)):
        raise RecipeError.of(
            KEY,
            name,
            f"its tokenizer begins several of the answers {', '.join(words)} with one token",
            "levels: {good: 2, bad: 1}, or other words, or digits",
            "another judge",
        )
    return [sorted(ids) for ids in found]


def _first(tokenizer: Any, blank: str, word: str) -> int | None:
    """The token a model says first to say `word`; None where that is only a blank."""
    ids = tokenizer(blank + word, add_special_tokens=False)["input_ids"]
    if not blank and len(ids) > 1 and not tokenizer.decode(ids[:1]).strip():
        ids = ids[1:]  # sentencepiece puts a blank before a text, though none is said
    return ids[0] if ids and tokenizer.decode(ids[:1]).strip() else None
