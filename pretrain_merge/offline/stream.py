"""One file of a merge: pieces read from every source, summed, written; all three at the same time.

This module knows threads and memory. While a batch of pieces is merged, the next one is read and the one before is
written, so there are two buffers for each source and two for the output, whatever the size of the model.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from pretrain_merge.kernels.spread import Spread
from pretrain_merge.offline.agreement import Output
from pretrain_merge.offline.files import Files
from pretrain_merge.offline.pieces import Buffer, Piece, Reader, batches
from pretrain_merge.offline.shards import Shard, Written, written
from pretrain_merge.offline.sums import Row, sum_rows
from pretrain_merge.offline.tensors import Source

BUFFERS = 96 * 2**20  # bytes of all buffers together
_LARGEST_PIECE = 2**20  # elements of a batch: more are not faster, and fall out of the cache between read and sum
_SMALLEST_PIECE = 2**12


def batch_length(num_sources: int) -> int:
    """Elements of a batch, so that the buffers keep to their budget for any number of sources, at 8 bytes each."""
    return max(_SMALLEST_PIECE, min(_LARGEST_PIECE, BUFFERS // (2 * 8 * (num_sources + 1))))


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
        device: torch.device,
        progress: Callable[[int], object],
    ) -> None:
        self._sources, self._coefficients = sources, coefficients
        self._device, self._progress = device, progress
        self._sets = [_Buffers(len(sources), device) for _ in range(2)]
        self._stack = ExitStack()
        self._readers: list[Reader] = []

    def __enter__(self) -> "Streamer":
        files = self._stack.enter_context(Files())
        self._readers = [Reader(source, files) for source in self._sources]
        # several reads at a time, as disks and networks want them
        self._pool = self._stack.enter_context(ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2))))
        self._output = self._stack.enter_context(ThreadPoolExecutor(1))
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
        total = Spread(0.0, 0.0)
        with written(folder, shard, is_kept=is_kept) as writer:
            planned = list(batches(shard.kinds, batch_length(len(self._coefficients))))
            reading = self._start_reading(planned[0], outputs, 0) if planned else []
            writing: Future[None] | None = None
            try:
                for number, batch in enumerate(planned):
                    for future in reading:
                        self._progress(future.result())
                    reading = (
                        self._start_reading(planned[number + 1], outputs, number + 1)
                        if number + 1 < len(planned)
                        else []
                    )
                    part, data = self._merge(batch, outputs, number)
                    total = total + part
                    if writing is not None:
                        writing.result()
                    writing = self._output.submit(writer.write, data)
                if writing is not None:
                    writing.result()
            finally:
                _wait([*reading, *([writing] if writing is not None else [])])
            writer.spread = total
        return writer.result()

    def _start_reading(self, batch: Sequence[Piece], outputs: Mapping[str, Output], number: int) -> list[Future[int]]:
        buffers = self._sets[number % 2]
        started = []
        for index, reader in enumerate(self._readers):
            wanted = [piece for piece in batch if self._is_read(outputs[piece.name], index)]
            if wanted:
                dtypes = [self._sources[index].kind(piece.name).dtype for piece in wanted]
                targets = buffers.inputs[index].tensors(wanted, dtypes)
                buffers.read[index] = dict(zip(wanted, targets, strict=True))
                started.append(self._pool.submit(_read, reader, wanted, targets))
        return started

    def _is_read(self, output: Output, index: int) -> bool:
        return index == output.origin or (output.origin is None and index < len(self._coefficients))

    def _merge(self, batch: Sequence[Piece], outputs: Mapping[str, Output], number: int) -> tuple[Spread, memoryview]:
        buffers = self._sets[number % 2]
        dtypes = [outputs[piece.name].kind.dtype for piece in batch]
        targets = buffers.output.tensors(batch, dtypes, is_packed=True)
        rows = []
        for piece, target in zip(batch, targets, strict=True):
            origin = outputs[piece.name].origin
            if origin is not None:
                target.copy_(buffers.read[origin][piece])
            else:
                parts = [buffers.read[index][piece] for index in range(len(self._coefficients))]
                rows.append(Row(piece.name, target, parts))
        part = sum_rows(rows, self._sources[: len(self._coefficients)], self._coefficients, self._device)
        num_bytes = sum(target.nbytes for target in targets)
        return part, buffers.output.packed(num_bytes)


class _Buffers:
    """Memory for one batch of all sources and of the output."""

    def __init__(self, num_sources: int, device: torch.device) -> None:
        self.inputs = [Buffer(device) for _ in range(num_sources)]
        self.output = Buffer(device)
        self.read: list[dict[Piece, Tensor]] = [{} for _ in range(num_sources)]


def _read(reader: Reader, pieces: Sequence[Piece], targets: Sequence[Tensor]) -> int:
    reader.read_into(pieces, targets)
    return sum(target.nbytes for target in targets)


def _wait(futures: Sequence["Future[int] | Future[None]"]) -> None:
    """Until nobody uses the buffers; an error of theirs comes after the one that is on its way."""
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            future.exception()
