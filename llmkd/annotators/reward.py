"""Responses scored by reward models: one classifier, or an ensemble of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from llmkd.annotators.base import Item, Prompt
from llmkd.annotators.batching import Encoded, Parts, fit, require_finite
from llmkd.annotators.checks import KEY
from llmkd.annotators.classifier import Classifier
from llmkd.annotators.templates import check_template, fill, prompt_text
from llmkd.errors import AnnotatorError, RecipeError
from llmkd.files import digest
from llmkd.labels.preference import Annotation, Logits, Scores, Votes
from llmkd.labels.votes import both_orders
from llmkd.teachers.frozen import collect

MODES = ("single", "pair")
COMBINE = ("mean", "votes")
# PairRM's marks (arXiv 2306.02561); a classifier trained on another form needs its own template.
PAIR_TEMPLATE = "<|source|>{prompt}<|candidate1|>{response_a}<|candidate2|>{response_b}"
LEAST_SPREAD = (
    1e-4  # of scores squared; models that agree to the last digit are not infinitely sure
)


class RewardAnnotator:
    """`models`: Hub ids or folders of sequence classifiers; all of them in memory at once.

    mode `single`: one score a response (see `Classifier` for heads of two), of the chat template
    with the response as the assistant's turn where the tokenizer has one, else of the text pair
    prompt, response. mode `pair`: `pair_template` with both responses goes in, one output is the
    logit that the first is better; both orders are asked.

    `scales` multiply each model's scores or logits: rewards have no unit, so without them the
    widest model leads. `combine`: mean of the scaled numbers, or votes, one a model and pair, equal
    scores half a win each. `spread` gives scores the variance between the models (at least two;
    mean and single only), no less than LEAST_SPREAD.

    Texts longer than a model's window (or `max_length` tokens) lose the left of the prompt first,
    then the middle of the responses; `counts` has how many were cut, of all questions.
    """

    def __init__(
        self,
        models: str | Sequence[str],
        *,
        mode: str = "single",
        combine: str = "mean",
        scales: float | Sequence[float] = 1.0,
        spread: bool = False,
        pair_template: str = PAIR_TEMPLATE,
        max_length: int | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 16,
        name: str | None = None,
    ) -> None:
        names = [models] if isinstance(models, str) else list(models)
        self.name = name or " + ".join(map(str, names))
        self.mode, self.combine, self.spread = mode, combine, spread
        self.pair_template, self.batch_size = pair_template, batch_size
        self._check(names)
        check_template("pair_template", pair_template, "pair")
        self.scales = _scales(scales, len(names))
        outputs = (1, 2) if mode == "single" else (1,)
        self.models = [
            Classifier(one, outputs=outputs, revision=revision, dtype=dtype, max_length=max_length)
            for one in names
        ]
        self.counts = {"questions": 0, "cut": 0}

    def _check(self, names: list[str]) -> None:
        if not names or not all(isinstance(one, str) for one in names):
            raise RecipeError.of("models", names, "must be a Hub id or folder, or a list of them")
        for key, known in (("mode", MODES), ("combine", COMBINE)):
            if getattr(self, key) not in known:
                raise RecipeError.of(key, getattr(self, key), f"known: {', '.join(known)}")
        if self.spread and (len(names) < 2 or self.mode != "single" or self.combine != "mean"):
            problem = "is the variance between the scores of at least two models"
            way = "mode: single, combine: mean, and several models"
            raise RecipeError.of("spread", True, problem, way)
        if self.batch_size < 1:
            raise RecipeError.of("batch_size", self.batch_size, "must be at least 1")

    @property
    def fingerprint(self) -> str:
        """Hash of weights, windows, templates, scales and the way they are combined."""
        template = self.pair_template if self.mode == "pair" else None
        facts = [self.mode, self.combine, self.spread, template, self.scales]
        return digest(["reward", facts, [model.fingerprint for model in self.models]])

    def load(self, device: Any) -> None:
        """All models onto `device`."""
        for model in self.models:
            model.load(device)

    def release(self) -> None:
        """All models out of memory."""
        for model in self.models:
            model.release()
        collect()

    def annotate(self, items: Sequence[Item]) -> list[Annotation]:
        """Scores, logits or votes, one an item, as the settings say."""
        return self._scored(items) if self.mode == "single" else self._compared(items)

    def _scored(self, items: Sequence[Item]) -> list[Annotation]:
        rows = [(item, (response,)) for item in items for response in item.responses]
        scores_MN = self._ask(rows)
        found: list[Annotation] = []
        start = 0
        for item in items:
            scores_MK = scores_MN[:, start : start + len(item.responses)]
            start += len(item.responses)
            if self.combine == "votes":
                found.append(_votes(scores_MK[:, :, None] - scores_MK[:, None, :]))
            elif self.spread:
                variance_K = np.maximum(scores_MK.var(axis=0, ddof=1), LEAST_SPREAD)
                found.append(Scores(scores_MK.mean(axis=0), variance_K))
            else:
                found.append(Scores(scores_MK.mean(axis=0)))
        return found

    def _compared(self, items: Sequence[Item]) -> list[Annotation]:
        pairs = [(item, i, j) for item in items for i, j in combinations(_places(item), 2)]
        rows = [
            (item, (item.responses[a], item.responses[b]))
            for item, i, j in pairs
            for a, b in ((i, j), (j, i))
        ]
        asked_MP2 = self._ask(rows).reshape(len(self.models), -1, 2)
        logits_MP, leans_MP = both_orders(asked_MP2[..., 0], asked_MP2[..., 1])
        found: list[Annotation] = []
        start = 0
        for item in items:
            here = slice(start, start + math.comb(len(item.responses), 2))
            start = here.stop
            logits_MKK = _tables(logits_MP[:, here], len(item.responses), -1.0)
            if self.combine == "votes":
                found.append(_votes(logits_MKK))
                continue
            first_KK = _tables(leans_MP[:, here], len(item.responses), 1.0).mean(axis=0)
            np.fill_diagonal(first_KK, np.nan)
            found.append(Logits(logits_MKK.mean(axis=0), first_KK))
        return found

    def _ask(self, rows: Sequence[tuple[Item, tuple[str, ...]]]) -> np.ndarray:
        """[M, N]: what each of M models says of N rows, scaled."""
        said = []
        for model, scale in zip(self.models, self.scales, strict=True):
            texts = [self._encoded(model, item, responses) for item, responses in rows]
            scores_N = model.scores(texts, self.batch_size)
            require_finite(scores_N, model.source, [item.row for item, _ in rows])
            said.append(scale * scores_N)
        return np.array(said)

    def _encoded(self, model: Classifier, item: Item, responses: tuple[str, ...]) -> Encoded:
        form = _single if self.mode == "single" else self._pair
        parts, order, encode = form(model.tokenizer, item.prompt, responses)
        left = [name for name in parts if not name.startswith("response")]
        found, shorter = fit(model.tokenizer, parts, order, encode, model.window, left=left)
        self.counts["questions"] += 1
        self.counts["cut"] += shorter
        if found is None:
            raise AnnotatorError.of(
                KEY,
                model.source,
                f"row {item.row}: its window of {model.window} tokens is too short for the "
                "template alone",
                "a larger max_length, or a model with a longer window",
            )
        return found

    def _pair(self, tokenizer: Any, prompt: Prompt, responses: tuple[str, ...]) -> Any:
        parts = {
            "prompt": prompt_text(prompt),
            "response_a": responses[0],
            "response_b": responses[1],
        }

        def encode(given: Parts) -> Encoded:
            return tokenizer(fill(self.pair_template, given), **_options(tokenizer))

        return parts, (("prompt",), ("response_a", "response_b")), encode


def _single(tokenizer: Any, prompt: Prompt, responses: tuple[str, ...]) -> Any:
    """Parts of the text, the order they are cut in, and what makes ids of them."""
    if tokenizer.chat_template is None:
        parts = {"prompt": prompt_text(prompt), "response": responses[0]}

        def encode(given: Parts) -> Encoded:
            return tokenizer(given["prompt"], given["response"], **_options(tokenizer))

        return parts, (("prompt",), ("response",)), encode
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    parts = {str(place): turn["content"] for place, turn in enumerate(turns)}

    def encode_chat(given: Parts) -> Encoded:
        said = [{**turn, "content": given[str(place)]} for place, turn in enumerate(turns)]
        said.append({"role": "assistant", "content": given["response"]})
        text = tokenizer.apply_chat_template(said, tokenize=False)
        # The template has written the special tokens already.
        return tokenizer(text, add_special_tokens=False, **_options(tokenizer))

    order = (*((name,) for name in parts), ("response",))  # the oldest turn goes first
    return {**parts, "response": responses[0]}, order, encode_chat


def _options(tokenizer: Any) -> Mapping[str, Any]:
    typed = "token_type_ids" in tokenizer.model_input_names
    return {
        "return_attention_mask": False,
        "return_token_type_ids": typed,
        "verbose": False,  # no warning of long texts: they are cut
    }


def _places(item: Item) -> range:
    return range(len(item.responses))


def _tables(values_MP: np.ndarray, count: int, sign: float) -> np.ndarray:
    """[M, K, K] of values of the pairs i < j in order; `sign` times them below the diagonal."""
    i_P, j_P = np.triu_indices(count, 1)
    found_MKK = np.zeros((len(values_MP), count, count))
    found_MKK[:, i_P, j_P] = values_MP
    found_MKK[:, j_P, i_P] = sign * values_MP
    return found_MKK


def _votes(logits_MKK: np.ndarray) -> Votes:
    """One vote of each model for the sign of its logit."""
    wins_KK = ((np.sign(logits_MKK) + 1) / 2).sum(axis=0)
    votes_KK = np.full(wins_KK.shape, float(len(logits_MKK)))
    for table in (wins_KK, votes_KK):
        np.fill_diagonal(table, 0.0)
    return Votes(wins_KK, votes_KK)


def _scales(given: float | Sequence[float], count: int) -> tuple[float, ...]:
    """One scale a model; RecipeError for another number of them or one that is not above 0."""
    found = [given] * count if isinstance(given, int | float) else list(given)
    good = all(isinstance(one, int | float) and 0 < one < math.inf for one in found)
    if len(found) != count or not good:
        raise RecipeError.of("scales", given, f"needs a number above 0 for each of {count} models")
    return tuple(float(one) for one in found)
