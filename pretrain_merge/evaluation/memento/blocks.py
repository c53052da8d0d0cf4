"""The bits of many plain tensors, copied and compared by a few calls: an evaluation leaves nearly all as they were.

This module knows memory, of the host and of devices. What is plain, and where a tensor lay, the states of tensors know.
"""

import ctypes
from collections.abc import Sequence
from itertools import repeat
from operator import eq
from typing import Any

import torch
from torch import Tensor

from pretrain_merge.evaluation.memento.tensors import TensorState, is_released

_BLOCK = 4 << 20  # bytes that are compared at once: what is gathered for it is small beside a run's memory
_WORD = torch.int64.itemsize

_WRITABLE = 0x200  # PyBUF_WRITE
_memory_at: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.argtypes, _memory_at.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object


class HostBlock:
    """The bits of tensors in the host's memory, compared where they lie.

    A `bytearray` copies and compares by the C library's own functions, a tenth of the time of torch's for tensors of a
    few kilobytes, which most of a run's are.

    Args:
        states: Of plain tensors that are not empty.
    """

    def __init__(self, states: Sequence[TensorState]) -> None:
        self._states = states
        self._memories = [state.memory for state in states if state.memory is not None]  # all: they are plain
        self._addresses = list(map(Tensor.data_ptr, self._memories))
        self._views = list(map(_memory_at, self._addresses, [state.nbytes for state in states], repeat(_WRITABLE)))
        self._saved = list(map(bytearray, self._views))

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(map(len, self._saved))

    def put_back(self) -> None:
        """Write the tensors whose bits changed."""
        # what lies at an old address is no longer theirs where a storage was released and filled again
        if list(map(Tensor.data_ptr, self._memories)) != self._addresses:
            self._find()
        if all(map(eq, self._saved, self._views)):
            return
        for state, view, before in zip(self._states, self._views, self._saved, strict=True):
            if len(view) == len(before) and before != view:
                view[:] = before
                state.put_back_version()

    def _find(self) -> None:
        self._addresses = list(map(Tensor.data_ptr, self._memories))
        self._views = list(map(_host_bytes, self._memories))


class DeviceBlock:
    """The bits of many plain tensors of one device, compared with one call, since each call waits for the device.

    Args:
        states: Of plain tensors that are not empty.
    """

    def __init__(self, states: Sequence[TensorState]) -> None:
        self._states, self._views = states, [state.flat() for state in states]
        first = self._views[0]
        # one that is large is not gathered: what that takes would be as large
        self._one: Tensor | None = first.view(torch.int64) if len(states) == 1 and _is_of_words(first) else None
        if self._one is not None:
            self._tail, self._saved = first[:0], self._one.clone()
            return
        self._tail = first.new_zeros(-sum(map(len, self._views)) % _WORD)
        self._saved = self._bits()

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return self._saved.nbytes

    def put_back(self) -> None:
        """Write the tensors whose bits changed."""
        if torch.equal(self._bits(), self._saved):
            return
        *saved, _ = torch.split(self._saved.view(torch.uint8), [*map(len, self._views), len(self._tail)])
        for state, view, before in zip(self._states, self._views, saved, strict=True):
            if not torch.equal(view, before):
                view.copy_(before)
                state.put_back_version()

    def _bits(self) -> Tensor:
        # as integers: NaN is not itself, and 0.0 is -0.0
        if self._one is not None:
            return self._one
        bits: Tensor = torch.cat((*self._views, self._tail)).view(torch.int64)
        return bits


def blocks_of(states: Sequence[TensorState]) -> list[HostBlock | DeviceBlock]:
    """Blocks of one device each."""
    groups: dict[Any, list[TensorState]] = {}
    sizes: dict[torch.device, int] = {}
    for state in states:
        device = state.item.device
        sizes[device] = sizes.get(device, 0) + state.nbytes
        # the host's memory is compared in place, so that one block has all of it
        number = 0 if device.type == "cpu" else sizes[device] // _BLOCK
        groups.setdefault((device, number), []).append(state)
    return [(HostBlock if device.type == "cpu" else DeviceBlock)(group) for (device, _), group in groups.items()]


def _host_bytes(tensor: Tensor) -> memoryview:
    # nothing of a storage that was released for good: to read there ends the process
    if is_released(tensor):
        return memoryview(b"")
    view: memoryview = _memory_at(tensor.data_ptr(), tensor.nbytes, _WRITABLE)
    return view


def _is_of_words(view: Tensor) -> bool:
    return view.numel() % _WORD == 0 and view.storage_offset() % _WORD == 0
