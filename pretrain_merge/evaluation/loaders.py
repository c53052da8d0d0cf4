"""Validation loaders iterated a second time, by iterators of our own, and proof that the batches are the same.

This module knows data loaders, their samplers and their generators; it knows no weights. Whatever an iteration moves in
them is put back: generators, sampler counters, and the loader's own (persistent) workers, which it never uses (P6).
"""

import copy
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from pretrain_merge.errors import EvaluationError

_COUNTERS = (int, float, str, bytes, tuple, type(None))
_MOST_PARTS = 10_000  # rows that a data set holds in a list are not searched
_NO_PARTS = (Tensor, np.ndarray, str, bytes, int, float, type, ModuleType, type(None))


class EvaluationInterrupted(Exception):
    """A signal waits, so the evaluation ends early. Never seen by users: the callback catches it."""


class OwnLoaders:
    """Access to the Trainer's validation loaders that leaves them as they were.

    Args:
        combined: Lightning's `CombinedLoader` of the validation loaders.
        max_batches: Batches to read of each loader; may be `inf`.
        stateful_data: "refuse" loaders that carry a position of their own, or "iterate" them.

    Raises:
        EvaluationError: A loader carries a position of its own and `stateful_data` is "refuse".
    """

    def __init__(self, combined: Any, max_batches: Sequence[float], *, stateful_data: str = "refuse") -> None:
        self.max_batches = tuple(max_batches)
        self._combined = combined
        self._fingerprints = Fingerprints()
        if stateful_data == "refuse":
            for index, loader in enumerate(combined.flattened):
                _refuse_stateful(index, loader)

    def __enter__(self) -> "OwnLoaders":
        self._kept = [_Kept(item) for loader in self._combined.flattened for item in _stateful_parts(loader)]
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @property
    def num_batches(self) -> int | None:
        """Batches of one pass over all loaders, one after another; None where that is not known."""
        total = sum(self.max_batches)
        return int(total) if math.isfinite(total) else None

    def combined(self, *, on_batch: Callable[[], object]) -> Any:
        """A new `CombinedLoader` that reads the same batches as every other one made here."""
        self._restore()
        combined = type(self._combined)(self._combined.iterables, self._combined._mode)
        combined.flattened = [
            _OwnBatches(loader, index, self._fingerprints, on_batch)
            for index, loader in enumerate(self._combined.flattened)
        ]
        return combined

    def end_pass(self) -> None:
        """Call after a full pass over `combined()`.

        Raises:
            EvaluationError: This pass had fewer batches than the first one.
        """
        self._fingerprints.end_pass()

    def _restore(self) -> None:
        for kept in self._kept:
            kept.restore()


class Fingerprints:
    """Checksums of the batches of the first pass; every later pass must repeat them."""

    def __init__(self) -> None:
        self._first: list[tuple[int, int]] | None = None
        self._current: list[tuple[int, int]] = []

    def check(self, loader: int, batch: Any) -> None:
        """Compare the next batch with the one at its place in the first pass."""
        place = len(self._current)
        self._current.append((loader, _fingerprint(batch)))
        if self._first is not None and (place >= len(self._first) or self._first[place] != self._current[place]):
            raise EvaluationError(_other_batches(loader, f"batch {place} of this pass is another"))

    def end_pass(self) -> None:
        """The pass is complete; the next one starts."""
        if self._first is None:
            self._first = self._current
        elif len(self._current) != len(self._first):
            raise EvaluationError(_other_batches(0, f"{len(self._current)} batches after {len(self._first)}"))
        self._current = []


class _OwnBatches:
    """One loader, read by an iterator of our own; otherwise it looks like the loader."""

    def __init__(self, loader: Any, index: int, fingerprints: Fingerprints, on_batch: Callable[[], object]) -> None:
        self._loader, self._index = loader, index
        self._iterator = None  # Lightning shuts down what it finds here, and the user's workers are not ours to stop
        self._fingerprints, self._on_batch = fingerprints, on_batch

    def __iter__(self) -> Iterator[Any]:
        for batch in _without_persistent_workers(self._loader):
            self._fingerprints.check(self._index, batch)
            yield batch
            self._on_batch()

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Kept:
    """Generator state and counters of one object, to be put back."""

    def __init__(self, item: Any) -> None:
        self._item = item
        self._state = generator_state(item)
        own = getattr(item, "__dict__", {})
        # what other attributes refer to is kept by its own `_Kept`, or is a cache that may stay
        self._attributes = {
            name: value for name, value in own.items() if isinstance(item, Sampler) or isinstance(value, _COUNTERS)
        }

    def restore(self) -> None:
        if self._state is not None:
            set_generator_state(self._item, self._state)
        if isinstance(self._item, Sampler):
            vars(self._item).clear()
        if self._attributes:
            vars(self._item).update(self._attributes)


def _without_persistent_workers(loader: Any) -> Iterable[Any]:
    if not isinstance(loader, DataLoader):
        return loader  # type: ignore[no-any-return]
    own = copy.copy(loader)
    # through __dict__: DataLoader forbids assigning these after construction
    vars(own).update(_iterator=None, persistent_workers=False)
    return own


def _stateful_parts(loader: Any) -> Iterator[Any]:
    """What an iteration may move: generators, and counters of the loader, its samplers, data sets and collator."""
    seen: set[int] = set()
    waiting = [loader]
    while waiting and len(seen) < _MOST_PARTS:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _NO_PARTS) or _is_lightning(item):
            continue
        seen.add(id(item))
        if generator_state(item) is not None or item is loader or isinstance(item, Sampler) or _is_read_or_called(item):
            yield item
        waiting += _referred(item)


def _referred(item: Any) -> list[Any]:
    if isinstance(item, Mapping | list | tuple):
        return [] if len(item) > _MOST_PARTS else list(item.values() if isinstance(item, Mapping) else item)
    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, MethodType):
        return [item.__self__]
    if isinstance(item, FunctionType):
        return [cell.cell_contents for cell in item.__closure__ or () if cell != CellType()]
    if isinstance(item, nn.Module):  # a model that collates: its own generators, and not all of its parts
        return [value for value in vars(item).values() if generator_state(value) is not None]
    own = getattr(item, "__dict__", {})
    return [value for name, value in own.items() if not (name == "_iterator" and isinstance(item, DataLoader))]


def _is_read_or_called(item: Any) -> bool:
    """A data set, sampler, collator or transform; by its class, since `__getattr__` may do anything."""
    methods = ("__getitem__", "__iter__", "__call__")
    return hasattr(item, "__dict__") and any(hasattr(type(item), name) for name in methods)


def _is_lightning(item: Any) -> bool:
    return type(item).__module__.partition(".")[0] in ("lightning", "pytorch_lightning")


def generator_state(item: Any) -> Any:
    """The state of a random generator of any kind; None where the item is none."""
    if isinstance(item, torch.Generator):
        return item.get_state()
    if isinstance(item, random.Random):
        return item.getstate()
    if isinstance(item, np.random.Generator):
        return copy.deepcopy(item.bit_generator.state)
    if isinstance(item, np.random.RandomState):
        return item.get_state()
    return None


def set_generator_state(item: Any, state: Any) -> None:
    """Put a generator back to a state that `generator_state` gave."""
    if isinstance(item, torch.Generator):
        item.set_state(state)
    elif isinstance(item, random.Random):
        item.setstate(state)
    elif isinstance(item, np.random.Generator):
        item.bit_generator.state = copy.deepcopy(state)
    else:
        item.set_state(state)


def _refuse_stateful(index: int, loader: Any) -> None:
    for item in (loader, getattr(loader, "dataset", None)):
        if hasattr(item, "__next__") or (hasattr(item, "state_dict") and hasattr(item, "load_state_dict")):
            raise EvaluationError(
                f"validation loader {index}: {type(item).__name__} carries a position of its own, so reading it for a "
                f"merge may move what the run's own validation reads. Give validation a data set that starts over at "
                f"each iteration, or set stateful_data='iterate' if iterating it again is harmless."
            )


def _fingerprint(batch: Any) -> int:
    checksum = 0
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided:
            checksum = zlib.crc32(repr((leaf.shape, leaf.dtype)).encode(), checksum)
            if leaf.numel():
                checksum = zlib.crc32(leaf.detach().contiguous().view(-1).view(torch.uint8).numpy().data, checksum)
        elif isinstance(leaf, Tensor):
            checksum = zlib.crc32(repr((leaf.shape, leaf.dtype)).encode(), checksum)
        elif isinstance(leaf, str | bytes | int | float):
            checksum = zlib.crc32(repr(leaf).encode(), checksum)
    return checksum


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        children = [item for pair in batch.items() for item in pair]
    elif isinstance(batch, list | tuple):
        children = list(batch)
    elif is_dataclass(batch) and not isinstance(batch, type):
        children = [getattr(batch, field.name) for field in fields(batch)]
    else:
        yield batch
        return
    for child in children:
        yield from _leaves(child)


def _other_batches(loader: int, what: str) -> str:
    return (
        f"validation loader {loader}: raw and merged weights were given other batches ({what}). Both must see the same "
        f"data. Make the data set return the same items at each iteration (seed its random choices by index)."
    )
