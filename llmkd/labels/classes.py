"""A classifier over a dataset, once: its logits for each row in a store, whole shards at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from llmkd.errors import DataError, NonFiniteError, RecipeError, TeacherError
from llmkd.labels.dense import Dense, DenseDtype, Per
from llmkd.labels.digests import row_digest
from llmkd.labels.manifest import StorePlan
from llmkd.labels.writer import StoreWriter

Row: TypeAlias = dict[str, Any]
Answer: TypeAlias = Callable[[list[Row]], Tensor]


def class_plan(
    *,
    label_names: Sequence[str],
    teacher: Mapping[str, Any],
    tokenizer_digest: str,
    rows_fingerprint: str,
    max_length: int,
    total_rows: int,
    rows: Sequence[int] | np.ndarray | None = None,
    rows_per_shard: int = 512,
    dtype: DenseDtype = "float32",
    per: Per = "row",
) -> StorePlan:
    """The plan of a store of class logits, C = len(`label_names`), in that order.

    `teacher` is a flat dict as in `StorePlan` (id, revision, fingerprint, dtype, ...); the names
    are put into it. `rows` are the numbers to label (None: all of `total_rows`). `per` is `row` for
    sequence classification, `token` for token classification. RecipeError for no names, one
    given twice or more than 4,096; DataError for no rows.
    """
    names = [str(name) for name in label_names]
    if not names or len(set(names)) != len(names):
        raise RecipeError.of(
            "label_names", names, "one name a class, no two alike", "id2label of the teacher"
        )
    return StorePlan(
        encoding=Dense(len(names), dtype, per),
        teacher={**teacher, "label_names": names},
        tokenizer=tokenizer_digest,
        data=rows_fingerprint,
        packing=None,
        max_length=max_length,
        vocab=len(names),
        rows=np.arange(total_rows) if rows is None else np.asarray(rows, dtype=np.int64),
        total_rows=total_rows,
        rows_per_shard=rows_per_shard,
    )


def write_class_store(
    folder: str | Path,
    *,
    rows: Dataset,
    answer: Answer,
    plan: StorePlan,
    batch_size: int,
    main: bool,
    overwrite: bool = False,
    quiet: bool = False,
    in_step: bool = False,
) -> int:
    """Ask about every row that is not stored yet; returns how many this rank asked about.

    Row number n of the plan is `rows[n]`, with its `input_ids`. `answer` takes up to `batch_size`
    rows of like length and gives their logits on any device: [B, C], or [B, T, C] padded on the
    right where the plan has labels `per` token. Every rank calls this, exactly one with `main`;
    ranks take shards in turn. A run that was killed goes on after its whole shards: a shard's bytes
    depend on its rows, `answer` and `batch_size` alone. `in_step`: all ranks call `answer` equally
    often, which a teacher needs whose weights are spread over them.

    Raises what entering a `StoreWriter` raises (before anybody is asked), TeacherError for answers
    of another shape, NonFiniteError for a row without a distribution: its shard is then absent.
    """
    if not isinstance(plan.encoding, Dense) or len(rows) != plan.total_rows or batch_size < 1:
        raise ValueError(f"{plan.encoding.name}, {len(rows)} of {plan.total_rows}, {batch_size}")
    state = PartialState()
    with ExitStack() as stack, torch.no_grad():
        with state.main_process_first():
            writer = stack.enter_context(StoreWriter(folder, plan, main=main, overwrite=overwrite))
        missing = writer.missing_shards()
        state.wait_for_everyone()  # all have looked before anybody writes, so all share one list
        mine = missing[state.process_index :: state.num_processes]
        total = sum(len(plan.shard_rows(number)) for number in mine)
        bar = stack.enter_context(_bar(total, quiet or not main))
        for number in mine:
            writer.write_shard(number, _shard(rows, number, answer, plan, batch_size, bar))
        if in_step:
            _keep_step(rows, answer, plan, missing, batch_size)
        state.wait_for_everyone()
        if main and (missing or not writer.done):
            writer.finish()
        state.wait_for_everyone()
    return total


def _bar(total: int, hidden: bool) -> tqdm:
    # only a bar that is hidden says so: `disable=False` would overrule TQDM_DISABLE
    name = "labelling rows"
    return tqdm(total=total, desc=name, disable=True) if hidden else tqdm(total=total, desc=name)


def _shard(
    rows: Dataset, number: int, answer: Answer, plan: StorePlan, batch_size: int, bar: tqdm
) -> list[Row]:
    """The rows of one shard as the store keeps them."""
    stored: dict[int, Row] = {}
    for numbers, batch in batches_of(rows, plan, number, batch_size):
        for row in labelled(numbers, batch, answer(batch), cast(Dense, plan.encoding)):
            stored[row["row"]] = row
        bar.update(len(batch))
    return [stored[wanted] for wanted in plan.shard_rows(number).tolist()]


def batches_of(
    rows: Dataset, plan: StorePlan, number: int, batch_size: int
) -> Iterator[tuple[list[int], list[Row]]]:
    """Row numbers and rows of each batch that `write_class_store` asks about for shard `number`.

    Longest first: rows of like length need little padding, and what does not fit into memory is
    seen at once.
    """
    numbers = plan.shard_rows(number)
    wanted = _read(rows, numbers)
    order = sorted(range(len(wanted)), key=lambda place: -len(wanted[place]["input_ids"]))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        yield numbers[places].tolist(), [wanted[place] for place in places]


def _read(rows: Dataset, numbers: np.ndarray) -> list[Row]:
    """Rows by number. DataError where their column `row`, if they have one, says otherwise."""
    columns = cast(dict[str, Any], rows[numbers.tolist()])
    found = [{name: values[i] for name, values in columns.items()} for i in range(len(numbers))]
    for number, row in zip(numbers.tolist(), found, strict=True):
        if int(row.get("row", number)) != number:
            raise DataError.of(
                "rows",
                f"row {number}",
                f"its column `row` says {int(row['row'])}: a part of the rows, or another order",
                "give all rows, in their order, and the numbers of those to label in the plan",
            )
    return found


def labelled(
    numbers: Sequence[int], batch: Sequence[Row], logits: Tensor, encoding: Dense
) -> list[Row]:
    """One batch's rows of the store, from what `answer` gave; waits for the device.

    TeacherError for an answer of another shape, NonFiniteError for one that is no distribution.
    """
    per_row, sizes = encoding.per == "row", [len(row["input_ids"]) for row in batch]
    _check_shape(logits, sizes, encoding)
    counts = [1] * len(batch) if per_row else sizes
    flat_SC = logits if per_row else torch.cat([logits[b, :n] for b, n in enumerate(sizes)])
    reduced = {name: value.cpu() for name, value in encoding.reduce(flat_SC).items()}
    stored, first = [], 0
    for number, row, count in zip(numbers, batch, counts, strict=True):
        pieces = {name: value[first : first + count] for name, value in reduced.items()}
        first += count
        if not pieces["finite"].all():
            raise NonFiniteError.of(
                "teacher",
                "NaN or infinity",
                f"its answer to row {number} is no distribution; the shard was not written",
                "run the teacher in a wider dtype (float32)",
                "check its weights: a single NaN there reaches every answer",
            )
        label = {"row": number, "tokens": row_digest(row["input_ids"]), "length": count}
        stored.append({**label, **encoding.pack(pieces)})
    return stored


def _check_shape(logits: Tensor, sizes: Sequence[int], encoding: Dense) -> None:
    batch, classes = len(sizes), encoding.shared
    if encoding.per == "row":
        wanted, right = f"[{batch}, {classes}]", logits.shape == (batch, classes)
    else:
        wanted = f"[{batch}, {max(sizes)} or more, {classes}]"
        right = logits.dim() == 3 and logits.shape[::2] == (batch, classes)
        right = right and logits.shape[1] >= max(sizes)
    if not right:
        raise TeacherError.of(
            "teacher",
            list(logits.shape),
            f"answers in this shape; {wanted} is wanted for {batch} rows and {classes} classes",
            "take the label names from the teacher's config (id2label)",
        )


def _keep_step(
    rows: Dataset, answer: Answer, plan: StorePlan, missing: Sequence[int], batch_size: int
) -> None:
    """Ranks with less to do ask again about the first row, until all have asked equally often."""
    state = PartialState()

    def asks(rank: int) -> int:
        own = missing[rank :: state.num_processes]
        return sum(-(-len(plan.shard_rows(number)) // batch_size) for number in own)

    most = max(asks(rank) for rank in range(state.num_processes))
    for _ in range(most - asks(state.process_index)):
        answer(_read(rows, plan.rows[:1]))
