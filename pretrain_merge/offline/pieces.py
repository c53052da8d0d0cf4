"""Tensors cut into pieces, pieces packed into batches, and batches read from a source.

A piece is a run of elements of a tensor in row-major order that is also a box, so that what one block of a file holds
of it is one run of bytes, whatever the sharding. This module knows shapes and blocks. It does no arithmetic.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain_merge.offline.files import Files
from pretrain_merge.offline.tensors import Block, Dtype, Kind, Source

_ALIGNMENT = 64  # bytes, so that vector loads cross no cache line
_MOST_LOCATED = 16  # tensors: more than threads are at work on


@dataclass(frozen=True)
class Piece:
    """Part of a tensor: fixed indices of the first dimensions, a range of the next, everything of the rest.

    Attributes:
        name: Of the tensor.
        lead: The fixed indices.
        rows: The range.
        shape: Its own: the rows, then the rest.
    """

    name: str
    lead: tuple[int, ...]
    rows: tuple[int, int]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """At least 0."""
        return math.prod(self.shape)


def cut(name: str, shape: Sequence[int], longest: int) -> Iterator[Piece]:
    """The pieces of a tensor in row-major order, each of at most `longest` elements."""
    shape = tuple(shape) or (1,)
    if 0 in shape:
        return
    yield from _cut(name, (), shape, longest)


def _cut(name: str, lead: tuple[int, ...], shape: tuple[int, ...], longest: int) -> Iterator[Piece]:
    row = math.prod(shape[1:])
    if row > longest:
        for index in range(shape[0]):
            yield from _cut(name, (*lead, index), shape[1:], longest)
        return
    # whole rows: in a sharded file they lie behind one another
    step = longest // row
    for first in range(0, shape[0], step):
        last = min(shape[0], first + step)
        yield Piece(name, lead, (first, last), (last - first, *shape[1:]))


def batches(kinds: Mapping[str, Kind], widths: Mapping[str, int], num_bytes: int) -> Iterator[list[Piece]]:
    """Pieces of tensors in their order, as many at a time as a buffer holds.

    Args:
        kinds: The tensors.
        widths: Bytes of an element of each, at most.
        num_bytes: Of the buffer.
    """
    batch: list[Piece] = []
    room = num_bytes
    for name, kind in kinds.items():
        for piece in cut(name, kind.shape, max(1, num_bytes // widths[name])):
            needed = piece.num_elements * widths[name]
            if needed > room:
                yield batch
                batch, room = [], num_bytes
            batch.append(piece)
            room -= needed
    if batch:
        yield batch


class Part(NamedTuple):
    """A piece in memory.

    Attributes:
        bits: Of its elements, in its shape: as integers of their size, since NumPy does not know every dtype.
        dtype: What they mean.
    """

    bits: npt.NDArray[Any]
    dtype: Dtype


class Buffer:
    """Memory for one batch of one source, used again for the next."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._memory = np.empty(0, np.uint8)

    def parts(self, pieces: Sequence[Piece], dtypes: Sequence[Dtype], *, is_packed: bool = False) -> list[Part]:
        """A part per piece in this memory; packed: one behind the other without a gap."""
        starts, end = [], 0
        for piece, dtype in zip(pieces, dtypes, strict=True):
            starts.append(end)
            end += piece.num_elements * dtype.itemsize
            end = end if is_packed else -(-end // _ALIGNMENT) * _ALIGNMENT
        # grown at need: the first batches of a small model take little
        if end > len(self._memory):
            self._memory = _memory(end, self._device)
        return [
            Part(np.ndarray(piece.shape, bits_of(dtype), self._memory, start), dtype)
            for piece, dtype, start in zip(pieces, dtypes, starts, strict=True)
        ]

    def packed(self, num_bytes: int) -> memoryview:
        """The first bytes as memory to be written to a file."""
        return self._memory[:num_bytes].data


class Reader:
    """Reads pieces of one source, for several threads at a time.

    Args:
        source: The checkpoint.
        files: Open ones.
    """

    def __init__(self, source: Source, files: Files) -> None:
        self._source, self._files = source, files
        # some formats look into a file for it, and a large tensor has many pieces
        self._locate = lru_cache(_MOST_LOCATED)(source.locate)

    def read_into(self, pieces: Sequence[Piece], targets: Sequence[Part]) -> None:
        """Fill a part per piece.

        Raises:
            CheckpointError: A file cannot be read.
        """
        for piece, target in zip(pieces, targets, strict=True):
            for block in self._locate(self._source.ties.get(piece.name, piece.name)):
                _read_common(self._files, block, piece, target.bits)


def bits_of(dtype: Dtype) -> npt.DTypeLike:
    """NumPy's integers of an element's size; of sizes that it has none of, so many bytes."""
    return f"{'u' if dtype.itemsize in (1, 2, 4, 8) else 'V'}{dtype.itemsize}"


def bytes_of(bits: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The same memory of a contiguous array, byte by byte."""
    return bits.reshape(-1).view(np.uint8)


def _memory(num_bytes: int, device: str) -> npt.NDArray[np.uint8]:
    if device != "cpu":
        import torch

        # copies to a device run beside it from pinned memory only
        pinned: npt.NDArray[np.uint8] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned
    whole = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    first = -whole.ctypes.data % _ALIGNMENT  # NumPy promises 16 bytes
    return whole[first : first + num_bytes]


def _read_common(files: Files, block: Block, piece: Piece, target: npt.NDArray[Any]) -> None:
    """Read what a block and a piece have in common into the piece's memory."""
    offsets, shape = block.offsets or (0,), block.shape or (1,)
    depth = len(piece.lead)
    if any(not o <= index < o + size for index, o, size in zip(piece.lead, offsets, shape, strict=False)):
        return
    first = max(piece.rows[0], offsets[depth])
    last = min(piece.rows[1], offsets[depth] + shape[depth])
    rest, rest_offsets = shape[depth + 1 :], offsets[depth + 1 :]
    if first >= last or 0 in rest:
        return
    columns = [slice(offset, offset + size) for offset, size in zip(rest_offsets, rest, strict=True)]
    box = (slice(first - piece.rows[0], last - piece.rows[0]), *columns)
    part = target[box]
    # indices within the block
    own = tuple(index - o for index, o in zip((*piece.lead, first), offsets, strict=False))
    if block.strides is not None:
        part[...] = _strided(files, block, own, last - first, target.dtype)
        return
    row = math.prod(rest)
    skipped = sum(index * math.prod(shape[dim + 1 :]) for dim, index in enumerate(own))
    # a box that was split along a later dimension has gaps in the piece, and none in its file
    whole = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
    files.read_into(
        block.file,
        block.start + skipped * target.dtype.itemsize,
        bytes_of(whole)[: (last - first) * row * target.dtype.itemsize].data,
    )
    if whole is not part:
        part[...] = whole


def _strided(files: Files, block: Block, own: tuple[int, ...], num_rows: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Part of a tensor that lies in another order (channels last, transposed): all its bytes are read for it."""
    strides = block.strides or ()
    reach = 1 + sum((size - 1) * stride for size, stride in zip(block.shape, strides, strict=True))
    storage = np.empty(reach, dtype)
    files.read_into(block.file, block.start, bytes_of(storage).data)
    whole = np.ndarray(block.shape, dtype, storage, strides=[stride * dtype.itemsize for stride in strides])
    box = (*own[:-1], slice(own[-1], own[-1] + num_rows))
    part: npt.NDArray[Any] = whole[box]
    return part
