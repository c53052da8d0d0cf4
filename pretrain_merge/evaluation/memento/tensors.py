"""The memory of one tensor and the hooks on its gradient, and where those of many lie.

This module knows what can be kept of a tensor, and where it lies. The bits of plain ones are kept by `blocks`. It knows
no objects around it, and no merging.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from pretrain_merge.evaluation.memento.memory import SAMPLE
from pretrain_merge.evaluation.memento.states import State
from pretrain_merge.parameters import bits

_HOOKS = tuple(getattr(Tensor, name).__get__ for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))
_NO_HOOKS = (None, None)  # one for all: what a collector of garbage looks through costs each of its turns
# exact types, whose attributes are torch's own: no class of a user's can stand before them
PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
# a descriptor's `__get__` takes five times as long as the attribute
_WHERE: tuple[Any, ...] = (
    Tensor.data_ptr, attrgetter("shape"), Tensor.stride, attrgetter("requires_grad"), attrgetter("_backward_hooks"),
    attrgetter("_post_accumulate_grad_hooks"),
)  # fmt: skip
# of whole bytes, so that any of them is read as such; torch compares integers of 8 bytes fastest
_DTYPES = frozenset(
    {
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128, torch.bool,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    }
)  # fmt: skip


class TensorState:
    """A tensor's memory, and how it takes part in backward; its bits where it is not plain memory.

    The bits of plain tensors are kept together, in blocks.

    Args:
        item: The tensor.
        has_values: Whether its values are kept here; those of merged tensors are the merger's, but for their place.
    """

    __slots__ = (
        "copy",
        "has_values",
        "hooks",
        "item",
        "memory",
        "nbytes",
        "place",
        "requires_grad",
        "sample",
        "version",
    )

    def __init__(self, item: Tensor, *, has_values: bool) -> None:
        self.item, self.has_values = item, has_values
        self.requires_grad = item.requires_grad
        # dictionaries that the first hook makes, and that C++ holds, too
        self.hooks = hooks_of(item)
        self.nbytes = item.numel() * item.itemsize if has_values else 0
        self.copy: Tensor | None = None
        self.sample: Tensor | None = None
        self.memory: Tensor | None = None
        self.place: Any = None
        self.version: int | None = None

    def keep(self) -> bool:
        """Keep the bits; of plain memory do not, but say that they are to be kept in a block."""
        if self._watch_memory():
            return self.nbytes > 0
        if self.has_values and not is_released(self.item):
            self.copy = bits.copy_of(self.item)
        return False

    def watch(self) -> None:
        """Too large to be copied: note where it lies, how often it was written, and some of its bits."""
        self.sample = self._sample() if self._watch_memory() else None

    def flat(self) -> Tensor:
        """The bytes of plain memory, as one that shares it."""
        assert self.memory is not None
        # a view of a tensor without dimensions cannot be of another size of element
        return self.memory.view(-1).view(torch.uint8)

    def is_same(self) -> bool:
        """Whether it is the same memory, with the same bits where this keeps them: versions tell too little (P31)."""
        item = self.item
        if item.requires_grad != self.requires_grad or (self.place is not None and _place(item) != self.place):
            return False
        if any(self._new_hooks()):
            return False
        if self.copy is not None:
            return bits.same_bits(item, self.copy)
        return self.sample is None or self._has_sample()

    def put_back(self) -> None:
        """The same memory, with the same bits where this keeps them; raises where they are too many."""
        item = self.item
        if item.requires_grad != self.requires_grad:
            item.requires_grad_(self.requires_grad)
        for hooks in self._new_hooks():
            hooks.clear()  # and not dropped: C++ would go on calling them
        if self.memory is not None and _place(item) != self.place:
            if is_released(self.memory):
                self.memory.untyped_storage().resize_(_extent(self.memory))
            item.data, self.place = self.memory, _place(self.memory)
        if self.copy is not None and not bits.same_bits(item, self.copy):
            bits.write_back(item, self.copy)
            self.put_back_version()
        if self.sample is not None and not self._has_sample():
            self.watch()  # said once, not at every pass
            raise ValueError(f"{self.nbytes:,} bytes are too many to be copied at each merge")

    @property
    def is_plain(self) -> bool:
        """Whether its bits are not compared here, but those of many together, or nowhere."""
        return self.place is not None and self.copy is None and self.sample is None

    def put_back_version(self) -> None:
        """Or a graph that training holds across batches could no longer be walked backward."""
        if self.version is not None:
            torch._C._autograd._unsafe_set_version_counter((self.item,), (self.version,))

    def _watch_memory(self) -> bool:
        """Note where it lies; whether it is plain memory without gaps whose values are kept here."""
        item = self.item
        try:
            self.version = item._version
        except RuntimeError:  # made in inference mode, where writes are not counted
            self.version = None
        if not _is_plain(item) or _lacks_memory(item):
            return False
        self.place, self.memory = _place(item), item.detach()
        if not self.has_values or item.dtype not in _DTYPES or not item.is_contiguous():
            return False
        return not item.is_conj() and not item.is_neg()

    def _new_hooks(self) -> Iterator[Any]:
        """Of kinds that the tensor had none of; those of a dictionary that was there are kept by a state of its own."""
        return (now for was, now in zip(self.hooks, hooks_of(self.item), strict=True) if not was and now)

    def _has_sample(self) -> bool:
        if self.sample is None or self.item.is_inference() or self.item._version != self.version:
            return False
        return self._watch_memory() and bits.same_bits(self._sample(), self.sample)

    def _sample(self) -> Tensor:
        return self.flat()[:: self.nbytes // SAMPLE | 1].clone()  # odd: not always the same byte of an element


class Tensors:
    """Where many plain tensors lie and how they take part in backward, compared by a few calls.

    Args:
        states: With the index of the object that each is of; all of `is_plain`.
    """

    def __init__(self, states: Sequence[tuple[TensorState, int]]) -> None:
        self.states: Sequence[tuple[State, int]] = states
        self._items = [state.item for state, _ in states]
        # what each of them noted: nothing of it is read a second time
        noted = [(*state.place, state.requires_grad, *state.hooks) for state, _ in states]
        self._was = [list(column) for column in zip(*noted, strict=True)]

    def is_same(self) -> bool:
        """Of all of them. One of them at a time touches more memory than it compares."""
        return [list(map(get, self._items)) for get in _WHERE] == self._was


def hooks_of(tensor: Tensor) -> tuple[Any, ...]:
    """What is called with its gradient: when that is computed, and when it is accumulated."""
    if type(tensor) in PLAIN:
        hooks: tuple[Any, ...] = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
        return _NO_HOOKS if hooks == _NO_HOOKS else hooks
    return tuple(get(tensor) for get in _HOOKS)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


def is_released(tensor: Tensor) -> bool:
    """Whether it has a shape and no memory, as FSDP2 leaves what it gathered (P18): to read it ends the process."""
    return _is_plain(tensor) and _lacks_memory(tensor)


def _lacks_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() < _extent(tensor)


def _extent(tensor: Tensor) -> int:
    """Bytes from the start of its storage to the end of its last element."""
    num_elements = tensor.numel()
    if num_elements and not tensor.is_contiguous():
        num_elements = 1 + sum((size - 1) * by for size, by in zip(tensor.shape, tensor.stride(), strict=True))
    return int((tensor.storage_offset() + num_elements) * tensor.itemsize) if num_elements else 0


def _place(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
