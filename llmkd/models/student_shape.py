"""The student's sizes: recipe keys, and the teacher's config made smaller by them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig

from llmkd.data.config import from_json
from llmkd.errors import LlmkdError, RecipeError
from llmkd.objectives.layer_map import LAYER_MAPS, layer_map
from llmkd.teachers.loading import load_config, whole_weights

INITS = ("random", "copy")
EMBEDDINGS = ("random", "pca")
SHAPE_KEYS = ("student_layers", "student_hidden_size", "student_heads", "student_intermediate_size")
FFN_NAMES = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim")
# Widths that follow the hidden size where the teacher's equals its own.
WIDTH_NAMES = ("embedding_size", "pooler_hidden_size", "word_embed_proj_dim")
HEAD_WIDTH_NAMES = ("head_dim", "attention_head_size")


@dataclass(kw_only=True)
class StudentShape:
    """Recipe keys of a student made from the teacher; what is left out is the teacher's."""

    student_layers: int | None = field(
        default=None, metadata={"help": "Transformer layers; by default the teacher's."}
    )
    student_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the hidden states; by default the teacher's."}
    )
    student_heads: int | None = field(
        default=None,
        metadata={
            "help": "Attention heads; by default the teacher's, which matching attention maps head "
            "by head needs."
        },
    )
    student_intermediate_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of the feed-forward layer; by default the teacher's share of the hidden "
            "size, rounded to a multiple of 8."
        },
    )
    student_init: str = field(
        default="random",
        metadata={
            "help": "random: new weights from the seed; copy: the teacher's embeddings and the "
            "layers of student_copy_layers, which needs the teacher's width, heads and FFN."
        },
    )
    student_copy_layers: list[int] | str | None = field(
        default=None,
        metadata={
            "help": "copy: teacher layers to take, ascending, the first is 1, e.g. '[1, 6, 12]'; "
            "or uniform (the default: layer i of M takes i * N / M), or last."
        },
    )
    student_embeddings: str = field(
        default="random",
        metadata={
            "help": "random: new embeddings from the seed; pca: the teacher's, cut to the "
            "student's width along their principal directions, which the shared projection begins "
            "with (ours, not the paper's)."
        },
    )
    student_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A student that exists, a folder or Hub id, instead of a shape."},
    )
    student_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of student_name_or_path."}
    )

    def __post_init__(self) -> None:
        if self.student_init not in INITS:
            raise RecipeError.of(
                "student_init", self.student_init, "unknown", f"known: {', '.join(INITS)}"
            )
        if self.student_embeddings not in EMBEDDINGS:
            raise RecipeError.of(
                "student_embeddings",
                self.student_embeddings,
                "unknown",
                f"known: {', '.join(EMBEDDINGS)}",
            )
        if self.student_embeddings != "random" and self.student_init == "copy":
            raise RecipeError.of(
                "student_embeddings",
                self.student_embeddings,
                "student_init copy takes the teacher's embeddings whole already",
                "leave student_embeddings out",
            )
        for key in SHAPE_KEYS:
            value = getattr(self, key)
            if value is not None and not _is_size(value):
                raise RecipeError.of(
                    key, value, "must be a whole number, at least 1", "leave it out: the teacher's"
                )
        if self.student_copy_layers not in LAYER_MAPS:
            self.student_copy_layers = from_json("student_copy_layers", self.student_copy_layers)
        self._check_copy()
        self._check_name()

    def _check_copy(self) -> None:
        layers = self.student_copy_layers
        if layers is None:
            return
        if self.student_init != "copy":
            raise RecipeError.of(
                "student_copy_layers",
                layers,
                f"nothing is copied with student_init {self.student_init}",
                "--student_init copy",
                "leave student_copy_layers out",
            )
        if isinstance(layers, str):
            return
        if not isinstance(layers, list) or not layers or not all(_is_size(n) for n in layers):
            raise RecipeError.of(
                "student_copy_layers",
                layers,
                "must be a list of teacher layers, the first is 1",
                "--student_copy_layers '[3, 6, 9, 12]'",
                f"--student_copy_layers {' or '.join(LAYER_MAPS)}",
            )

    def _check_name(self) -> None:
        if self.student_name_or_path is None:
            if self.student_revision is not None:
                raise RecipeError.of(
                    "student_revision",
                    self.student_revision,
                    "is the revision of student_name_or_path, which is not set",
                    "--student_name_or_path ID",
                )
            return
        others = [key for key in SHAPE_KEYS if getattr(self, key) is not None]
        others += ["student_init"] if self.student_init != "random" else []
        others += ["student_embeddings"] if self.student_embeddings != "random" else []
        if others:
            raise RecipeError.of(
                others[0],
                getattr(self, others[0]),
                f"the student {self.student_name_or_path!r} exists and has its own",
                f"leave {', '.join(others)} out",
                "leave student_name_or_path out: a new student of this shape",
            )

    def layers(self, teacher_layers: int) -> int:
        """Layers of the student of a teacher of `teacher_layers`; RecipeError outside 1..N."""
        listed = self.student_copy_layers
        wanted = self.student_layers or (
            len(listed) if isinstance(listed, list) else teacher_layers
        )
        return len(layer_map(wanted, teacher_layers, "last"))

    def copied_layers(self, teacher_layers: int) -> tuple[int, ...]:
        """Teacher layers, counted from 1, that `student_init: copy` takes; RecipeError as in
        `layer_map`.
        """
        how = self.student_copy_layers or "uniform"
        return layer_map(
            self.layers(teacher_layers), teacher_layers, how, key="student_copy_layers"
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def student_config(shape: StudentShape, teacher_config: PretrainedConfig) -> PretrainedConfig:
    """The config of the student: a copy of the teacher's with the sizes of `shape`.

    Vocabulary, special tokens, positions and labels stay the teacher's; the key and value heads
    keep their ratio to the heads, the width of a head and of embeddings follows the hidden size,
    and lists with one entry a layer are cut: to the first entries, or with `student_init: copy` to
    those of the copied layers. With `student_name_or_path` it is that model's config. Raises
    RecipeError for sizes that fit neither each other, nor the teacher (copy), nor the model type.
    """
    if shape.student_name_or_path is not None:
        return load_config(
            shape.student_name_or_path, shape.student_revision, "student_name_or_path"
        )
    if teacher_config.is_encoder_decoder:
        raise RecipeError.of(
            "student_layers",
            shape.student_layers,
            f"{teacher_config.model_type} is an encoder and a decoder, which have no one shape",
            "--student_name_or_path ID: a student that exists",
        )
    config = copy.deepcopy(teacher_config)
    # Not a quantized model, none that the Hub knows, and not of the dtype the teacher was saved in.
    vars(config).pop("quantization_config", None)
    config.architectures = config.dtype = None
    config.name_or_path = ""
    _set_sizes(shape, config.get_text_config())
    _check_builds(shape, config, teacher_config)
    return config


def _set_sizes(shape: StudentShape, text: Any) -> None:
    """Write the sizes of `shape` into `text`, which still holds the teacher's."""
    depth, width, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    new_depth = shape.layers(depth)
    new_width = shape.student_hidden_size or width
    new_heads = shape.student_heads or heads
    _check_division(shape, new_width, new_heads)
    name, old_ffn, ffn = _feed_forward(shape, text, new_width)
    if shape.student_init == "copy":
        kept = shape.copied_layers(depth)
        _check_same("student_hidden_size", new_width, width)
        _check_same("student_heads", new_heads, heads)
        _check_same("student_intermediate_size", ffn, old_ffn)
    else:
        kept = range(1, new_depth + 1)
    values = vars(text)
    for key, entries in list(values.items()):
        if "layer" in key and isinstance(entries, list | tuple) and len(entries) == depth:
            setattr(text, key, [entries[n - 1] for n in kept])
    for key in WIDTH_NAMES:
        if values.get(key) == width:
            setattr(text, key, new_width)
    for key in HEAD_WIDTH_NAMES:
        if values.get(key) is not None:
            setattr(text, key, _head_width(values[key], width, heads, new_width, new_heads))
    if values.get("num_key_value_heads") is not None:
        text.num_key_value_heads = _value_heads(text.num_key_value_heads, heads, new_heads)
    if name is not None and (getattr(text, name) is not None or ffn != 4 * new_width):
        setattr(text, name, ffn)
    text.num_hidden_layers = new_depth
    text.hidden_size = new_width
    text.num_attention_heads = new_heads


def _check_division(shape: StudentShape, width: int, heads: int) -> None:
    if width % heads == 0:
        return
    key = "student_heads" if shape.student_hidden_size is None else "student_hidden_size"
    fitting = [n for n in range(1, width + 1) if width % n == 0]
    near = sorted(fitting, key=lambda n: (abs(n - heads), n))[:3]
    lower = width // heads * heads
    raise RecipeError.of(
        key,
        heads if key == "student_heads" else width,
        f"hidden size {width} is no multiple of {heads} attention heads",
        f"--student_hidden_size {' or '.join(str(n) for n in (lower, lower + heads) if n)}",
        f"--student_heads {', '.join(map(str, sorted(near)))}",
    )


def _check_same(key: str, student: int, teacher: int) -> None:
    if student != teacher:
        raise RecipeError.of(
            key,
            student,
            f"student_init copy takes the teacher's weights, and its size is {teacher}",
            f"leave {key} out",
            "--student_init random",
        )


def _feed_forward(shape: StudentShape, text: Any, new_width: int) -> tuple[str | None, int, int]:
    """Config key of the feed-forward width, the teacher's width and the student's; `text` holds
    the teacher's sizes.
    """
    wanted, width = shape.student_intermediate_size, text.hidden_size
    name = next((key for key in FFN_NAMES if hasattr(text, key)), None)
    if name is None and wanted is not None:
        raise RecipeError.of(
            "student_intermediate_size",
            wanted,
            f"{text.model_type} has no config key for it",
            "leave it out",
        )
    old = getattr(text, name) if name else None
    if old is None:  # GPT-2 and kin: no value means four times the hidden size
        return name, 4 * width, wanted or 4 * new_width
    if wanted is not None or new_width == width:
        return name, old, wanted or old
    return name, old, max(8, 8 * math.floor(old * new_width / width / 8 + 0.5))


def _head_width(old: int, width: int, heads: int, new_width: int, new_heads: int) -> int:
    """Width of a head, in the teacher's proportion to hidden size / heads; even where that
    proportion is not 1.
    """
    if (width, heads) == (new_width, new_heads):
        return old
    if old * heads == width:
        return new_width // new_heads
    return max(2, 2 * round(old * heads * new_width / (2 * width * new_heads)))


def _value_heads(old: int, heads: int, new_heads: int) -> int:
    """Key and value heads in the teacher's ratio, or the most below it that divide the heads."""
    if old == 1:
        return 1
    most = max(1, old * new_heads // heads)
    return next(n for n in range(most, 0, -1) if new_heads % n == 0)


def _check_builds(shape: StudentShape, config: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """RecipeError where no model can be made of `config`, or one that cannot read a text."""
    try:
        config.validate()
        # As it will be read back from a saved student; every shape, no weights.
        model = _empty_body(type(config).from_dict(config.to_dict()))
    except Exception as error:  # upstream raises a type of its own for every kind of slip
        raise _no_model(shape, config, error) from error
    failed = _failures(model)
    if not all(failed):
        return
    # A failure that the teacher shares is a model type that cannot run without weights: it says
    # nothing about the sizes.
    for error, teachers in zip(failed, _failures(_empty_body(teacher)), strict=True):
        if error is not None and teachers is None:
            raise _no_model(shape, config, error) from error


def _empty_body(config: PretrainedConfig) -> Any:
    kind: Any = AutoModel._model_mapping[type(config)]
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # the others look at the values of the mask
    with whole_weights(), torch.device("meta"):
        return kind(config)


@torch.no_grad()
def _failures(model: Any) -> list[Exception | None]:
    """What a model that has shapes and no weights says to three tokens, without and with a mask.

    Both are asked because decoders look at the values of the ids, and encoders at those of the mask
    (to save work), and there are no values.
    """
    ids, failures = torch.zeros(1, 3, dtype=torch.long, device="meta"), []
    for mask in (None, torch.ones_like(ids)):
        try:
            model.eval()(input_ids=ids, attention_mask=mask)
            failures.append(None)
        except Exception as error:
            failures.append(error)
    return failures


def _no_model(shape: StudentShape, config: PretrainedConfig, error: Exception) -> LlmkdError:
    sizes = {key: getattr(shape, key) for key in SHAPE_KEYS if getattr(shape, key) is not None}
    key = next(iter(sizes), "student_layers")
    turns = bool(getattr(config.get_text_config(), "rope_parameters", None))
    return RecipeError.of(
        key,
        sizes.get(key),
        f"{sizes} makes no {config.model_type} that runs: "
        f"{type(error).__name__}: {str(error)[:300]}",
        *["hidden size / heads must be even: rotary positions turn pairs"] * turns,
        "leave the sizes out: the teacher's",
        "--student_name_or_path ID: a student that exists",
    )


def check_heads(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """RecipeError where student and teacher differ in attention heads: their attention maps are
    compared head by head.
    """
    ours = student.get_text_config().num_attention_heads
    theirs = teacher.get_text_config().num_attention_heads
    if ours != theirs:
        raise RecipeError.of(
            "student_heads",
            ours,
            f"attention maps are compared head by head, and the teacher has {theirs}",
            f"--student_heads {theirs}",
            "--attn none: hidden states alone",
        )
