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
        return _index(self.item) == self.index

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

    __slots__ = ("item", "nbytes", "saved")

    def __init__(self, item: Any) -> None:
        self.item, self.nbytes = item, _num_bytes(item)
        self.saved: Any = None

    def keep(self) -> None:
        """Copy it."""
        self.saved = _bytes_of(self.item)

    def is_same(self) -> bool:
        """Byte by byte."""
        return self.saved is None or (_num_bytes(self.item) == self.nbytes and bool(_bytes_of(self.item) == self.saved))

    def put_back(self) -> None:
        """The same bytes in the same memory."""
        item, saved = self.item, self.saved
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


def _raw(item: Any) -> Any:
    return item.get_obj() if hasattr(type(item), "get_obj") else item


def _address(item: Any) -> int:
    return ctypes.addressof(_raw(item))


class TensorState:
    """A tensor's memory and bits, and whether it takes part in backward.

    Args:
        item: The tensor.
        has_values: Whether its values are kept here; those of merged tensors are the merger's.
    """

    __slots__ = ("copy", "has_values", "item", "memory", "nbytes", "place", "requires_grad", "sample", "version")

    def __init__(self, item: Tensor, *, has_values: bool) -> None:
        self.item, self.has_values = item, has_values
        self.requires_grad = item.requires_grad
        self.nbytes = item.numel() * item.element_size() if has_values and not _is_sparse(item) else 0
        self.copy: Tensor | None = None
        self.sample: Tensor | None = None
        self.memory: Tensor | None = None
        self.place = self.version = None

    def keep(self) -> None:
        """Copy it."""
        if self.has_values:
            self.copy, self.version = bits.copy_of(self.item), _version(self.item)
            self._watch_memory()

    def watch(self) -> None:
        """Too large to be copied: note where it lies, how often it was written, and some of its bits."""
        self._watch_memory()
        self.version, self.sample = _version(self.item), _sample(self.item)

    def is_same(self) -> bool:
        """By bits: fused optimizers and batch norm write without a new version (P31)."""
        item = self.item
        if item.requires_grad != self.requires_grad or (self.place is not None and _place(item) != self.place):
            return False
        if self.copy is not None:
            return bits.same_bits(item, self.copy)
        if self.sample is not None:
            return _version(item) == self.version and bits.same_bits(_sample(item), self.sample)
        return True

    def put_back(self) -> None:
        """The same memory with the same bits; raises where they were not copied."""
        item = self.item
        if item.requires_grad != self.requires_grad:
            item.requires_grad_(self.requires_grad)
        if self.memory is not None and _place(item) != self.place:
            item.data = self.memory
        if self.copy is not None and not bits.same_bits(item, self.copy):
            bits.write_back(item, self.copy)
            _set_version(item, self.version)
        elif self.sample is not None and not self.is_same():
            self.watch()  # said once, not at every pass
            raise ValueError(f"{self.nbytes:,} bytes are too many to be copied at each merge")

    def _watch_memory(self) -> None:
        self.place = _place(self.item)
        self.memory = self.item.detach() if self.place is not None else None


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided


def _place(tensor: Tensor) -> Any:
    """Where a plain dense tensor lies, and as what; None for all others, which are told by their parts alone."""
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or _is_sparse(tensor) or tensor.is_nested:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _set_version(tensor: Tensor, version: int | None) -> None:
    if version is not None:  # or a graph that training holds across batches could no longer be walked backward
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def _sample(tensor: Tensor) -> Tensor | None:
    if _place(tensor) is None or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    flat = bits.as_integers(tensor.detach()).view(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone()
