"""A sequence classifier as a scorer of texts: one number each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmkd.annotators.batching import Encoded, batches, padded, window_of
from llmkd.annotators.checks import KEY
from llmkd.data.tokenizer import load_tokenizer
from llmkd.errors import AnnotatorError, TeacherError
from llmkd.files import digest
from llmkd.teachers.frozen import freeze
from llmkd.teachers.loading import (
    commit_of,
    load_config,
    load_model,
    model_fingerprint,
    whole_weights,
)

WAYS = (
    "name a reward model: a sequence classifier with trained weights of its head",
    "a causal LM can judge: {type: judge, model: ...}",
)
OTHER_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")


class Classifier:
    """A Hub id or folder of a sequence classifier with one output (the score) or two (logit of
    label 1 minus logit of label 0). Config and tokenizer are read at once, weights by `load`.

    RecipeError where it cannot be read, AnnotatorError for another kind of model or more outputs.
    """

    def __init__(
        self,
        source: str,
        *,
        outputs: Sequence[int] = (1, 2),
        revision: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
    ) -> None:
        self.source, self.revision, self.dtype = source, revision, dtype
        config = load_config(source, revision, KEY)
        heads = [h for h in config.architectures or [] if h.endswith(OTHER_HEADS)]
        if heads:
            raise AnnotatorError.of(KEY, source, f"is a {heads[0]}, not a classifier", *WAYS)
        if config.num_labels not in outputs:
            raise AnnotatorError.of(
                KEY,
                source,
                f"has {config.num_labels} outputs, not {' or '.join(map(str, outputs))}",
                "a reward model has one output; a classifier of two labels gives their difference",
            )
        self.tokenizer = load_tokenizer(source, revision, key=KEY, needs_end=False)
        self.window = window_of(config, self.tokenizer, max_length, source)
        self.weights = model_fingerprint(source, commit_of(source, revision))
        self._model: Any = None
        self._padding: int | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer's template and window."""
        return digest([self.weights, self.dtype, self.tokenizer.chat_template, self.window])

    def load(self, device: Any) -> None:
        """The weights, whole on each rank, frozen, on `device`."""
        options: dict[str, Any] = {"revision": self.revision, "dtype": self.dtype, "key": KEY}
        try:
            with whole_weights():
                self._model = load_model(self.source, head="sequence", **options)
            freeze(self._model, self.source)
        except TeacherError as error:
            problem = str(error).splitlines()[0].split(": ", 2)[-1]
            raise AnnotatorError.of(KEY, self.source, problem, *WAYS) from error
        self._padding = self._model.config.get_text_config().pad_token_id
        self._model.to(device)

    def release(self) -> None:
        """Drop the weights."""
        self._model = None

    @torch.inference_mode()
    def scores(self, rows: Sequence[Encoded], batch_size: int) -> np.ndarray:
        """[N] float64, one a row, whatever the batches."""
        found_N = np.zeros(len(rows))
        for places in batches([len(row["input_ids"]) for row in rows], batch_size):
            batch = [rows[place] for place in places]
            inputs = padded(batch, pad=self._pad(batch), side="right", device=self._model.device)
            logits = self._model(**inputs).logits.double()
            values = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            found_N[places] = values.cpu().numpy()
        return found_N

    def _pad(self, batch: Sequence[Encoded]) -> int:
        """The config's padding; where it has none, an id that no row of the batch holds: upstream
        takes the last token that is not padding for the end of a row.
        """
        config = self._model.config.get_text_config()
        if self._padding is not None:
            return self._padding
        used = {token for row in batch for token in row["input_ids"]}
        config.pad_token_id = next(i for i in range(config.vocab_size) if i not in used)
        return config.pad_token_id
