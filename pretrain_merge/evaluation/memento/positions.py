"""Where something stands that moves when it is used: random generators, iterators, counters, running generators.

This module knows how each is asked, and how those that can be are set back. It knows no containers and no memory.
"""

import copy
import csv
import gc
import hashlib
import itertools
import mmap
import random
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from types import GeneratorType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pretrain_merge.evaluation.memento.kinds import is_table
from pretrain_merge.evaluation.memento.memory import SAMPLE

_HOLD_A_NUMBER = "it cannot be set back; hold a number instead, or the list that it goes through"
_COUNTED = (
    "it counts what is taken, and though what it goes through is set back, it ends sooner by that many or skips "
    "them; hold a number instead, or the list"
)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


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
        # a copy: it is put back once for each view, and a setter may keep what it is given
        item, state = self.item, copy.deepcopy(self.state)
        # past a user's subclass, whose own `setstate` may do more
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
    # `==` of arrays gives an array, which has no truth
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
        # C iterators drop what they go through at its end, and then accept any index in silence
        self.item.__setstate__(self.index)
        if _index(self.item) != self.index:
            raise ValueError("an iterator that was read to its end cannot be set back")


def _index(iterator: Any) -> Any:
    reduced = iterator.__reduce__()
    return reduced[2] if len(reduced) > 2 else None


_TELLS = sys.version_info < (3, 14)  # how far one of `itertools` is


class IterationState:
    """How far one of `itertools` is. What it goes through has a position of its own, which is put back by itself."""

    __slots__ = ("item", "seen")

    def __init__(self, item: Any) -> None:
        self.item, self.seen = item, _iteration(item)

    def is_same(self) -> bool:
        """Whether nothing was taken."""
        return _alike(_iteration(self.item), self.seen)

    def put_back(self) -> None:
        """Back to the part that a chain was in; of the others no state that they accept is all of it."""
        if issubclass(type(self.item), itertools.chain) and len(self.seen) > 2:
            self.item.__setstate__(self.seen[2])
        if not self.is_same():
            raise ValueError(_COUNTED if issubclass(type(self.item), itertools.islice) else _HOLD_A_NUMBER)


_COUNTING = (
    itertools.islice, itertools.product, itertools.permutations, itertools.combinations,
    itertools.combinations_with_replacement,
)  # fmt: skip


def does_not_tell(item: Any) -> bool:
    """Whether it counts what was taken from it and Python gives nobody the number."""
    return not _TELLS and issubclass(type(item), _COUNTING)


def _iteration(item: Any) -> tuple[Any, ...]:
    kind: Any = type(item)
    if _TELLS and kind.__reduce__ is not object.__reduce__:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # since 3.12 Python warns whoever asks
            return tuple(item.__reduce__())
    return tuple(gc.get_referents(item))  # which changes with most of them


def _alike(a: Any, b: Any) -> bool:
    """By identity, but for containers, numbers and texts that are made for each answer."""
    if a is b:
        return True
    kind: Any = type(a)
    if kind is not type(b):
        return False
    if kind in (tuple, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if kind is dict:
        return _alike(list(a.items()), list(b.items()))
    return kind in (int, str) and bool(a == b)


class OwnState:
    """What an object of Python's own C classes says of itself when it is copied: an XML element, a decimal context.

    Args:
        item: The object.
        method: By which its class says it, past a user's subclass.
    """

    __slots__ = ("item", "method", "said")

    def __init__(self, item: Any, method: Any) -> None:
        self.item, self.method = item, method
        self.said = self._say()

    def is_same(self) -> bool:
        """By identity of what it refers to, whose own changes are kept by other states."""
        return _alike(self._say(), self.said)

    def put_back(self) -> None:
        """By its own means, if it has any."""
        if set_back := vars(self.method.__objclass__).get("__setstate__"):
            set_back(self.item, self.said)
        if not self.is_same():
            raise ValueError("it cannot be set back; hold in its place what it is made of")

    def _say(self) -> Any:
        try:
            return self.method(self.item)
        # a time zone that was read from a file refuses to be copied
        except Exception:
            return ()


class CountState:
    """Where something stands that can be seen to move and not be set back: counts, turns, hashes, other threads' flags.

    `itertools.count` and `cycle`, a running generator, an iterator of a dict, the number that `enumerate` is at,
    and how many seeds were spawned from one.
    """

    __slots__ = ("item", "seen")

    def __init__(self, item: Any) -> None:
        self.item, self.seen = item, _seen(item)

    def is_same(self) -> bool:
        """Whether it has not moved."""
        return bool(_seen(self.item) == self.seen)

    def put_back(self) -> None:
        """Not possible."""
        self.seen = _seen(self.item)  # said once, not at every pass
        raise ValueError(_HOLD_A_NUMBER if hasattr(type(self.item), "__next__") else "it cannot be set back")


def _seen(item: Any) -> Any:
    look = _LOOKS.get(type(item))
    if look is not None:
        try:
            return look(item)
        # one of NumPy's does not say where it is once it is at its end
        except Exception:
            return None
    if is_table(type(item)):
        return item.shape, *blocks_of_table(item)  # which are compared by identity
    return item.__length_hint__() if hasattr(type(item), "__length_hint__") else repr(item)


def blocks_of_table(item: Any) -> tuple[Any, ...]:
    """Where the columns of a data frame lie; nothing where its library keeps them in another way."""
    return tuple(getattr(getattr(item, "_mgr", None), "blocks", ()))


def _turn(generator: Any) -> Any:
    # the instruction it waits at tells two turns of one loop apart only with its variables
    frame = generator.gi_frame
    return frame and (frame.f_lasti, tuple(map(id, frame.f_locals.values())))


def _turns(item: "itertools.cycle[Any]") -> Any:
    """Of a cycle: how much it has seen, and where it is in what it repeats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # since 3.12 Python warns whoever asks
        try:
            _, (through,), (known, *repeats) = cast("Any", item.__reduce__())
        except TypeError:  # since 3.14 it does not tell
            return None
    return len(known), through.__length_hint__() if any(repeats) else None


def _place_in_file(item: Any) -> Any:
    """Of memory that is a file's: the place in it, and some of its bytes."""
    return None if item.closed else (item.tell(), item[:: len(item) // SAMPLE | 1])


# what is asked of each type to see whether it moved; of all others how long they are, or how they are written
_LOOKS: dict[type, Callable[[Any], Any]] = {
    GeneratorType: _turn,
    itertools.cycle: _turns,
    enumerate: lambda item: item.__reduce__()[1][1],
    np.random.SeedSequence: lambda item: item.n_children_spawned,
    np.flatiter: lambda item: item.index,
    np.nditer: lambda item: item.iterindex,
    np.memmap: lambda item: item.flags.writeable and item.flat[:: item.size // SAMPLE | 1].tobytes(),
    mmap.mmap: _place_in_file,
    # other threads may wait for these, so that they are looked at only
    threading.Event: lambda item: item.is_set(),
    **dict.fromkeys((threading.Semaphore, threading.BoundedSemaphore), lambda item: item._value),
    type(csv.reader(())): lambda item: item.line_num,
    csv.DictReader: lambda item: item.reader.line_num,
    **{type(hashlib.new(name)): lambda item: item.hexdigest() for name in ("sha256", "blake2b", "md5")},
}
LOOKED_AT = tuple(_LOOKS)


class CacheState:
    """What `functools.lru_cache` remembers: results that may follow from merged weights."""

    __slots__ = ("info", "item")

    def __init__(self, item: Any) -> None:
        self.item, self.info = item, item.cache_info()

    def is_same(self) -> bool:
        """Whether nothing was computed."""
        return bool(self.item.cache_info().misses == self.info.misses)

    def put_back(self) -> None:
        """Empty it where it was empty; single results cannot be taken out."""
        # emptied it would only be slower; half emptied is not possible
        if self.info.currsize:
            raise ValueError("single results cannot be taken out of a cache; call its cache_clear() in the hook")
        self.item.cache_clear()
