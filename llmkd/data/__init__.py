"""From a name in a recipe to batches of token ids."""

from llmkd.data.collator import PackedCollator
from llmkd.data.config import DataConfig
from llmkd.data.general import GeneralRows, check_not_the_task, general_rows
from llmkd.data.order import LengthGroupedSampler, training_order
from llmkd.data.prepare import TokenRows, prepare_rows, token_counts
from llmkd.data.sources import Documents, load_documents
from llmkd.data.task import TaskRows, load_task
from llmkd.data.task_collator import TaskCollator
from llmkd.data.task_config import TaskConfig
from llmkd.data.tokenizer import load_tokenizer, pad_id, tokenizer_digest, train_bpe

__all__ = [
    "DataConfig",
    "Documents",
    "GeneralRows",
    "LengthGroupedSampler",
    "PackedCollator",
    "TaskCollator",
    "TaskConfig",
    "TaskRows",
    "TokenRows",
    "check_not_the_task",
    "general_rows",
    "load_documents",
    "load_task",
    "load_tokenizer",
    "pad_id",
    "prepare_rows",
    "token_counts",
    "tokenizer_digest",
    "train_bpe",
    "training_order",
]
