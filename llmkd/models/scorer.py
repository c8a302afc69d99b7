"""A trained model as a scorer: inputs in; scores, their spread and level probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.special import softmax
from tqdm.auto import tqdm

from llmkd.data.levels import LevelConfig, Levels
from llmkd.data.score_config import HOLE
from llmkd.data.score_tokens import Prompted, ScoreEncoder, ScorePrompt
from llmkd.data.tokenizer import pad_id
from llmkd.errors import DataError, NonFiniteError, RecipeError
from llmkd.models.level_logits import LevelLogits
from llmkd.models.scorer_files import (
    LEVELS_FILE,
    SavedLevels,
    check_tokens,
    load_level_model,
    load_levels,
    load_processor,
    save_levels,
)

__all__ = ["SavedLevels", "ScoreTable", "Scorer", "load_levels", "save_levels"]


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """What a scorer says of N inputs, float64: mean and std in the levels' unit, the closed-set
    probabilities and the logits of the L levels in their order; and how many inputs had to be cut.
    """

    mean_N: np.ndarray
    std_N: np.ndarray
    probs_NL: np.ndarray
    level_logits_NL: np.ndarray
    levels: Levels
    cut: int = 0

    def __len__(self) -> int:
        return len(self.mean_N)

    def reward_N(self, k: float = 0.0) -> np.ndarray:
        """mean - k std: careful for k > 0."""
        return self.mean_N - k * self.std_N

    def on_scale(self, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std on a scale whose ends are the lowest and the highest level."""
        least, most = min(self.levels.values_L), max(self.levels.values_L)
        factor = (high - low) / (most - least)
        return low + (self.mean_N - least) * factor, self.std_N * factor

    @classmethod
    def of(cls, logits_NL: np.ndarray, levels: Levels, cut: int = 0) -> ScoreTable:
        """The table of level logits."""
        probs_NL = softmax(logits_NL, axis=-1)
        values_L = np.asarray(levels.values_L, dtype=np.float64)
        mean_N = probs_NL @ values_L
        variance_N = (probs_NL * (values_L - mean_N[:, None]) ** 2).sum(-1)
        return cls(mean_N, np.sqrt(variance_N), probs_NL, logits_NL, levels, cut)


class Scorer:
    """`model`: a folder or Hub id, or a model in memory with its `processor` (or tokenizer).

    A trained folder holds `levels.json` and needs nothing else; for other models `levels` and
    `prompt` say what is asked. `template` makes texts of columns ("Text: {text}").
    `prefix_cache` computes the beginning that all prompts share once; numbers stay those without
    it. Inputs longer than the window (or `max_length`) lose the middle of their text.

    RecipeError for a model without levels, DataError for a tokenizer whose ids are other words.
    """

    def __init__(
        self,
        model: Any,
        levels: Levels | None = None,
        *,
        processor: Any = None,
        prompt: ScorePrompt | None = None,
        template: str | None = None,
        max_length: int | None = None,
        device: Any = None,
        dtype: Any = "auto",
        attn: str | None = None,
        revision: str | None = None,
        batch_size: int = 16,
        prefix_cache: bool = True,
        key: str = "model_name_or_path",
    ) -> None:
        if batch_size < 1:
            raise RecipeError.of("batch_size", batch_size, "must be at least 1")
        named = isinstance(model, str | Path)
        name = str(model) if named else type(model).__name__
        saved = load_levels(name, revision) if named else None
        if levels is None and saved is None:
            ways = ("a folder that ScoreTrainer wrote", "Scorer(model, levels, prompt=...)")
            raise RecipeError.of(key, name, f"has no {LEVELS_FILE}, which names its levels", *ways)
        if processor is None and not named:
            raise RecipeError.of("processor", None, "a model in memory needs its tokenizer with it")
        default = SavedLevels(levels, ScorePrompt.of(LevelConfig()))  # type: ignore[arg-type]
        saved = saved or default
        self.saved = replace(
            saved,
            levels=levels or saved.levels,
            prompt=prompt or saved.prompt,
            template=saved.template if template is None else template,
        )
        self.levels = self.saved.levels
        self.processor = processor or load_processor(name, revision, key=key)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        check_tokens(self.levels, tokenizer, name)
        if named:
            model = load_level_model(name, revision=revision, dtype=dtype, attn=attn, key=key)
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.batch_size, self.prefix_cache = model, batch_size, prefix_cache
        window = window_of(model.config, tokenizer, max_length or self.saved.max_length)
        self.encoder = ScoreEncoder(self.processor, self.levels, self.saved.prompt, window)
        self.logits = LevelLogits(model, self.levels.ids_L, pad_id(tokenizer))

    def __call__(self, inputs: Any) -> Any:
        """One input's {"score", "std", "level", "probs"}, or a list of them for a list of inputs.

        A list of {role, content} is one chat.
        """
        one = not isinstance(inputs, list) or _is_chat(inputs)
        table = self.score([inputs] if one else inputs)
        words = self.levels.words
        found = [
            {
                "score": float(table.mean_N[n]),
                "std": float(table.std_N[n]),
                "level": words[int(table.probs_NL[n].argmax())],
                "probs": dict(zip(words, table.probs_NL[n].tolist(), strict=True)),
            }
            for n in range(len(table))
        ]
        return found[0] if one else found

    def score(self, inputs: Sequence[Any], batch_size: int | None = None) -> ScoreTable:
        """The table of texts, chats, images (PIL, bytes, pathlib.Path) or rows, in order.

        Texts and pairs (a tuple) go through the template. A row is a mapping with `text` (as the
        model reads it), `messages` or `images`, as `load_score_rows` makes them. DataError naming
        the input that is none of these or does not fit, NonFiniteError for NaN.
        """
        rows = [self.row(one, number) for number, one in enumerate(inputs)]
        logits_NL = np.zeros((len(rows), len(self.levels.words)))
        training, cut = self.model.training, 0
        self.model.eval()
        try:
            with tqdm(total=len(rows), desc="scoring", delay=2) as bar:
                for places, prompted, logits_BL in self._batches(rows, batch_size):
                    logits_NL[places] = logits_BL
                    cut += sum(one.cut for one in prompted)
                    bar.update(len(places))
        finally:
            self.model.train(training)
        if len(wrong := np.flatnonzero(~np.isfinite(logits_NL).all(axis=1))):
            raise NonFiniteError(
                f"level logits of row {rows[wrong[0]]['row']} are {logits_NL[wrong[0]].tolist()}\n"
                "  - the model's weights may hold NaN: load it anew\n"
                "  - in float16 hidden states can overflow: use bfloat16 or float32"
            )
        return ScoreTable.of(logits_NL, self.levels, cut)

    def _batches(self, rows: list[dict[str, Any]], batch_size: int | None):
        """Places, prompts and level logits, batch by batch: texts first, the longest at the front;
        then rows with images, in order, whose pixels are in memory one batch at a time.
        """
        size = self.batch_size if batch_size is None else batch_size
        texts = [place for place, row in enumerate(rows) if not row.get("images")]
        made = {place: self.encoder.prompted(rows[place]) for place in texts}
        texts.sort(key=lambda place: -len(made[place].ids))
        prefix = self.logits.prefix([*made.values()]) if self.prefix_cache else None
        for start in range(0, len(texts), size):
            places = texts[start : start + size]
            some = [made.pop(place) for place in places]
            yield places, some, self._numbers(some, prefix)
        seen = [place for place, row in enumerate(rows) if row.get("images")]
        for start in range(0, len(seen), size):
            places = seen[start : start + size]
            some = [self.encoder.prompted(rows[place]) for place in places]
            yield places, some, self._numbers(some, None)

    def _numbers(self, some: list[Prompted], prefix: Any) -> np.ndarray:
        return self.logits(some, prefix).double().cpu().numpy()

    def row(self, given: Any, number: int = 0) -> dict[str, Any]:
        """An input as a row; DataError naming its number."""
        if isinstance(given, Mapping):
            if not any(given.get(key) for key in ("text", "messages", "images")):
                problem = f"input {number} has no text, messages or images"
                raise DataError.of("inputs", sorted(map(str, given)), problem)
            return {"row": number, **given}
        if isinstance(given, str):
            return {"row": number, "text": self.render({"text": given}, number)}
        if isinstance(given, Image.Image | bytes):
            return {"row": number, "images": [given]}
        if isinstance(given, Path):
            return {"row": number, "images": [str(given)]}
        if _is_chat(given):
            return {"row": number, "messages": given}
        if isinstance(given, tuple) and len(given) == 2 and all(isinstance(g, str) for g in given):
            columns = {"text": given[0], "text_pair": given[1]}
            return {"row": number, "text": self.render(columns, number)}
        problem = f"input {number} is no text, pair of texts, chat, image or row"
        raise DataError.of("inputs", type(given).__name__, problem)

    def render(self, columns: Mapping[str, str], number: int = 0) -> str:
        """The template filled with columns; without one texts follow each other. DataError for a
        column that is not there.
        """
        template = self.saved.template
        if template is None:
            return "\n\n".join(columns.values())
        for hole in HOLE.findall(template):
            if hole not in columns:
                problem = f"input {number} has no {hole}; it has {', '.join(columns)}"
                way = 'give rows: {"text": the text as the model reads it}'
                raise DataError.of("template", template, problem, way)
        return HOLE.sub(lambda hole: columns[hole[1]], template)


def window_of(config: Any, tokenizer: Any, given: int | None = None) -> int | None:
    """Tokens a prompt may have: the least of `given` and what model and tokenizer take, if any."""
    text = config.get_text_config()
    known = (given, getattr(text, "max_position_embeddings", None), tokenizer.model_max_length)
    return min((int(one) for one in known if one and one > 0), default=None)


def _is_chat(given: Any) -> bool:
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(t, Mapping) and "role" in t and "content" in t for t in given)
    )
