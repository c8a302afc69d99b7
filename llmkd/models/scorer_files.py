"""A scorer in a folder: the model, its tokenizer or processor, and `levels.json` beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils.hub import cached_file

from llmkd.data.levels import Levels, check_levels
from llmkd.data.score_tokens import ScorePrompt
from llmkd.data.tokenizer import load_tokenizer
from llmkd.errors import DataError, LlmkdError, RecipeError
from llmkd.files import read_json, write_json
from llmkd.teachers.loading import load_config, load_model

LEVELS_FILE = "levels.json"
INPUTS = ("text", "messages", "images")
FORMAT = 1


@dataclass(frozen=True)
class SavedLevels:
    """What a scorer was trained with: levels, questions, and how its inputs looked.

    `template` made texts of columns (None: the text itself); `inputs` is text, messages or images;
    `scale` the raters' lowest and highest score, where all rows had one scale.
    """

    levels: Levels
    prompt: ScorePrompt
    template: str | None = None
    inputs: str = "text"
    scale: tuple[float, float] | None = None
    max_length: int | None = None


def save_levels(folder: str | Path, saved: SavedLevels) -> None:
    """Write `levels.json` into a model's folder."""
    levels = saved.levels
    write_json(
        Path(folder) / LEVELS_FILE,
        {
            "format": FORMAT,
            "words": levels.words,
            "values": levels.values_L,
            "ids": levels.ids_L,
            "prefix": levels.prefix,
            **asdict(saved.prompt),
            "template": saved.template,
            "inputs": saved.inputs,
            "scale": saved.scale,
            "max_length": saved.max_length,
        },
    )


def load_levels(name: str, revision: str | None = None) -> SavedLevels | None:
    """`levels.json` of a folder or Hub model, None where there is none; DataError for a broken
    one.
    """
    if Path(name).is_dir():
        path: Any = Path(name) / LEVELS_FILE
    else:
        quiet: Any = {f"_raise_exceptions_for_{what}": False for what in _MISSING}
        path = cached_file(name, LEVELS_FILE, revision=revision, **quiet)
    if path is None or not Path(path).is_file():
        return None
    try:
        given = read_json(Path(path))
        if given["format"] != FORMAT:
            raise ValueError(f"format {given['format']}; this llmkd reads {FORMAT}")
        if given["inputs"] not in INPUTS:
            raise ValueError(f"inputs {given['inputs']!r}; known: {', '.join(INPUTS)}")
        words, values = check_levels(given["words"], given["values"], key=LEVELS_FILE)
        ids = tuple(int(one) for one in given["ids"])
        if len(ids) != len(words):
            raise ValueError(f"{len(ids)} ids for {len(words)} words")
        prompt = ScorePrompt(tuple(given["questions"]), given["suffix"], given["system"])
        scale = given["scale"] and (float(given["scale"][0]), float(given["scale"][1]))
        levels = Levels(words, values, ids, given["prefix"])
        rest = given["template"], given["inputs"], scale, given["max_length"]
        return SavedLevels(levels, prompt, *rest)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        problem = f"cannot be read: {type(error).__name__}: {error}"
        raise DataError.of(LEVELS_FILE, str(path), problem, "write it again by training") from error


_MISSING = ("gated_repo", "missing_entries", "connection_errors")


def check_tokens(levels: Levels, tokenizer: Any, name: str) -> None:
    """DataError where the ids of the levels are not these words in a tokenizer."""
    for word, token in zip(levels.words, levels.ids_L, strict=True):
        if (found := tokenizer.decode([token]).strip()) != word:
            problem = f"id {token} is {found!r} in the tokenizer of {name}"
            raise DataError.of(LEVELS_FILE, word, problem, "the tokenizer it was trained with")


def load_level_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    attn: str | None = None,
    key: str = "model_name_or_path",
) -> PreTrainedModel:
    """A causal LM, or an image-text-to-text model: safetensors only, no remote code.

    RecipeError that names `key` where it cannot be loaded, or is neither.
    """
    config = load_config(name, revision, key) if not is_adapter(name) else None
    if config is None or not sees_images(config):
        return load_model(name, revision=revision, dtype=dtype, attn=attn, key=key)
    options: dict[str, Any] = {"attn_implementation": attn} if attn else {}
    try:
        return AutoModelForImageTextToText.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(key, name, error) from error


def is_adapter(name: str) -> bool:
    """Whether a local folder holds an adapter only, whose base model is somewhere else."""
    folder = Path(name)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def sees_images(config: Any) -> bool:
    """Whether a config is one of an image-text-to-text model (and of no plain causal LM)."""
    kind = type(config)
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and (
        kind not in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "vision_config")
    )


def load_processor(name: str, revision: str | None = None, *, key: str = "model_name_or_path"):
    """The processor of an image-text model, the tokenizer of any other; RecipeError names `key`."""
    if is_adapter(name) or not sees_images(load_config(name, revision, key)):
        return load_tokenizer(name, revision, key=key, needs_end=False)
    try:
        return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise _not_loaded(key, name, error) from error


def _not_loaded(key: str, name: str, error: Exception) -> LlmkdError:
    problem = f"cannot be loaded: {(str(error).splitlines() or [''])[0][:240]}"
    ways = ("check the id or folder", "without network only local folders work")
    return RecipeError.of(key, name, problem, *ways)
