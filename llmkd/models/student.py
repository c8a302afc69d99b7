"""Students made from a teacher: new weights, copied layers, and a task head on a trained body."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from llmkd.errors import RecipeError
from llmkd.models.student_shape import StudentShape, check_heads, student_config
from llmkd.teachers.loading import whole_weights

__all__ = [
    "StudentShape",
    "body_of",
    "check_heads",
    "copy_layers",
    "new_student",
    "student_config",
    "with_task_head",
]

HEADS: dict[str, Any] = {
    "none": AutoModel,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "causal": AutoModelForCausalLM,
}
# kind of task -> what transformers calls it; the model chooses its own loss by that name.
PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
    "token": None,
}


def new_student(
    config: PretrainedConfig,
    *,
    seed: int,
    head: str,
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    problem_type: str | None = None,
) -> PreTrainedModel:
    """A model of `config` with new float32 weights on the CPU; the same seed gives the same.

    `head`: none (the body, with a pooler where the type has one), sequence, token or causal.
    Labels left out stay those of `config`, which is not changed. Sets the global seed. Raises
    RecipeError where the model type has no such head or the labels contradict each other.
    """
    if head not in HEADS:
        raise RecipeError.of("head", head, "unknown", f"known: {', '.join(HEADS)}")
    config = copy.deepcopy(config)
    if label_names and num_labels not in (None, len(label_names)):
        raise RecipeError.of(
            "num_labels", num_labels, f"{len(label_names)} labels are named", "leave it out"
        )
    if label_names:
        _set_labels(config, label_names)
    elif num_labels is not None:
        config.num_labels = num_labels
    if problem_type is not None:
        config.problem_type = problem_type  # type: ignore[assignment]
    return _build(config, head, seed, torch.float32)


def with_task_head(
    body: PreTrainedModel, *, kind: str, label_names: Sequence[str] = (), seed: int
) -> PreTrainedModel:
    """A model for a task: the weights of `body` bit for bit, under a new head from `seed`.

    `kind`: single_label, multi_label, regression (one output a name, one where none is named) or
    token. `body` may carry another head, which is left out; its weights are copied, so that it can
    be trained on. Device, dtype and mode follow it; the pooler comes along where the task's model
    has one, and is new where `body` has none. A decoder without a padding token pads with its end
    of text. Raises RecipeError for an unknown kind, too few or repeated labels, or a model type
    without such a head. Under ZeRO-3 `body` must be whole, as it is when loaded from a folder.
    """
    if kind not in PROBLEMS:
        raise RecipeError.of("kind", kind, "no such task", f"known: {', '.join(PROBLEMS)}")
    names = list(label_names) or (["LABEL_0"] if kind == "regression" else [])
    least = 2 if kind == "single_label" else 1
    if len(names) < least or len(set(names)) < len(names):
        raise RecipeError.of(
            "label_names",
            names,
            f"a {kind} task needs at least {least} labels, each named once",
            "kind regression or multi_label: for one output",
        )
    config = copy.deepcopy(body.config)
    config.problem_type = None  # else the old one may contradict the new labels
    _set_labels(config, names)
    config.problem_type = PROBLEMS[kind]  # type: ignore[assignment]
    model = _build(config, "token" if kind == "token" else "sequence", seed, body.dtype)
    model = model.to(body.device)  # type: ignore[arg-type]
    source = body_of(body).state_dict()
    pairs = [
        (name, tensor, source.get(name)) for name, tensor in body_of(model).state_dict().items()
    ]
    _copy_all(pairs, "body", "make the body with new_student or AutoModel, of its own config")
    return model.train(body.training)


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; a body is its own."""
    return model.base_model  # type: ignore[return-value]


def copy_layers(student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]) -> None:
    """Copy into `student`, bit for bit, the teacher's embeddings, its layers `layers` (counted from
    1, one for each student layer), final norm, pooler, and the output embeddings where both have
    them.

    Teacher tensors the student has no place for are left out (ModernBERT's first layer has no
    norm in front). Raises RecipeError, before anything is copied, that names the first tensor
    that differs in shape or that the teacher lacks.
    """
    ours, theirs = body_of(student), body_of(teacher)
    (here, own), (there, known) = _layer_list(ours), _layer_list(theirs)
    if len(layers) != own or not all(1 <= n <= known for n in layers):
        raise RecipeError.of(
            "student_copy_layers",
            list(layers),
            f"the student has {own} layers and the teacher {known}",
            f"list {own} numbers in 1..{known}",
        )
    source, pairs = theirs.state_dict(), []
    for name, tensor in ours.state_dict().items():
        known_as = name
        if name.startswith(f"{here}."):
            place, rest = name.removeprefix(f"{here}.").split(".", 1)
            known_as = f"{there}.{layers[int(place)] - 1}.{rest}"
        pairs.append((name, tensor, source.get(known_as)))
    _copy_all(
        [*pairs, *_output_pairs(student, teacher)],
        "student_init",
        "leave student_hidden_size, student_heads and student_intermediate_size out",
        "--student_init random",
    )


def _layer_list(body: nn.Module) -> tuple[str, int]:
    """Name and length of the transformer layers: the outermost list as long as the config says."""
    config: Any = body.config
    depth = config.get_text_config().num_hidden_layers
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, depth
    raise RecipeError.of(
        "student_init",
        "copy",
        f"{config.model_type} has no list of {depth} layers to copy from",
        "--student_init random",
    )


def _output_pairs(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, student tensor and teacher tensor of language model heads; none where one has none."""
    ours, theirs = student.get_output_embeddings(), teacher.get_output_embeddings()
    if isinstance(ours, nn.Module) and isinstance(theirs, nn.Module):
        source = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            yield f"output embeddings {name}", tensor, source.get(name)


@torch.no_grad()
def _copy_all(pairs: Sequence[tuple[str, Tensor, Tensor | None]], key: str, *ways_out: str) -> None:
    """Copy each third (the original) into the second, once all are known to fit."""
    for name, to, source in pairs:
        if source is None and "pooler" in name.split("."):
            continue  # a body saved without its pooler; the new one stays as the seed made it
        if source is None or to.shape != source.shape:
            theirs = "missing" if source is None else tuple(source.shape)
            raise RecipeError.of(
                key,
                name,
                f"cannot be copied: its shape is {tuple(to.shape)}, the original {theirs}",
                *ways_out,
            )
    for _, to, source in pairs:
        if source is not None:
            to.copy_(source)


def _set_labels(config: PretrainedConfig, names: Sequence[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def _build(config: PretrainedConfig, head: str, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model with `head`, weights from `seed`; writes a missing padding token into `config`."""
    from transformers import set_seed

    auto = HEADS[head]
    if type(config) not in auto._model_mapping:
        able = [name for name, kind in HEADS.items() if type(config) in kind._model_mapping]
        raise RecipeError.of(
            "head", head, f"{config.model_type} has no such model", f"it has: {', '.join(able)}"
        )
    if head == "sequence":
        _set_padding(config)
    set_seed(seed)
    # Whole even under ZeRO-3: layers are copied before an engine shares the weights out.
    with whole_weights():
        return auto.from_config(config, dtype=dtype, trust_remote_code=False)


def _set_padding(config: PretrainedConfig) -> None:
    """Decoders classify at the last token that is no padding, so they must know the padding."""
    text: Any = config.get_text_config()
    encodes = type(config) in AutoModelForMaskedLM._model_mapping  # type: ignore[operator]
    if encodes or text.pad_token_id is not None:
        return
    end = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
    if end is None:
        raise RecipeError.of(
            "pad_token_id",
            None,
            f"{config.model_type} classifies at the last token before the padding, and its config "
            "names neither a padding token nor an end of text",
            "set pad_token_id in the model's config.json",
        )
    text.pad_token_id = end
