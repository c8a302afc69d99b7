"""A teacher in memory: loaded when first needed, frozen, released when its stage is over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmkd.data.collator import for_the_model
from llmkd.data.tokenizer import load_tokenizer
from llmkd.errors import RecipeError, TeacherError
from llmkd.teachers.causal_head import TASK, head_agrees, keep_head, open_head
from llmkd.teachers.frozen import collect, freeze, let_go, place
from llmkd.teachers.loading import check_packing, load_config, load_model
from llmkd.types import DenseLogits, Head, HiddenTarget

logger = logging.getLogger(__name__)
PROBE = "def f(x):\n\treturn x ** 2  # Zażółć 语言 \u00a0 12345 don't"


class LiveTeacher:
    """A causal LM that answers a batch with its final hidden states and its head.

    Where the head is no plain linear map the answer is `DenseLogits`. Under ZeRO-3 and FSDP each
    rank keeps one whole copy of the head, the rest stays sharded.

    `source` is a Hub id, a local folder or a model. An id or a folder is loaded by `load`, so that
    a run resumed after its KD stage never reads the weights. Calling it needs `load` first.
    """

    def __init__(
        self,
        source: str | Path | PreTrainedModel,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        packed: bool = False,
    ) -> None:
        self.source = source
        self.revision = revision
        self.dtype = dtype
        self.packed = packed
        self.model: Any = source if isinstance(source, torch.nn.Module) else None
        self.shared: int | None = None
        self.forwards = 0
        self._accelerator: Any = None
        self._opens = False  # whether the model gives hidden states; settled by the first batch
        self._head: Head | None = None

    @property
    def loaded(self) -> bool:
        """Whether it holds memory that `release` would free."""
        return self.model is not None

    @property
    def name(self) -> str:
        """Id, folder, or the id an instance was loaded from."""
        if isinstance(self.source, torch.nn.Module):
            config = getattr(self.source, "config", None)
            return getattr(config, "_name_or_path", "") or type(self.source).__name__
        return str(self.source)

    def config(self) -> PretrainedConfig:
        """The teacher's config, read without its weights."""
        if isinstance(self.source, PreTrainedModel):
            return self.source.config
        return load_config(str(self.source), self.revision, "teacher_model_name_or_path")

    def check(self, student_vocab: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuse, without loading weights, a teacher that speaks other tokens than the student.

        Heads padded to different sizes are fine: the shared leading entries are compared.
        """
        vocab = self.config().vocab_size
        if tokenizer is None:
            if vocab != student_vocab:
                raise TeacherError.of(
                    "teacher",
                    self.name,
                    f"has {vocab:,} entries, the student {student_vocab:,}; whether the first of "
                    "them mean the same tokens cannot be told without a tokenizer",
                    "pass processing_class=tokenizer to the trainer",
                )
            self.shared = vocab
            return
        words = len(tokenizer)
        if vocab < words:
            raise TeacherError.of(
                "teacher",
                self.name,
                f"has {vocab:,} entries, fewer than the tokenizer's {words:,}",
                "train the teacher with this tokenizer, or take one of the same family",
            )
        if not isinstance(self.source, torch.nn.Module):
            self._check_tokenizer(tokenizer)
        self.shared = min(vocab, student_vocab, words)

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            own = load_tokenizer(str(self.source), self.revision)
        except RecipeError as error:
            folder = Path(str(self.source))
            if not folder.is_dir() or any(folder.glob("*token*")):
                raise TeacherError(str(error)) from error
            logger.warning(
                "teacher %s ships no tokenizer; its vocabulary is not checked", self.name
            )
            return
        theirs, ours = own.get_vocab(), tokenizer.get_vocab()
        differing = sum(1 for token, place in ours.items() if theirs.get(token) != place)
        same_text = (
            own(PROBE, add_special_tokens=False)["input_ids"]
            == tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        )
        if differing or not same_text:
            raise TeacherError.of(
                "teacher",
                self.name,
                f"has another tokenizer than the student: {differing:,} of {len(ours):,} tokens "
                f"differ, the probe text is cut {'alike' if same_text else 'differently'}",
                "take a teacher of the student's family (heads padded to other sizes are fine)",
                f"or train the student on the teacher's tokens: --tokenizer_name_or_path "
                f"{self.name}",
            )

    def check_dataset(self, rows: Any) -> None:
        """Any rows will do: it is asked about what comes."""

    def load(self, accelerator: Any) -> None:
        """Load, freeze, check for NaN and place the weights: sharded under ZeRO-3 and FSDP, else
        one copy a rank. Does nothing when loaded already."""
        if self._accelerator is not None:
            return
        if self.model is None:
            self.model = load_model(
                str(self.source),
                revision=self.revision,
                dtype=self.dtype,
                key="teacher_model_name_or_path",
            )
        freeze(self.model, self.name)
        if self.packed and not hasattr(next(self.model.parameters()), "ds_tensor"):
            check_packing(self.model, "teacher")
        self._opens = open_head(self.model)
        self.model = place(self.model, accelerator)
        self._accelerator = accelerator

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> HiddenTarget | DenseLogits:
        """The soft label of a batch of `input_ids` and, where given, masks and positions; labels
        and row numbers are left alone.

        On the token it predicts: position t holds the distribution of the token after it.
        """
        if self._accelerator is None:
            raise RuntimeError("call load() before asking the teacher")
        inputs = for_the_model(inputs)
        with self._accelerator.autocast():
            if self.forwards == 0:
                self._settle(inputs)
            self.forwards += 1
            if not self._opens:
                logits_BTV = self.model(**inputs, use_cache=False).logits
                return DenseLogits(logits_BTV, self.shared or logits_BTV.shape[-1])
            return self._ask(inputs)

    def _settle(self, inputs: Mapping[str, Tensor]) -> None:
        self._opens = self._opens and head_agrees(self.model, dict(inputs))
        if self._opens and self.sharded:
            self._head = keep_head(self.model, dict(inputs))
        if not self._opens:
            logger.warning("teacher %s: its head is no plain one; it answers in logits", self.name)

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts of it and must ask together (ZeRO-3, FSDP)."""
        from accelerate.utils import DistributedType

        if self._accelerator is None or self.model is None:
            return False
        if self._accelerator.distributed_type == DistributedType.FSDP:
            return True
        return any(hasattr(weight, "ds_id") for weight in self.model.parameters())

    def _ask(self, inputs: Mapping[str, Tensor]) -> HiddenTarget:
        answer: list[HiddenTarget] = []

        def task(hidden_BTH: Tensor, head: Head) -> dict[str, Tensor]:
            head = self._head or head
            answer.append(HiddenTarget(hidden_BTH, head, self.shared or head.weight.shape[0]))
            return {"hidden": hidden_BTH}

        self.model(**inputs, use_cache=False, **{TASK: task})
        return answer[0]

    def release(self) -> None:
        """Let go of the weights. An instance the caller also holds stays in the caller's memory.

        What was given as an instance is afterwards known by its name alone.
        """
        if self.model is None:
            return
        self.source = self.name
        let_go(self.model)
        self.model = self._head = self._accelerator = None
        collect()
