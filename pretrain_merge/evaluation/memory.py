"""The state of one object that is memory or a position: tensors and arrays by their bits, generators, iterators.

This module knows bytes and where something stands. It knows no containers.
"""

import copy
import ctypes
import random
from collections.abc import Mapping
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain_merge.parameters import bits

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
_SAMPLE = 256  # elements of a tensor that is only watched
_BLOCK = 1 << 20  # elements that are compared at once
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_INTEGERS = {
    torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64,
    torch.bool: torch.uint8, torch.uint8: torch.uint8, torch.int8: torch.uint8, torch.int16: torch.int16,
    torch.int32: torch.int32, torch.int64: torch.int64,
}  # fmt: skip


def draws(cls: type) -> bool:
    """Whether objects of a type draw random numbers and can be set back."""
    return issubclass(cls, _GENERATORS)


class GeneratorState:
    """Where a random generator of any library stands."""

    __slots__ = ("item", "state")

    def __init__(self, item: Any) -> None:
        self.item, self.state = item, _position(item)

    def is_same(self) -> bool:
        """Whether it drew nothing."""
        return _same_position(_position(self.item), self.state)

    def put_back(self) -> None:
        """Back to where it was."""
        item, state = self.item, copy.deepcopy(self.state)
        if issubclass(type(item), random.Random):
            random.Random.setstate(item, state)
        elif issubclass(type(item), np.random.Generator):
            item.bit_generator.state = state
        elif issubclass(type(item), np.random.BitGenerator):
            item.state = state
        else:
            item.set_state(state)


def _position(item: Any) -> Any:
    if issubclass(type(item), random.Random):
        return random.Random.getstate(item)
    if issubclass(type(item), np.random.Generator):
        return item.bit_generator.state
    if issubclass(type(item), np.random.BitGenerator):
        return item.state
    return item.get_state()


def _same_position(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, Mapping):
        return all(_same_position(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same_position, a, b))
    return bool(a == b)


class IteratorState:
    """How far an iterator over a list, tuple or range is."""

    __slots__ = ("index", "item")

    def __init__(self, item: Any) -> None:
        self.item, self.index = item, _index(item)

    def is_same(self) -> bool:
        """Whether nothing was taken."""
        return bool(_index(self.item) == self.index)

    def put_back(self) -> None:
        """Back to where it was; one that is exhausted has forgotten what it read."""
        self.item.__setstate__(self.index)
        if _index(self.item) != self.index:
            raise ValueError("an iterator that was read to its end cannot be set back")


def _index(iterator: Any) -> Any:
    reduced = iterator.__reduce__()
    return reduced[2] if len(reduced) > 2 else None


class CountState:
    """Where something stands that can be seen to move and not be set back: `itertools.count`, a running generator."""

    __slots__ = ("item", "seen")

    def __init__(self, item: Any) -> None:
        self.item, self.seen = item, _seen(item)

    def is_same(self) -> bool:
        """Whether it has not moved."""
        return bool(_seen(self.item) == self.seen)

    def put_back(self) -> None:
        """Not possible."""
        raise ValueError("it cannot be set back; hold a number instead, or the list that it goes through")


def _seen(item: Any) -> Any:
    if type(item) is not GeneratorType:
        return repr(item)
    frame = item.gi_frame
    return frame and (frame.f_lasti, tuple(map(id, frame.f_locals.values())))


class BytesState:
    """The memory of an array of any library but torch."""

    __slots__ = ("item", "nbytes", "sample", "saved")

    def __init__(self, item: Any) -> None:
        self.item, self.nbytes = item, _num_bytes(item)
        self.saved: bytes | None = None
        self.sample = b""

    def keep(self) -> None:
        """Copy it."""
        self.saved = _bytes_of(self.item)

    def watch(self) -> None:
        """Too large to be copied: note some of it."""
        self.sample = _some_bytes(self.item)

    def is_same(self) -> bool:
        """Byte by byte where it was copied."""
        if _num_bytes(self.item) != self.nbytes:
            return False
        return _some_bytes(self.item) == self.sample if self.saved is None else _bytes_of(self.item) == self.saved

    def put_back(self) -> None:
        """The same bytes in the same memory; raises where they are too many."""
        item, saved = self.item, self.saved
        if saved is None:
            self.watch()  # said once, not at every pass
            raise ValueError(f"{self.nbytes:,} bytes are too many to be copied at each merge")
        if issubclass(type(item), np.ndarray):
            plain = item.view(np.ndarray)
            plain[...] = np.frombuffer(saved, item.dtype).reshape(item.shape)
        elif isinstance(item, bytearray):
            item[:] = saved
        elif hasattr(type(item), "frombytes"):
            del item[:]
            item.frombytes(saved)
        else:
            ctypes.memmove(_address(item), saved, self.nbytes)


def _num_bytes(item: Any) -> int:
    if issubclass(type(item), np.ndarray):
        return int(item.nbytes)
    if isinstance(item, bytearray):
        return len(item)
    return len(item) * item.itemsize if hasattr(type(item), "frombytes") else ctypes.sizeof(_raw(item))


def _bytes_of(item: Any) -> bytes:
    if issubclass(type(item), np.ndarray) or hasattr(type(item), "frombytes"):
        return bytes(item.tobytes())
    return bytes(item) if isinstance(item, bytearray) else ctypes.string_at(_address(item), _num_bytes(item))


def _some_bytes(item: Any) -> bytes:
    if issubclass(type(item), np.ndarray):
        return bytes(item.flat[:: max(1, item.size // _SAMPLE)].tobytes())
    return bytes(item[:: max(1, len(item) // _SAMPLE)]) if hasattr(type(item), "__len__") else b""


def _raw(item: Any) -> Any:
    return item.get_obj() if hasattr(type(item), "get_obj") else item


def _address(item: Any) -> int:
    return ctypes.addressof(_raw(item))


class TensorState:
    """A tensor's memory, and whether it takes part in backward; its bits where it is not plain memory.

    The bits of plain tensors are kept together, in `Block`s.

    Args:
        item: The tensor.
        has_values: Whether its values are kept here; those of merged tensors are the merger's.
    """

    __slots__ = ("copy", "has_values", "item", "memory", "nbytes", "place", "requires_grad", "sample", "version")

    def __init__(self, item: Tensor, *, has_values: bool) -> None:
        self.item, self.has_values = item, has_values
        self.requires_grad = item.requires_grad
        self.nbytes = item.numel() * item.element_size() if has_values else 0
        self.copy: Tensor | None = None
        self.sample: Tensor | None = None
        self.memory: Tensor | None = None
        self.place: Any = None
        self.version: int | None = None

    def keep(self) -> Tensor | None:
        """Keep the bits; of plain memory give a flat view instead, to be kept in a `Block`."""
        if not self.has_values or _is_released(self.item):
            return None
        view = self._watch_memory()
        if view is None:
            self.copy = bits.copy_of(self.item)
        return view

    def watch(self) -> None:
        """Too large to be copied: note where it lies, how often it was written, and some of its bits."""
        view = self._watch_memory()
        self.sample = _sample(view) if view is not None else None

    def is_same(self) -> bool:
        """Whether it is the same memory, with the same bits where this keeps them: versions tell too little (P31)."""
        item = self.item
        if item.requires_grad != self.requires_grad or (self.place is not None and _place(item) != self.place):
            return False
        if self.copy is not None:
            return bits.same_bits(item, self.copy)
        return self.sample is None or self._has_sample()

    def put_back(self) -> None:
        """The same memory, with the same bits where this keeps them; raises where they are too many."""
        item = self.item
        if item.requires_grad != self.requires_grad:
            item.requires_grad_(self.requires_grad)
        if self.memory is not None and _place(item) != self.place:
            if _is_released(self.memory):
                self.memory.untyped_storage().resize_(_extent(self.memory))
            item.data, self.place = self.memory, _place(self.memory)
        if self.copy is not None and not bits.same_bits(item, self.copy):
            bits.write_back(item, self.copy)
            self.put_back_version()
        if self.sample is not None and not self._has_sample():
            self.watch()  # said once, not at every pass
            raise ValueError(f"{self.nbytes:,} bytes are too many to be copied at each merge")

    def put_back_version(self) -> None:
        """Or a graph that training holds across batches could no longer be walked backward."""
        if self.version is not None:
            torch._C._autograd._unsafe_set_version_counter((self.item,), (self.version,))

    def _watch_memory(self) -> Tensor | None:
        """Note where it lies; a flat view of it, or None where it is not plain memory."""
        item = self.item
        self.version = None if item.is_inference() else item._version
        if not _is_plain(item) or _is_released(item):
            return None
        self.place, self.memory = _place(item), item.detach()
        if not item.is_contiguous() or item.is_conj() or item.is_neg() or item.dtype not in _INTEGERS:
            return None
        return self.memory.view(-1) if item.dim() != 1 else self.memory

    def _has_sample(self) -> bool:
        view = self._watch_memory_again()
        return view is not None and self.sample is not None and bits.same_bits(_sample(view), self.sample)

    def _watch_memory_again(self) -> Tensor | None:
        return None if self.item.is_inference() or self.item._version != self.version else self._watch_memory()


class Block:
    """The bits of many plain tensors of one device and dtype, compared with one call: mostly nothing changed.

    Args:
        parts: States, and flat views of their tensors' memory.
    """

    def __init__(self, parts: list[tuple[TensorState, Tensor]]) -> None:
        self._states, self._views = zip(*parts, strict=True)
        self._saved = torch.cat(self._views)
        self._integers = _INTEGERS[self._saved.dtype]  # NaN is not itself, and 0.0 is -0.0

    def put_back(self) -> None:
        """Write the tensors whose bits changed."""
        if self._is_same(torch.cat(self._views), self._saved):
            return
        saved = torch.split(self._saved, [view.numel() for view in self._views])
        for state, view, before in zip(self._states, self._views, saved, strict=True):
            if not self._is_same(view, before):
                view.copy_(before)
                state.put_back_version()

    def _is_same(self, a: Tensor, b: Tensor) -> bool:
        return torch.equal(a.view(self._integers), b.view(self._integers))


def blocks_of(parts: list[tuple[TensorState, Tensor]]) -> list[Block]:
    """Flat views in blocks of one device and dtype, each small beside the run's memory."""
    groups: dict[Any, list[tuple[TensorState, Tensor]]] = {}
    sizes: dict[Any, int] = {}
    for state, view in parts:
        kind = (view.device, view.dtype)
        sizes[kind] = sizes.get(kind, 0) + view.numel()
        groups.setdefault((kind, sizes[kind] // _BLOCK), []).append((state, view))
    return [Block(group) for group in groups.values()]


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    )


def _is_released(tensor: Tensor) -> bool:
    """Whether it has a shape and no memory, as FSDP2 leaves what it gathered (P18): to read it ends the process."""
    return _is_plain(tensor) and tensor.untyped_storage().nbytes() < _extent(tensor)


def _extent(tensor: Tensor) -> int:
    """Bytes from the start of its storage to the end of its last element."""
    if not tensor.numel():
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((tensor.storage_offset() + steps + 1) * tensor.element_size())


def _place(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _sample(view: Tensor) -> Tensor:
    return view[:: max(1, view.numel() // _SAMPLE)].clone()
