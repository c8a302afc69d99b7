"""What every encoding of soft labels has in common.

An encoding turns one packed row of T tokens into a few flat numpy columns, in two steps, so that
a teacher's thread can do the first and a writer's thread the second, and so that the caller may
feed a row in pieces: `reduce` (on the logits' device, no waiting for it) and `pack` (on the host).

Letters: T tokens of a row, S tokens of all rows of a batch, V shared vocabulary, H hidden size,
K entries of a sparse label, N draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import NonFiniteError

Columns = Mapping[str, np.ndarray]  # one row's columns, flat
Reduced = Mapping[str, Tensor]  # per-token tensors, [T, ...]
BLOCK = 64  # vocabulary entries in one block of the two-level searches
CPU_CHUNK = 1 << 19  # float32 entries worked on at once: 2 MB, so that later passes hit the cache
GPU_CHUNK = 1 << 26  # 256 MB


class Encoding(Protocol):
    """One way to write down a teacher's answer; `topk`, `sampled`, `hidden`,
    `lowrank`, `dense`.

    `needs` says what `reduce` eats: `logits` [T, >= shared] or `hidden` [T, H]. `temperature` is
    None where the label serves every temperature. `columns` maps each column to its numpy dtype.
    """

    name: ClassVar[str]
    needs: ClassVar[Literal["logits", "hidden"]]

    @property
    def shared(self) -> int:
        """Leading vocabulary entries that carry probability."""
        ...

    @property
    def temperature(self) -> float | None:
        """The teacher's temperature, fixed in the label; None where it is not."""
        ...

    @property
    def columns(self) -> dict[str, type[np.generic]]:
        """Column names and numpy types, in the order they are stored."""
        ...

    def settings(self) -> dict[str, Any]:
        """What `encoding_from` needs to make this encoding again (JSON)."""
        ...

    def reduce(self, values: Tensor, *, row: int = 0, start: int = 0) -> Reduced:
        """Tokens `start`, `start + 1`, ... of row number `row`: small per-token tensors."""
        ...

    def pack(self, *pieces: Reduced) -> dict[str, np.ndarray]:
        """The row's columns, from its pieces in order."""
        ...


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each row lie in a padded batch [B, width]."""

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    width: int

    @property
    def batch(self) -> int:
        """Rows, B."""
        return len(self.lengths)

    def places(self) -> np.ndarray:
        """Flat places b * width + t of all real tokens, int64 [S], rows one after another."""
        return np.concatenate(
            [np.arange(at.start, at.stop) for at in self.slices()] or [np.zeros(0, np.int64)]
        )

    def slices(self) -> Iterator[slice]:
        """The same, a slice a row."""
        for row, (length, start) in enumerate(zip(self.lengths, self.starts, strict=True)):
            yield slice(row * self.width + start, row * self.width + start + length)


def gather_pieces(pieces: Sequence[Reduced]) -> dict[str, np.ndarray]:
    """Pieces of a row joined and on the host. The only place that waits for the device.

    Raises NonFiniteError naming the first token whose `finite` is False.
    """
    names = pieces[0].keys()
    whole = {
        name: np.concatenate([piece[name].cpu().numpy() for piece in pieces])
        if len(pieces) > 1
        else pieces[0][name].cpu().numpy()
        for name in names
    }
    finite = whole.pop("finite")
    if not finite.all():
        raise NonFiniteError.of(
            "teacher",
            "NaN or infinity",
            f"{int((~finite).sum())} of {len(finite)} tokens of the row have no distribution, the "
            f"first is token {int(np.argmin(finite))}; nothing of this row was stored",
            "run the teacher in a wider dtype (--teacher_dtype float32)",
            "check its weights: a single NaN there reaches every token",
        )
    return whole


def token_chunks(logits_TV: Tensor) -> Iterator[slice]:
    """Slices of tokens whose float32 copies fit the cache (CPU) or a modest buffer (GPU)."""
    entries = CPU_CHUNK if logits_TV.device.type == "cpu" else GPU_CHUNK
    step = max(1, entries // max(logits_TV.shape[-1], 1))
    for first in range(0, len(logits_TV), step):
        yield slice(first, min(first + step, len(logits_TV)))


def blocked(logits_TV: Tensor, shared: int, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """float32 logits / temperature in chunks, cut to `shared` and padded with -inf to whole
    blocks: `(tokens, [t, blocks, BLOCK])`. Read only: a chunk may be the caller's memory, or a
    buffer that the next one takes over.
    """
    blocks = -(-shared // BLOCK)
    logits_TV = logits_TV[:, :shared]
    as_is = shared == blocks * BLOCK and logits_TV.dtype == torch.float32 and temperature == 1.0
    buffer: Tensor | None = None
    for at in token_chunks(logits_TV):
        chunk = logits_TV[at]
        if not (as_is and chunk.is_contiguous()):
            if buffer is None:
                shape = (at.stop - at.start, blocks * BLOCK)
                buffer = logits_TV.new_full(shape, float("-inf"), dtype=torch.float32)
            padded = buffer[: len(chunk)]
            padded[:, :shared].copy_(chunk)
            if temperature != 1.0:
                padded[:, :shared].mul_(1.0 / temperature)
            chunk = padded
        yield at, chunk.view(len(chunk), blocks, BLOCK)


def high_bits(shared: int) -> int:
    """Bits of a token id beyond the low 16 that are stored as they are; 0 up to 65,536 entries."""
    return max(0, (shared - 1).bit_length() - 16)


def split_ids(ids: np.ndarray, shared: int) -> dict[str, np.ndarray]:
    """Ids [D] as `ids` uint16 and, where needed, `ids_high`: the other bits, packed tightly."""
    low = (ids & 0xFFFF).astype(np.uint16)
    bits = high_bits(shared)
    if bits:
        flags = ids[:, None] >> np.arange(16, 16 + bits, dtype=ids.dtype) & 1
        return {"ids": low, "ids_high": np.packbits(flags.astype(np.uint8))}
    return {"ids": low}


def join_ids(rows: Sequence[Columns], shared: int) -> np.ndarray:
    """Ids int64 [D] of several rows from `ids` and `ids_high`. ValueError for one >= `shared`."""
    ids = np.concatenate([row["ids"] for row in rows]).astype(np.int64)
    bits = high_bits(shared)
    if bits:
        high = np.concatenate(
            [np.unpackbits(row["ids_high"], count=bits * len(row["ids"])) for row in rows]
        ).reshape(-1, bits)
        for bit in range(bits):
            ids += high[:, bit].astype(np.int64) << (16 + bit)
    if len(ids) and ids.max() >= shared:
        raise ValueError(f"token id {ids.max()} lies outside the {shared} shared entries")
    return ids


def id_columns(shared: int) -> dict[str, type[np.generic]]:
    """The columns `split_ids` makes."""
    columns: dict[str, type[np.generic]] = {"ids": np.uint16}
    return {**columns, "ids_high": np.uint8} if high_bits(shared) else columns
