"""The tokenizer of a run: loaded, or a byte-level BPE trained on the train split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmkd.data.places import check_place
from llmkd.errors import RecipeError
from llmkd.files import digest

END = "<|endoftext|>"
# Below this a byte-level BPE has no room for its 256 bytes, the end mark and a single merge.
SMALLEST = 258


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE of `vocab_size` entries (the end mark included) and save it to
    `folder`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise RecipeError.of(
            "tokenizer_vocab_size", vocab_size, f"a byte-level BPE needs at least {SMALLEST}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_windows(texts), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END
    )
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _windows(texts: Iterable[str], size: int = 1 << 16) -> Iterator[str]:
    # Very long strings make the trainer's pre-tokenizer slow; merges never cross a line anyway.
    for text in texts:
        for start in range(0, len(text), size):
            yield text[start : start + size]


def load_tokenizer(
    name: str,
    revision: str | None = None,
    *,
    key: str = "tokenizer_name_or_path",
    needs_end: bool = True,
) -> PreTrainedTokenizerBase:
    """`AutoTokenizer` with remote code off; RecipeError names `key` where it fails.

    `needs_end=False` takes tokenizers without an end-of-text token: encoders have none.
    """
    check_place(key, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise RecipeError.of(
            key,
            name,
            f"its tokenizer cannot be loaded: {lines[0][:200]}",
            "check the id or folder; without network only local folders work",
            "name a tokenizer: --tokenizer_name_or_path",
        ) from error
    if needs_end and tokenizer.eos_token_id is None:
        raise RecipeError.of(key, name, "has no end-of-text token, which ends every document")
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """The id rows are padded with; 0 where the tokenizer has none (padding carries no label)."""
    found = getattr(tokenizer, "pad_token_id", None)
    return found if isinstance(found, int) else 0


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state: Any = {
            key: value
            for key, value in _json(backend.to_str()).items()
            if key not in ("truncation", "padding")  # set by calls, not by the vocabulary
        }
    else:
        state = [sorted(tokenizer.get_vocab().items()), type(tokenizer).__name__]
    return digest([state, tokenizer.eos_token_id])


def _json(text: str) -> dict[str, Any]:
    import json

    return json.loads(text)
