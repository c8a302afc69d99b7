"""What `llmkd eval` may be pointed at, checked before any weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd.errors import HubError, LlmkdError, MissingFileError, RecipeError
from llmkd.files import read_json

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ModelSource:
    """`pretrained` is a Hub id or an absolute folder; `peft` an adapter folder on top of it.

    `tokenizer` None means the one of `pretrained`.
    """

    given: str | Path
    pretrained: str
    peft: str | None = None
    tokenizer: str | None = None

    @property
    def data_roots(self) -> tuple[Path, ...]:
        """Folders whose `held_out.jsonl` belongs to this model: its own, then the run's parent."""
        folder = Path(self.peft or self.pretrained)
        return (folder, folder.parent) if folder.is_dir() else ()

    def load(self, *, batch_size: int | str, device: str, dtype: str) -> Any:
        """lm_eval's HFLM around the model, in eval mode on `device`. Never runs code from a folder
        or from the Hub (trust_remote_code stays off)."""
        try:
            return _hflm_class()(
                pretrained=self.pretrained,
                peft=self.peft,
                tokenizer=self.tokenizer,
                batch_size=batch_size,
                device=device,
                dtype=dtype,
            )
        except (OSError, ValueError) as error:
            raise _unreadable(self.given, self.pretrained, error) from error


def model_source(model: str | Path) -> ModelSource:
    """Tell folders, adapters and Hub ids apart and read the configuration.

    Raises MissingFileError (no such folder, adapter without its base), RecipeError (a folder that
    holds no model or no tokenizer), HubError (an id that cannot be fetched).
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        source = _folder_source(model, folder.resolve())
    elif folder.is_file():
        way = "give its folder"
        raise RecipeError.of("model", str(model), "is a file, not a model folder", way)
    elif isinstance(model, Path) or _looks_like_path(model):
        way = "give a folder with config.json and weights, or a Hub id"
        raise MissingFileError.of("model", str(model), "no such folder", way)
    else:
        source = ModelSource(model, model)
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(source.pretrained, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(model, source.pretrained, error) from error
    return source


def _hflm_class() -> Any:
    """HFLM with two repairs of lm_eval 0.4.13; delete each when it is done upstream.

    A rolling task gets one progress bar, not one for every batch. An adapter's base keeps its head:
    HFLM cuts a head that is padded beyond the tokenizer, which changes every probability.
    """
    from lm_eval.models import huggingface
    from tqdm import tqdm

    base: Any = huggingface.HFLM  # its registering decorator hides the class from pyright

    class RepairedHFLM(base):
        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            counts = (len(self.tok_encode(one.args[0])) for one in requests)
            total = sum(-(-count // self.max_length) for count in counts)
            hidden = disable_tqdm or self.rank != 0
            with tqdm(total=total, desc="Rolling windows", disable=hidden) as self._bar:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            rolling = override_bs is not None
            answers = super()._loglikelihood_tokens(requests, disable_tqdm or rolling, override_bs)
            if rolling:
                self._bar.update(len(requests))
            return answers

        def _create_model(self, pretrained: str, peft: str | None = None, **rest: Any) -> None:
            super()._create_model(pretrained, peft=None, **rest)
            if peft is None:
                return
            from peft import PeftModel

            if len(self.tokenizer) > self._model.get_input_embeddings().num_embeddings:
                self._model.resize_token_embeddings(len(self.tokenizer))
            self._model = PeftModel.from_pretrained(self._model, peft)

    return RepairedHFLM


def check_chat_template(source: ModelSource) -> None:
    """RecipeError where the tokenizer has no chat template to apply."""
    from transformers import AutoTokenizer

    name = source.tokenizer or source.pretrained
    if AutoTokenizer.from_pretrained(name, trust_remote_code=False).chat_template is None:
        raise RecipeError.of(
            "apply_chat_template", True, f"{source.given} has no chat template", "leave it out"
        )


def arms_of(folder: Path) -> list[str]:
    """Arm names of a recipe's parent folder, in the recipe's order; [] for anything else."""
    try:
        run = read_json(folder / "run.json")
    except json.JSONDecodeError as error:
        raise RecipeError.of("run.json", str(folder), f"is not JSON: {error}") from error
    arms = run.get("arms") if isinstance(run, dict) else None
    return [str(name) for name in arms] if isinstance(arms, (list, dict)) else []


def _folder_source(given: str | Path, folder: Path) -> ModelSource:
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise RecipeError.of("base_model_name_or_path", base, f"is missing in {adapter}")
        local = Path(base).expanduser()
        if not local.is_dir() and _looks_like_path(base):
            way = f"bring it back, or change base_model_name_or_path in {adapter}"
            raise MissingFileError.of("base_model_name_or_path", base, "no such folder", way)
        pretrained = str(local.resolve()) if local.is_dir() else base
        return ModelSource(given, pretrained, str(folder), str(folder) if has_tokenizer else None)
    if not (folder / "config.json").is_file():
        ways = ["give a folder written by save_pretrained"]
        if arms := arms_of(folder):
            ways = [f"it holds several models; give one: {', '.join(arms)}"]
        raise RecipeError.of("model", str(given), "holds neither config.json nor an adapter", *ways)
    if not has_tokenizer:
        way = "tokenizer.save_pretrained into it"
        raise RecipeError.of("model", str(given), "holds no tokenizer files", way)
    return ModelSource(given, str(folder))


def _looks_like_path(model: str) -> bool:
    """A Hub id is `name` or `owner/name`; `runs/x` is a path where `runs` is a folder here."""
    parts = model.split("/")
    rooted = model.startswith((".", "~", "/")) or model.endswith("/")
    return rooted or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())


def _unreadable(given: str | Path, pretrained: str, error: Exception) -> LlmkdError:
    text = str(error).strip().splitlines()
    problem = f"cannot be loaded: {text[0] if text else type(error).__name__}"
    if Path(pretrained).is_dir():
        return RecipeError.of("model", str(given), problem, "its files may be of an unfinished run")
    way = "it is no local folder; as a Hub id it needs the network, and a token if it is private"
    return HubError.of("model", pretrained, problem, way)
