"""Reading models from the Hub or a folder: safetensors only, no remote code, one clear error."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from llmkd.data.places import check_place, way_to
from llmkd.errors import LlmkdError, RecipeError, TeacherError
from llmkd.files import digest

TASK_HEADS = ("sequence", "token")
AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "none": AutoModel,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}
COMMIT = re.compile(r"[0-9a-f]{40}")


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = "float32",
    attn: str | None = None,
    key: str = "model_name_or_path",
    quantization: Any = None,
    head: str = "causal",
) -> PreTrainedModel:
    """A model with safetensors only and remote code off; `head` says which: causal, none (the body
    alone), sequence or token (classification).

    Raises RecipeError that names `key` where the model cannot be loaded, TeacherError where a
    classification head is asked for that the folder does not hold.
    """
    check_place(key, name)
    options: dict[str, Any] = {"attn_implementation": attn} if attn else {}
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        model, found = AUTO[head].from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(key, name, error) from error
    if head in TASK_HEADS:
        _require_head(key, name, found["missing_keys"])
    return model


def _require_head(key: str, name: str, missing: Iterable[str]) -> None:
    # Upstream would make up the weights that are not there and only warn.
    if missing := sorted(missing):
        raise TeacherError.of(
            key,
            name,
            f"has no head for the task: {missing[0]} is not among its weights",
            "name a model that was fine-tuned on the task",
            "leave it out: the recipe then fine-tunes teacher_model_name_or_path itself",
        )


def load_config(name: str, revision: str | None, key: str) -> PretrainedConfig:
    """The config of a model without its weights; RecipeError that names `key`."""
    check_place(key, name)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_loaded(key, name, error) from error


def _not_loaded(key: str, name: str, error: Exception) -> LlmkdError:
    here = [] if Path(name).exists() else [f"if it is a folder: {way_to(name)[0]}"]
    return RecipeError.of(
        key,
        name,
        f"cannot be loaded: {str(error).splitlines()[0][:240]}",
        "check the id or folder; a folder needs config.json and model.safetensors",
        *here,
        "without network only local folders work",
    )


@contextmanager
def whole_weights() -> Iterator[None]:
    """Load a model whole on every rank even under ZeRO-3, for one that no DeepSpeed engine runs."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit of a Hub model as it lies in the Hub's cache, so call it after `load_config`.

    `revision` is a branch (None: main), tag or commit. None for a local folder and for what was
    never fetched. Asks nobody, so it works offline. transformers 5.20 wrote the commit into the
    config, later versions do not.
    """
    if Path(name).is_dir():
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no id of a repository
        return None
    if not isinstance(found, str):  # not there, or known not to be there
        return None
    commit = Path(found).parent.name  # .../snapshots/<commit>/config.json
    return commit if COMMIT.fullmatch(commit) else None


def model_fingerprint(source: str | None, commit: str | None) -> str | None:
    """Hash that changes with the weights: the Hub commit, or sizes and ends of the weight files."""
    if source is None:
        return None
    if not Path(source).is_dir():
        return digest([source, commit])
    total = hashlib.sha256()
    for path in sorted(Path(source).glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as handle:
            total.update(f"{path.name} {size}".encode())
            total.update(handle.read(1 << 20))
            handle.seek(max(size - (1 << 20), 0))
            total.update(handle.read())
    return total.hexdigest()[:16]


def check_weights(source: str, key: str) -> None:
    """TeacherError where a local folder's safetensors hold NaN or infinity (a Hub id is checked
    when it is loaded).
    """
    from safetensors import safe_open

    if not Path(source).is_dir():
        return
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                values = weights.get_tensor(name)
                if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                    raise TeacherError.of(
                        key,
                        source,
                        f"its weight {name} holds NaN or infinity",
                        "download or export it again",
                    )


@torch.no_grad()
def check_packing(model: Any, key: str) -> None:
    """RecipeError where a document in a packed row can see the one before it.

    Most decoders take document borders from position ids that restart; some ignore them (OPT,
    BLOOM, Falcon, MPT, state-space models). Asked of the model itself: the second document's logits
    must not change with the first.
    """
    device = next(model.parameters()).device
    first = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], device=device)
    other = first.clone()
    other[0, :4] = torch.tensor([4, 3, 2, 1], device=device)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    training = model.training
    model.eval()
    try:
        one, two = (
            model(input_ids=ids, position_ids=places, use_cache=False).logits[:, 4:].float()
            for ids in (first, other)
        )
        leaks = (one - two).abs().max().item() > 1e-5 * one.abs().max().item()
    except TypeError:  # a model that takes no position ids cannot tell documents apart
        leaks = True
    model.train(training)
    if leaks:
        raise RecipeError.of(
            "packing",
            True,
            f"{model.config.model_type} ({key}) lets packed documents see each other",
            "--packing false --truncate true",
        )
