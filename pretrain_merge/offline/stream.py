"""One file of a merge: pieces read from every source, summed, written; all three at the same time.

This module knows threads and memory. A batch of pieces is read and summed by one thread, while its bytes are in the
cache; several are on their way, and this thread writes them in their order. So memory is that of a few batches,
whatever the size of the model.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from pretrain_merge.kernels.spread import Spread
from pretrain_merge.offline.agreement import Output
from pretrain_merge.offline.files import Files, is_remote
from pretrain_merge.offline.pieces import Buffer, Part, Piece, Reader, batches
from pretrain_merge.offline.shards import Shard, ShardWriter, Written, written
from pretrain_merge.offline.sums import Row, sum_rows
from pretrain_merge.offline.tensors import Source

BUFFERS = 2**26  # bytes of all buffers together
# bytes of a batch of one source: with more, the sum finds the first sources no longer in the cache
_LARGEST_BATCH = 2**21
_SMALLEST_BATCH = 2**15
# a disk is fast with few requests at a time, and a network is not
_MOST_THREADS, _REMOTE_THREADS = 4, 8
_WRITTEN = 1  # batch, beside those that threads work at


def batch_size(num_sources: int, num_lanes: int) -> int:
    """Bytes of a batch of one source, so that the buffers keep to their budget for any number of sources.

    >>> batch_size(8, num_lanes=3), batch_size(32, num_lanes=3)
    (2097152, 677867)
    """
    fitting = BUFFERS // (num_lanes * (num_sources + 1))
    return max(_SMALLEST_BATCH, min(_LARGEST_BATCH, fitting))


def num_threads(sources: Sequence[Source]) -> int:
    """That read and sum at the same time."""
    is_far = any(is_remote(file) for source in sources for file in source.files)
    return _REMOTE_THREADS if is_far else min(_MOST_THREADS, max(2, os.cpu_count() or 2))


def memory(sources: Sequence[Source]) -> int:
    """Bytes that all buffers take at most."""
    num_lanes = num_threads(sources) + _WRITTEN
    return num_lanes * (len(sources) + 1) * batch_size(len(sources), num_lanes)


class Streamer:
    """Merges tensors file by file; use as a context manager.

    Args:
        sources: Oldest first; with the base, where there is one, behind them.
        coefficients: Of the sources that are merged.
        device: Where sums are made.
        progress: Told how many bytes were read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        coefficients: Sequence[float],
        *,
        device: str,
        progress: Callable[[int], object],
    ) -> None:
        self._sources, self._coefficients = sources, coefficients
        self._device, self._progress = device, progress
        self._num_threads = num_threads(sources)
        self._lanes = [_Lane(len(sources), device) for _ in range(self._num_threads + _WRITTEN)]
        self._stack = ExitStack()
        self._readers: list[Reader] = []

    def __enter__(self) -> "Streamer":
        files = self._stack.enter_context(Files())
        self._readers = [Reader(source, files) for source in self._sources]
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._num_threads))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, folder: Path, shard: Shard, outputs: Mapping[str, Output], *, is_kept: bool = True) -> Written:
        """Make one file.

        Args:
            folder: Where.
            shard: Its tensors.
            outputs: Where these come from.
            is_kept: Whether it must survive a crash, and be what was meant.

        Raises:
            CheckpointError: A source cannot be read, or the file cannot be written.
            MergeInputError: A tensor is not finite.
        """
        with written(folder, shard, is_kept=is_kept) as writer:
            free, running = list(self._lanes), deque[tuple[_Lane, Future[_Summed]]]()
            try:
                size = batch_size(len(self._sources), len(self._lanes))
                for batch in batches(shard.kinds, self._widths(shard, outputs), size):
                    if not free:
                        free.append(self._finish(*running.popleft(), writer))
                    lane = free.pop()
                    running.append((lane, self._pool.submit(self._sum, batch, outputs, lane)))
                while running:
                    self._finish(*running.popleft(), writer)
            finally:
                _wait([future for _, future in running])
        return writer.result()

    def _finish(self, lane: "_Lane", future: "Future[_Summed]", writer: ShardWriter) -> "_Lane":
        """Write a batch, after which its memory is free; in order, as the checksum of a file needs it."""
        done = future.result()
        self._progress(done.num_read)
        writer.write(done.data)
        writer.spread = writer.spread + done.spread
        return lane

    def _sum(self, batch: Sequence[Piece], outputs: Mapping[str, Output], lane: "_Lane") -> "_Summed":
        found, num_read = self._read(batch, outputs, lane)
        dtypes = [outputs[piece.name].kind.dtype for piece in batch]
        targets = lane.output.parts(batch, dtypes, is_packed=True)
        rows = []
        for piece, target in zip(batch, targets, strict=True):
            origin = outputs[piece.name].origin
            if origin is not None:
                target.bits[...] = found[origin][piece].bits
            else:
                rows.append(Row(piece.name, target, [of_source[piece] for of_source in found[: self._num_merged]]))
        spread = sum_rows(rows, self._sources[: self._num_merged], self._coefficients, device=self._device)
        return _Summed(num_read, spread, lane.output.packed(sum(target.bits.nbytes for target in targets)))

    def _read(
        self, batch: Sequence[Piece], outputs: Mapping[str, Output], lane: "_Lane"
    ) -> tuple[list[dict[Piece, Part]], int]:
        """The pieces that each source has to give, and their bytes."""
        found: list[dict[Piece, Part]] = []
        for index, (reader, buffer) in enumerate(zip(self._readers, lane.inputs, strict=True)):
            wanted = [piece for piece in batch if self._is_read(outputs[piece.name], index)]
            dtypes = [self._sources[index].kind(piece.name).dtype for piece in wanted]
            targets = buffer.parts(wanted, dtypes)
            reader.read_into(wanted, targets)
            found.append(dict(zip(wanted, targets, strict=True)))
        return found, sum(target.bits.nbytes for of_source in found for target in of_source.values())

    def _widths(self, shard: Shard, outputs: Mapping[str, Output]) -> dict[str, int]:
        """Bytes of an element of each tensor, in whichever source or in the output it takes most."""
        return {
            name: max(
                output.kind.dtype.itemsize,
                *(
                    source.kind(name).dtype.itemsize
                    for index, source in enumerate(self._sources)
                    if self._is_read(output, index)
                ),
            )
            for name, output in outputs.items()
            if name in shard.kinds
        }

    def _is_read(self, output: Output, index: int) -> bool:
        return index == output.origin or (output.origin is None and index < self._num_merged)

    @property
    def _num_merged(self) -> int:
        return len(self._coefficients)  # the base, behind these, is copied from


class _Summed(NamedTuple):
    """A batch that is ready: bytes read for it, the spread of its tensors, its bytes in the order of the file."""

    num_read: int
    spread: Spread
    data: memoryview


class _Lane:
    """Memory for one batch of all sources and of the output."""

    def __init__(self, num_sources: int, device: str) -> None:
        self.inputs = [Buffer(device) for _ in range(num_sources)]
        self.output = Buffer(device)


def _wait(futures: Sequence["Future[_Summed]"]) -> None:
    """Until nobody uses the buffers; an error of theirs comes after the one that is on its way."""
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            future.exception()
