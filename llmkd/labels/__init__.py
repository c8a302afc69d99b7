"""Soft labels as data: five encodings and the verified store they are kept in."""

from llmkd.labels.base import Columns, Encoding, Layout
from llmkd.labels.checks import check_matches, describe, verify_checksums
from llmkd.labels.classes import class_plan, write_class_store
from llmkd.labels.dense import Dense
from llmkd.labels.digests import positions_of, row_digest
from llmkd.labels.encodings import (
    DEFAULT_TAIL,
    ENCODINGS,
    AnyEncoding,
    encoding_from,
    make_encoding,
)
from llmkd.labels.hidden import Hidden, LowRank
from llmkd.labels.lowrank import LowRankFit, fit_lowrank
from llmkd.labels.manifest import StorePlan
from llmkd.labels.sampled import Sampled
from llmkd.labels.store import Store
from llmkd.labels.topk import TopK
from llmkd.labels.writer import StoreWriter, check_folder

__all__ = [
    "DEFAULT_TAIL",
    "ENCODINGS",
    "AnyEncoding",
    "Columns",
    "Dense",
    "Encoding",
    "Hidden",
    "Layout",
    "LowRank",
    "LowRankFit",
    "Sampled",
    "Store",
    "StorePlan",
    "StoreWriter",
    "TopK",
    "check_folder",
    "check_matches",
    "class_plan",
    "describe",
    "encoding_from",
    "fit_lowrank",
    "make_encoding",
    "positions_of",
    "row_digest",
    "verify_checksums",
    "write_class_store",
]
