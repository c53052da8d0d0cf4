"""Where something stands that moves when it is used: random generators, iterators, counters, running generators.

This module knows how each is asked, and how those that can be are set back. It knows no containers and no memory.
"""

import copy
import gc
import itertools
import random
import sys
import warnings
from collections.abc import Mapping
from types import GeneratorType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

_HOLD_A_NUMBER = "it cannot be set back; hold a number instead, or the list that it goes through"
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
            raise ValueError(_HOLD_A_NUMBER)


def _iteration(item: Any) -> tuple[Any, ...]:
    # since 3.12 Python warns whoever asks, and since 3.14 it does not tell; what they refer to changes with most
    kind: Any = type(item)
    if sys.version_info < (3, 12) and kind.__reduce__ is not object.__reduce__:
        return tuple(item.__reduce__())
    return tuple(gc.get_referents(item))


def _alike(a: Any, b: Any) -> bool:
    """By identity, but for the tuples and numbers that are made for each answer."""
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(map(_alike, a, b))
    return a is b or (type(a) is int and type(b) is int and a == b)


class CountState:
    """Where something stands that can be seen to move and not be set back.

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
        raise ValueError(_HOLD_A_NUMBER)


def _seen(item: Any) -> Any:
    if type(item) is GeneratorType:
        # the instruction it waits at tells two turns of one loop apart only with its variables
        frame = item.gi_frame
        return frame and (frame.f_lasti, tuple(map(id, frame.f_locals.values())))
    if type(item) is np.random.SeedSequence:
        return item.n_children_spawned
    if type(item) is enumerate:
        return item.__reduce__()[1][1]
    if type(item) is itertools.cycle:
        return _turns(item)
    return item.__length_hint__() if hasattr(type(item), "__length_hint__") else repr(item)


def _turns(item: "itertools.cycle[Any]") -> Any:
    """Of a cycle: how much it has seen, and where it is in what it repeats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # since 3.12 Python warns whoever asks
        try:
            _, (through,), (known, *repeats) = cast("Any", item.__reduce__())
        except TypeError:  # since 3.14 it does not tell
            return None
    return len(known), through.__length_hint__() if any(repeats) else None


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
