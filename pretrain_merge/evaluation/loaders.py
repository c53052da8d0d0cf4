"""Validation loaders iterated a second time, by iterators of our own, and proof that the batches are the same.

This module knows data loaders and batches; it knows no weights. What an iteration moves in samplers, data sets and
generators is put back by whoever iterates (`memento`); the loader's own persistent workers are never used (P6).
"""

import copy
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from pretrain_merge.errors import EvaluationError
from pretrain_merge.parameters import bits


class EvaluationInterrupted(Exception):
    """A signal waits, so the evaluation ends early. Never seen by users: the callback catches it."""


class RepeatedLoaders:
    """Access to the Trainer's validation loaders that leaves them as they were.

    Args:
        combined: Lightning's `CombinedLoader` of the validation loaders.
        max_batches: Batches to read of each loader; may be `inf`.
        stateful_data: "refuse" loaders that carry a position of their own, or "iterate" them.

    Raises:
        EvaluationError: A loader can be read only once, or carries a position of its own and `stateful_data` is
            "refuse".
    """

    def __init__(self, combined: Any, max_batches: Sequence[float], *, stateful_data: str = "refuse") -> None:
        self.max_batches = tuple(max_batches)
        self._combined = combined
        self._fingerprints = Fingerprints()
        refuse_loaders(combined.flattened, stateful_data=stateful_data)

    @property
    def loaders(self) -> list[Any]:
        """The user's own loaders."""
        return list(self._combined.flattened)

    @property
    def num_batches(self) -> int | None:
        """Batches of one pass over all loaders, one after another; None where that is not known."""
        total = sum(self.max_batches)
        return int(total) if math.isfinite(total) else None

    def combined(self, *, on_batch: Callable[[], object]) -> Any:
        """A new `CombinedLoader`; reads what every other one reads, if the loaders' state is put back in between."""
        # P16: of Lightning's class and mode, so that it reads as Lightning's own loop would
        combined = type(self._combined)(self._combined.iterables, self._combined._mode)
        combined.flattened = [
            _RepeatedLoader(loader, index, self._fingerprints, on_batch)
            for index, loader in enumerate(self._combined.flattened)
        ]
        return combined

    def end_pass(self) -> None:
        """Call after a full pass over `combined()`.

        Raises:
            EvaluationError: This pass had fewer batches than the first one.
        """
        self._fingerprints.end_pass()


class Fingerprints:
    """Checksums of the batches of the first pass; every later pass must repeat them."""

    def __init__(self) -> None:
        self._first: list[tuple[int, int]] | None = None
        self._current: list[tuple[int, int]] = []

    def check(self, loader: int, batch: Any) -> None:
        """Compare the next batch with the one at its place in the first pass."""
        place = len(self._current)
        self._current.append((loader, _fingerprint(batch)))
        # at the batch, and not when the pass ends: no metric of other batches is ever returned
        if self._first is not None and (place >= len(self._first) or self._first[place] != self._current[place]):
            raise EvaluationError(_other_batches(loader, f"batch {place} of this pass is another"))

    def end_pass(self) -> None:
        """The pass is complete; the next one starts."""
        if self._first is None:
            self._first = self._current
        elif len(self._current) != len(self._first):
            raise EvaluationError(_other_batches(0, f"{len(self._current)} batches after {len(self._first)}"))
        self._current = []


class _RepeatedLoader:
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


def _without_persistent_workers(loader: Any) -> Iterable[Any]:
    if not isinstance(loader, DataLoader):
        return loader  # type: ignore[no-any-return]
    # P6: a copy, so that the loader's own iterator and its workers stay where they are
    own = copy.copy(loader)
    # through __dict__: DataLoader forbids assigning these after construction
    vars(own).update(_iterator=None, persistent_workers=False)
    return own


def refuse_loaders(loaders: Iterable[Any], *, stateful_data: str) -> None:
    """Refuse what cannot be read for a merge without a trace; nothing is read of it.

    Raises:
        EvaluationError: One can be read only once, or carries a position of its own and `stateful_data` is "refuse".
    """
    for index, loader in enumerate(loaders):
        _refuse_one_shot(index, loader)
        if stateful_data == "refuse":
            _refuse_stateful(index, loader)


def _refuse_one_shot(index: int, loader: Any) -> None:
    # iterators of Python (generators, zip, map, itertools) and of DataLoaders go on where they stopped; a class may
    # begin anew
    library = type(loader).__module__.partition(".")[0]
    if hasattr(loader, "__next__") and (library == "torch" or library in sys.stdlib_module_names):
        raise EvaluationError(
            f"validation loader {index} is an iterator ({type(loader).__name__}), which can be read only once: raw and "
            f"merged weights could not be measured on the same batches, and what a merge reads the run's own "
            f"validation would lack. Give validation what starts over at each iteration: a DataLoader, or an object "
            f"whose __iter__ is a generator function."
        )


def _refuse_stateful(index: int, loader: Any) -> None:
    for item in (loader, getattr(loader, "dataset", None)):
        # resumable loaders go on where they were saved; what is its own iterator, where it stopped
        has_state = hasattr(item, "state_dict") and hasattr(item, "load_state_dict")
        if hasattr(item, "__next__") or has_state or _goes_on(item):
            raise EvaluationError(
                f"validation loader {index}: {type(item).__name__} carries a position of its own, so reading it for a "
                f"merge may move what the run's own validation reads. Give validation a data set that starts over at "
                f"each iteration, or set stateful_data='iterate' if iterating it again is harmless."
            )


def _goes_on(loader: Any) -> bool:
    """Whether a loader keeps an iterator of its own through all epochs, as those do that never stop their workers."""
    own = vars(loader).items() if isinstance(loader, DataLoader) else ()
    return any(name != "_iterator" and isinstance(value, _BaseDataLoaderIter) for name, value in own)


def _fingerprint(batch: Any) -> int:
    checksum = 0
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor):
            for part in bits.dense_parts(leaf):
                checksum = zlib.crc32(repr((part.shape, part.dtype)).encode(), checksum)
                # of what is on a device, shapes alone: to read it back would stall the stream at every batch
                if part.device.type == "cpu" and part.numel():
                    integers = bits.as_integers(part).contiguous().view(-1)
                    checksum = zlib.crc32(integers.numpy().view(np.uint8).data, checksum)
        elif isinstance(leaf, np.ndarray):
            checksum = zlib.crc32(repr((leaf.shape, leaf.dtype)).encode(), checksum)
            # the bytes of objects are addresses
            checksum = checksum if leaf.dtype.hasobject else zlib.crc32(leaf.tobytes(), checksum)
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
