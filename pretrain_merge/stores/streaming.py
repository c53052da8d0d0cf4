"""Merging snapshots that lie in host memory into live parameters, wherever these are.

This module knows tensors and buffers. What is in host memory itself is merged in place; what is on a device is merged
there, in bounded pieces that pass through two staging buffers: while one is merged, the other is filled.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain_merge.errors import MergeInputError
from pretrain_merge.kernels.weighted_sum import Spread, weighted_sum_
from pretrain_merge.stores.budget import DEVICE_STAGING

_ALIGNMENT = 16  # bytes; the widest vector load of the kernels
_NO_SPREAD = Spread(0.0, 0.0)


def merge_from_host_(
    out: Sequence[Tensor],
    snapshots: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float],
    *,
    spread: bool | Sequence[float] = False,
) -> Spread | None:
    """`weighted_sum_` of snapshots in host memory.

    Args:
        out: Live tensors, contiguous, on any devices.
        snapshots: N sequences, oldest first, of contiguous tensors in host memory, pinned where copies shall overlap.
        coefficients: N numbers, oldest first.
        spread: Also measure the spread; numbers say how much each row counts.

    Returns:
        The spread if it was asked for.
    """
    total = _NO_SPREAD
    # one call per device: a kernel sees only what its own device can address
    for device in dict.fromkeys(tensor.device for tensor in out):
        rows = [row for row, tensor in enumerate(out) if tensor.device == device]
        merge = weighted_sum_ if device.type == "cpu" else merge_streamed_
        sources = [[snapshot[row] for row in rows] for snapshot in snapshots]
        counted = spread if isinstance(spread, bool) else [spread[row] for row in rows]
        total += merge([out[row] for row in rows], sources, coefficients, spread=counted) or _NO_SPREAD
    return total if spread is not False else None


@torch.no_grad()
def merge_streamed_(
    out: Sequence[Tensor],
    snapshots: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float],
    *,
    spread: bool | Sequence[float] = False,
    staging_bytes: int = DEVICE_STAGING,
) -> Spread | None:
    """`weighted_sum_` of snapshots that lie elsewhere, with at most `staging_bytes` on the device.

    Args:
        out: Live tensors on one device, contiguous.
        snapshots: N sequences, oldest first, of contiguous tensors in host memory, pinned where copies shall overlap.
        coefficients: N numbers, oldest first.
        spread: Also measure the spread; numbers say how much each row counts.
        staging_bytes: Size of both staging buffers together, at least 32 bytes per snapshot.

    Returns:
        The spread if it was asked for.

    Raises:
        MergeInputError: The staging buffers cannot hold one vector of every snapshot; nothing was written.
    """
    if staging_bytes < 2 * _ALIGNMENT * len(snapshots):
        raise MergeInputError(
            f"{staging_bytes} bytes of staging cannot hold a piece of each of {len(snapshots)} snapshots. Allowed: at "
            f"least {2 * _ALIGNMENT} bytes per snapshot. Raise staging_bytes."
        )
    total = _NO_SPREAD
    if out:
        buffers = [_Staging(staging_bytes // 2, out[0].device) for _ in range(2)]
        for number, piece in enumerate(_pieces(out, snapshots, staging_bytes // 2)):
            # turn by turn, so that copies into one run beside the merge out of the other
            buffer = buffers[number % 2]
            staged = buffer.fill([part.sources for part in piece], len(snapshots))
            counted = spread if isinstance(spread, bool) else [spread[part.row] for part in piece]
            targets = [part.target for part in piece]
            total += weighted_sum_(targets, staged, coefficients, spread=counted) or _NO_SPREAD
            buffer.merged()
    return total if spread is not False else None


class _Chunk(NamedTuple):
    """Part of an output, and the same part of every snapshot."""

    row: int
    target: Tensor
    sources: list[Tensor]


class _Staging:
    """One buffer on the device, filled on a stream of its own."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._free = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]
        self.merged()  # work issued before may still use the memory that the allocator gave out just now

    def fill(self, pieces: Sequence[Sequence[Tensor]], num_snapshots: int) -> list[list[Tensor]]:
        """Copy pieces in; returns them by snapshot. The merge that follows waits for the copies."""
        if self._free is not None and self._stream is not None:
            self._stream.wait_event(self._free)
        staged: list[list[Tensor]] = [[] for _ in range(num_snapshots)]
        offset = 0
        with self._copying():
            for sources in pieces:
                for own, source in zip(staged, sources, strict=True):
                    num_bytes = source.numel() * source.element_size()
                    target = self._bytes[offset : offset + num_bytes].view(source.dtype)
                    target.copy_(source, non_blocking=True)
                    own.append(target)
                    offset += _aligned(num_bytes)
        if self._stream is not None:
            torch.cuda.current_stream(self._bytes.device).wait_stream(self._stream)
        return staged

    def merged(self) -> None:
        """What reads this buffer has been issued; the next copies into it wait for that."""
        if self._free is not None:
            self._free.record(torch.cuda.current_stream(self._bytes.device))

    def _copying(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


def _pieces(out: Sequence[Tensor], snapshots: Sequence[Sequence[Tensor]], num_bytes: int) -> Iterator[list[_Chunk]]:
    """Lists of chunks whose snapshots fit into `num_bytes`."""
    piece: list[_Chunk] = []
    room = num_bytes
    for index, target in enumerate(out):
        flat, sources = target.view(-1), [snapshot[index].view(-1) for snapshot in snapshots]
        # snapshots may differ in dtype; the widest decides how many elements fit
        widest = max(source.element_size() for source in sources)
        start = 0
        while start < flat.numel():
            # whole vectors of every snapshot, so that each staged piece starts aligned
            fitting = (room // len(sources) // _ALIGNMENT * _ALIGNMENT) // widest
            if fitting == 0:
                yield piece
                piece, room = [], num_bytes
                continue
            stop = min(flat.numel(), start + fitting)
            piece.append(_Chunk(index, flat[start:stop], [source[start:stop] for source in sources]))
            room -= sum(_aligned((stop - start) * source.element_size()) for source in sources)
            start = stop
    if piece:
        yield piece


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
