"""A trained scorer as an annotator: scores with their spread, or rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkd.annotators.base import Item
from llmkd.annotators.batching import require_finite
from llmkd.annotators.checks import KEY
from llmkd.annotators.templates import prompt_text
from llmkd.data.score_config import HOLE
from llmkd.errors import AnnotatorError, LlmkdError, NonFiniteError, RecipeError
from llmkd.files import digest
from llmkd.labels.preference import Annotation, Scores
from llmkd.models.scorer import Scorer, load_levels
from llmkd.models.scorer_files import LEVELS_FILE, load_processor
from llmkd.teachers.frozen import collect, freeze
from llmkd.teachers.loading import commit_of, model_fingerprint, whole_weights

# Of scores squared, in level gaps: a scorer that is certain of a level is not infinitely sure.
LEAST_VARIANCE = 1e-4
KNOWN = {"prompt", "response", "text"}


class ScoreAnnotator:
    """`model`: folder or Hub id of a scorer (a model with `levels.json`).

    With `spread` a response's annotation is its mean and variance, so that a pair's logit is that
    of Phi((m1 - m2) / sqrt(v1 + v2)); without it the reward `scale` (mean - k std), whose
    differences are logits.

    `template` makes the rated text of {prompt} and {response} (and {text}, the response too); by
    default the scorer's own. A scorer of chats reads the prompt with the response as the
    assistant's turn. Texts too long lose their middle; `counts` has how many, of all questions.
    """

    def __init__(
        self,
        model: str,
        *,
        k: float = 0.0,
        spread: bool = True,
        scale: float = 1.0,
        template: str | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        attn: str | None = None,
        batch_size: int = 16,
        name: str | None = None,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise RecipeError.of("model", model, "must be a Hub id or a folder")
        self.source, self.name = model, name or model
        self.k, self.spread, self.scale, self.batch_size = k, spread, scale, batch_size
        self._check()
        self._options: dict[str, Any] = {"dtype": dtype, "attn": attn, "revision": revision}
        self.processor = load_processor(model, revision, key=KEY)
        saved = load_levels(model, revision)
        if saved is None:
            ways = ("a folder that ScoreTrainer wrote", "{type: judge, model: ...} asks any model")
            raise AnnotatorError.of(KEY, model, f"has no {LEVELS_FILE}: it is no scorer", *ways)
        if saved.inputs == "images":
            raise AnnotatorError.of(KEY, model, "rates images; responses are texts")
        self.saved, self.max_length = saved, max_length
        self.chat = saved.inputs == "messages" and template is None
        self.template = template or saved.template or "{response}"
        self._check_template(None if self.chat else self.template)
        self._weights = model_fingerprint(model, commit_of(model, revision))
        self._scorer: Scorer | None = None
        self.counts = {"questions": 0, "cut": 0}

    def _check(self) -> None:
        if not isinstance(self.k, int | float) or not math.isfinite(self.k):
            raise RecipeError.of("k", self.k, "must be a number")
        if not isinstance(self.scale, int | float) or not 0 < self.scale < math.inf:
            raise RecipeError.of("scale", self.scale, "must be a number above 0")
        if self.spread and (self.k != 0 or self.scale != 1):
            key = "k" if self.k != 0 else "scale"
            problem = "belongs to rewards; with spread, mean and variance are taken as they are"
            raise RecipeError.of(key, getattr(self, key), problem, "spread: false")
        if self.batch_size < 1:
            raise RecipeError.of("batch_size", self.batch_size, "must be at least 1")

    def _check_template(self, template: str | None) -> None:
        if template is None:
            return
        holes = set(HOLE.findall(template))
        if strange := sorted(holes - KNOWN):
            problem = f"has a place for {strange[0]}, which is neither prompt nor response"
            way = 'template: "Prompt: {prompt}\\nResponse: {response}"'
            raise RecipeError.of("template", template, problem, way)
        if not holes & {"response", "text"}:
            raise RecipeError.of("template", template, "has no {response}")

    @property
    def fingerprint(self) -> str:
        """Hash of weights, levels, questions, template, and what is made of the scores."""
        facts = [self.saved.__repr__(), self.template, self.chat, self.max_length]
        rest = [self.k, self.spread, self.scale, self._options["dtype"]]
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return digest(["score", self._weights, facts, rest, tokenizer.chat_template])

    def load(self, device: Any) -> None:
        """The weights, whole on each rank, frozen, on `device`."""
        try:
            with whole_weights():
                self._scorer = Scorer(
                    self.source,
                    processor=self.processor,
                    max_length=self.max_length,
                    device=device,
                    batch_size=self.batch_size,
                    key=KEY,
                    **self._options,
                )
            freeze(self._scorer.model, self.source)
        except LlmkdError as error:
            self._scorer = None
            problem = str(error).splitlines()[0].split(": ", 2)[-1]
            raise AnnotatorError.of(KEY, self.source, problem) from error

    def release(self) -> None:
        """The weights out of memory."""
        self._scorer = None
        collect()

    def annotate(self, items: Sequence[Item]) -> list[Annotation]:
        """Scores, one an item, with variances where `spread` says so."""
        assert self._scorer is not None, "load first"
        rows = [self._row(item, response) for item in items for response in item.responses]
        try:
            table = self._scorer.score(rows)
        except NonFiniteError:
            self._name_the_row(items)
            raise
        self.counts["questions"] += len(rows)
        self.counts["cut"] += table.cut
        values_L = np.asarray(table.levels.values_L)
        gap = float(np.ptp(values_L)) / (len(values_L) - 1)
        variance_N = np.maximum(table.std_N**2, LEAST_VARIANCE * gap**2)
        reward_N = self.scale * table.reward_N(self.k)
        found: list[Annotation] = []
        start = 0
        for item in items:
            here = slice(start, start + len(item.responses))
            start = here.stop
            found.append(Scores(reward_N[here], variance_N[here] if self.spread else None))
        return found

    def _name_the_row(self, items: Sequence[Item]) -> None:
        """AnnotatorError naming the first row whose scores are not finite: asked one by one."""
        assert self._scorer is not None
        for item in items:
            try:
                self._scorer.score([self._row(item, response) for response in item.responses])
            except NonFiniteError:
                require_finite(np.array([math.nan]), self.source, [item.row])

    def _row(self, item: Item, response: str) -> dict[str, Any]:
        if self.chat:
            turns: Any = item.prompt
            if isinstance(item.prompt, str):
                turns = [{"role": "user", "content": item.prompt}]
            answer = {"role": "assistant", "content": response}
            return {"row": item.row, "messages": [*turns, answer]}
        shown = {"prompt": prompt_text(item.prompt), "response": response, "text": response}
        return {"row": item.row, "text": HOLE.sub(lambda hole: shown[hole[1]], self.template)}
