"""The work of `llmkd label`: a teacher's forward, encoded and written shard by shard."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from llmkd.data import PackedCollator
from llmkd.errors import DataError, LlmkdError, RunFolderError, TeacherError
from llmkd.labels import (
    AnyEncoding,
    StorePlan,
    StoreWriter,
    fit_lowrank,
    positions_of,
    row_digest,
)
from llmkd.labels.hidden import LowRank
from llmkd.objectives.fused import LogitBuffers
from llmkd.teachers import LiveTeacher
from llmkd.types import DenseLogits, Head, HiddenTarget

RECIPE = "recipe.yaml"  # beside the store: what made it
IN_FLIGHT = 2  # shards that may wait to be written while the teacher goes on
Row = dict[str, Any]
Piece = tuple[Row, list[Any]]


@dataclass
class Labeller:
    """A loaded teacher, an encoding, and how much it may hold at once."""

    teacher: LiveTeacher
    encoding: AnyEncoding
    pad_id: int
    batch_size: int
    memory_mib: int
    _buffers: LogitBuffers | None = None
    _head: Head | None = None  # the frozen teacher's, in the dtype of the products

    def batch(self, rows: list[Row]) -> dict[str, Tensor]:
        """Rows padded, on the host; a short batch is filled up with its first row.

        Products of another shape round differently: with every batch of one size a row's labels do
        not depend on where its shard ends.
        """
        return PackedCollator(self.pad_id)(rows + rows[:1] * (self.batch_size - len(rows)))

    def reduce(self, rows: list[Row], batch: dict[str, Tensor]) -> list[Piece]:
        """The teacher's answers to a batch as small tensors, row by row; waits for nothing."""
        device = PartialState().device
        target = self.teacher({name: value.to(device) for name, value in batch.items()})
        return [
            (row, self._pieces(target, place, len(row["input_ids"]), row["row"]))
            for place, row in enumerate(rows)
        ]

    def _pieces(
        self, target: HiddenTarget | DenseLogits, place: int, length: int, number: int
    ) -> list[Any]:
        encoding = self.encoding
        if isinstance(target, DenseLogits):
            if encoding.needs == "hidden":
                raise self._no_states()
            return [encoding.reduce(target.logits_BTV[place, :length], row=number)]
        hidden_TH = target.hidden_BTH[place, :length]
        if encoding.needs == "hidden":
            return [encoding.reduce(hidden_TH, row=number)]
        if self._buffers is None or self._head is None:
            self._buffers = LogitBuffers.for_budget(hidden_TH, encoding.shared, self.memory_mib)
            self._head = self._buffers.cast(target.head, self._buffers.product)
        step = self._buffers.rows
        return [
            encoding.reduce(
                self._buffers.project(hidden_TH[start : start + step], self._head, encoding.shared),
                row=number,
                start=start,
            )
            for start in range(0, length, step)
        ]

    def _no_states(self) -> LlmkdError:
        return TeacherError.of(
            "label_encoding",
            self.encoding.name,
            f"{self.teacher.name} gives no hidden states that a plain head could read",
            "--label_encoding sampled, or topk",
        )

    def pack(self, pieces: list[Piece]) -> list[Row]:
        """A batch's rows of the store; the only place that waits for the device."""
        return [self.stored(row, reduced) for row, reduced in pieces]

    def stored(self, row: Row, pieces: list[Any]) -> Row:
        """One row of the store."""
        ids = row["input_ids"]
        positions = positions_of(row.get("seq_lengths") or [len(ids)])
        return {
            "row": row["row"],
            "tokens": row_digest(ids, positions),
            "length": len(ids),
            **self.encoding.pack(*pieces),
        }

    def rows(self, rows: list[Row]) -> list[Row]:
        """Store rows of one batch, all at once (for `verify`)."""
        return self.pack(self.reduce(rows, self.batch(rows)))

    def hidden(self, rows: list[Row]) -> tuple[Tensor, Head]:
        """Final hidden states [tokens, H] of rows, and the head."""
        device = PartialState().device
        found, head = [], None
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            batch = {name: value.to(device) for name, value in self.batch(some).items()}
            target = self.teacher(batch)
            if isinstance(target, DenseLogits):
                raise self._no_states()
            head = target.head
            for place, row in enumerate(some):
                found.append(target.hidden_BTH[place, : len(row["input_ids"])].float())
        assert head is not None
        return torch.cat(found), head


def write_store(
    writer: StoreWriter, labeller: Labeller, rows: Any, sample: list[Row], *, quiet: bool = False
) -> tuple[int, float]:
    """Label every shard that is missing; returns tokens labelled here and seconds they took.

    `sample` are the rows that heads and fits are made of; `quiet` shows no bar. Ranks
    take shards in turn. The next batch is collated and finished shards are packed and written while
    the teacher works.
    """
    state = PartialState()
    _put_head(writer, labeller, sample)
    state.wait_for_everyone()
    if isinstance(labeller.encoding, LowRank):
        labeller.encoding = writer.lowrank()
    missing = writer.missing_shards()
    state.wait_for_everyone()  # all have looked before anybody writes, so all share one list
    mine = missing[state.process_index :: state.num_processes]
    began, tokens = time.monotonic(), 0
    total = sum(len(writer.plan.shard_rows(n)) for n in mine)
    with (
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as packer,
        _bar(total, quiet or not state.is_main_process) as bar,
    ):
        waiting: deque[Future[Any]] = deque()
        for number, batches in _shards(writer.plan, rows, mine, labeller, reader):
            packed: list[Future[list[Row]]] = []
            for some, batch in batches:
                pieces = labeller.reduce(some, batch)
                packed.append(packer.submit(labeller.pack, pieces))
                tokens += sum(len(row["input_ids"]) for row in some)
                bar.update(len(some))
            waiting.append(packer.submit(_finish, writer, number, packed))
            while len(waiting) > IN_FLIGHT:
                waiting.popleft().result()
        _keep_step(labeller, writer.plan, missing, sample)
        for future in waiting:
            future.result()
    return tokens, time.monotonic() - began


def _bar(total: int, hidden: bool) -> tqdm:
    # only a bar that is hidden says so: `disable=False` would overrule TQDM_DISABLE
    name = "labelling rows"
    return tqdm(total=total, desc=name, disable=True) if hidden else tqdm(total=total, desc=name)


def _finish(writer: StoreWriter, number: int, packed: list[Future[list[Row]]]) -> None:
    # one packing thread, so everything in `packed` is done by the time it comes here
    writer.write_shard(number, [row for part in packed for row in part.result()])


def _keep_step(labeller: Labeller, plan: StorePlan, missing: list[int], sample: list[Row]) -> None:
    """Where the teacher is sharded every rank must ask it equally often: idle ranks ask again."""
    state = PartialState()
    if state.num_processes == 1 or not labeller.teacher.sharded:
        return
    size = labeller.batch_size

    def batches(rank: int) -> int:
        own = missing[rank :: state.num_processes]
        return sum(-(-len(plan.shard_rows(n)) // size) for n in own)

    most = max(batches(rank) for rank in range(state.num_processes))
    for _ in range(most - batches(state.process_index)):
        labeller.reduce(sample[:1], labeller.batch(sample[:1]))


def _put_head(writer: StoreWriter, labeller: Labeller, sample: list[Row]) -> None:
    if labeller.encoding.needs != "hidden" or writer.has_head:
        return
    hidden_NH, head = labeller.hidden(sample)  # every rank: a sharded teacher needs them all
    if not writer.main:
        return
    encoding = labeller.encoding
    if isinstance(encoding, LowRank):
        fit = fit_lowrank(hidden_NH, head, encoding.rank, shared=encoding.shared)
        writer.put_head(fit=fit)
    else:
        writer.put_head(head)


def _shards(
    plan: StorePlan, rows: Any, numbers: list[int], labeller: Labeller, reader: ThreadPoolExecutor
) -> Iterator[tuple[int, Iterator[tuple[list[Row], dict[str, Tensor]]]]]:
    """Shard number and its batches; each batch is collated while the one before is with the
    teacher.
    """
    stream = None if isinstance(rows, Dataset) else _stream_shards(plan, rows)
    for number in numbers:
        if stream is None:
            wanted = plan.shard_rows(number)
            groups = [
                wanted[at : at + labeller.batch_size]
                for at in range(0, len(wanted), labeller.batch_size)
            ]
            load = [reader.submit(_read, rows, group, labeller) for group in groups[:2]]
            yield number, _ahead(rows, groups, load, labeller, reader)
        else:
            held = next(part for at, part in stream if at == number)
            size = labeller.batch_size
            some = [held[at : at + size] for at in range(0, len(held), size)]
            yield number, ((part, labeller.batch(part)) for part in some)


def _ahead(
    rows: Dataset,
    groups: list[np.ndarray],
    load: list[Future[Any]],
    labeller: Labeller,
    reader: ThreadPoolExecutor,
) -> Iterator[tuple[list[Row], dict[str, Tensor]]]:
    for place in range(len(groups)):
        ready = load.pop(0).result()
        if place + 2 < len(groups):
            load.append(reader.submit(_read, rows, groups[place + 2], labeller))
        yield ready


def _read(
    rows: Dataset, numbers: np.ndarray, labeller: Labeller
) -> tuple[list[Row], dict[str, Tensor]]:
    some = [rows[int(number)] for number in numbers]
    return some, labeller.batch(some)


def _stream_shards(plan: StorePlan, rows: Any) -> Iterator[tuple[int, list[Row]]]:
    source = iter(rows)
    for number in range(plan.shards):
        part = list(islice(source, len(plan.shard_rows(number))))
        if len(part) < len(plan.shard_rows(number)):
            raise DataError.of(
                "dataset",
                f"{plan.total_rows} rows",
                f"the stream is shorter than it was: it ends in the middle of shard {number}",
                "the same text as before: whole shards are kept, the same command goes on",
                "other text: --overwrite_labels true, or another --label_store",
            )
        yield number, part


def check_writable(folder: Path) -> None:
    """RunFolderError where a store cannot be written to `folder`; nothing is written."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
        raise RunFolderError.of(
            "label_store", str(folder), f"cannot be written to ({place})", "name another folder"
        )


def autocast_of(args: Any) -> str | None:
    """The dtype in which training with these arguments multiplies; None for the weights' own."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else None


def labelling_accelerator(args: Any, batch_size: int) -> Accelerator:
    """Where a teacher answers that no trainer brings in: ranks, plugins and precision of `args`."""
    # The accelerator of a teacher trained here would be of another precision or plugin.
    AcceleratorState._reset_state()
    plugin = getattr(args, "deepspeed_plugin", None)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    accelerator = Accelerator(mixed_precision=precision, deepspeed_plugin=plugin)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        known = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": 1,
            "train_batch_size": batch_size * accelerator.num_processes,
            "gradient_clipping": 1.0,
        }
        for key, value in known.items():  # "auto" is filled in by a trainer; here is none
            plugin.deepspeed_config[key] = value
    return accelerator
