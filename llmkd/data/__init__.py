"""From a name in a recipe to batches of token ids."""

from llmkd.data.collator import PackedCollator
from llmkd.data.config import DataConfig
from llmkd.data.order import training_order
from llmkd.data.prepare import TokenRows, prepare_rows
from llmkd.data.sources import Documents, load_documents
from llmkd.data.tokenizer import load_tokenizer, pad_id, tokenizer_digest, train_bpe

__all__ = [
    "DataConfig",
    "Documents",
    "PackedCollator",
    "TokenRows",
    "load_documents",
    "load_tokenizer",
    "pad_id",
    "prepare_rows",
    "tokenizer_digest",
    "train_bpe",
    "training_order",
]
