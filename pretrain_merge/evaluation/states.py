"""The shallow state of one container: taken, compared without asking the objects in it, and put back in place.

This module knows containers, attributes and names. It searches nothing: what the objects in a container hold is kept by
states of their own. A container keeps its identity, and its items are the very same objects.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import is_
from types import CellType
from typing import Any, Protocol

import numpy as np

from pretrain_merge.evaluation.kinds import lives, works

_FACTORY: Any = vars(defaultdict)["default_factory"]  # past a subclass's own
_ABSENT: Any = type("Absent", (), {"__repr__": lambda _: "absent"})()


class State(Protocol):
    """What an object was."""

    item: Any

    def is_same(self) -> bool:
        """Whether the object is what it was."""

    def put_back(self) -> None:
        """Make it so again, in place."""


class ListState:
    """The items of a list or deque."""

    __slots__ = ("item", "items", "kind")

    def __init__(self, item: Any, kind: Any) -> None:
        self.item, self.kind = item, kind
        self.items = list(kind.__iter__(item))

    def is_same(self) -> bool:
        """By identity: an item's own `__eq__` may do anything."""
        item, items, kind = self.item, self.items, self.kind
        return kind.__len__(item) == len(items) and all(map(is_, kind.__iter__(item), items))

    def put_back(self) -> None:
        """The very same items in the same order."""
        self.kind.clear(self.item)
        self.kind.extend(self.item, self.items)


class SetState:
    """The items of a set."""

    __slots__ = ("item", "items")

    def __init__(self, item: Any) -> None:
        self.item, self.items = item, list(set.__iter__(item))

    def is_same(self) -> bool:
        """By identity."""
        item, items = self.item, self.items
        return set.__len__(item) == len(items) and set(map(id, set.__iter__(item))) == set(map(id, items))

    def put_back(self) -> None:
        """The very same items."""
        set.clear(self.item)
        set.update(self.item, self.items)


class ObjectsState:
    """The items of an array of NumPy that holds objects."""

    __slots__ = ("item", "items")

    def __init__(self, item: Any) -> None:
        self.item, self.items = item, list(item.flat)

    def is_same(self) -> bool:
        """By identity."""
        return all(map(is_, self.item.flat, self.items))

    def put_back(self) -> None:
        """The very same items."""
        for place, value in zip(np.ndindex(self.item.shape), self.items, strict=True):
            self.item[place] = value


class DictState:
    """Keys and values of a mapping, or the attributes of an object by its `__dict__`, in order.

    Args:
        item: The mapping.
        owner: Of attributes: the object, unless it may start threads and stay under our control.
    """

    __slots__ = ("item", "keys", "kind", "owner", "values")

    def __init__(self, item: Any, kind: Any = dict, owner: Any = None) -> None:
        self.item, self.kind, self.owner = item, kind, owner
        self.keys, self.values = list(kind.__iter__(item)), list(kind.values(item))

    def is_same(self) -> bool:
        """By identity."""
        item, kind, values = self.item, self.kind, self.values
        return (
            kind.__len__(item) == len(values)
            and all(map(is_, kind.values(item), values))
            and all(map(is_, kind.__iter__(item), self.keys))
        )

    def put_back(self) -> None:
        """Only what changed is written. What has come to life meanwhile (a worker, a file) is never dropped."""
        item, kind = self.item, self.kind
        was = {id(value) for value in self.values}
        new = {id(value): type(value) for value in list(kind.values(item)) if id(value) not in was}
        if self.owner is not None and any(map(works, new.values())):
            return  # a thread was started: the other attributes are its own by now
        own = {id(key) for key in self.keys}
        for key, value in list(kind.items(item)):
            if id(key) not in own and not lives(type(value)):
                kind.__delitem__(item, key)
        for key, value in zip(self.keys, self.values, strict=True):
            now = kind.get(item, key, _ABSENT)
            if now is not value and not (id(now) in new and lives(type(now))):
                kind.__setitem__(item, key, value)
        if not all(map(is_, kind.__iter__(item), self.keys)):  # in another order, which an optimizer's groups may feel
            others = [(key, value) for key, value in kind.items(item) if id(key) not in own]
            ours = [(key, kind.__getitem__(item, key)) for key in self.keys]
            kind.clear(item)
            kind.update(item, [*ours, *others])


class FactoryState:
    """What a defaultdict makes of a missing key."""

    __slots__ = ("factory", "item")

    def __init__(self, item: Any) -> None:
        self.item, self.factory = item, _FACTORY.__get__(item)

    def is_same(self) -> bool:
        """The very same function."""
        return bool(_FACTORY.__get__(self.item) is self.factory)

    def put_back(self) -> None:
        """The very same function."""
        _FACTORY.__set__(self.item, self.factory)


class PlacesState:
    """Named places of which each holds one object: slots, closure cells, globals that functions name, a class's own."""

    __slots__ = ("get", "item", "places", "set", "values")

    def __init__(
        self,
        item: Any,
        places: Iterable[Any],
        get: Callable[[Any, Any], Any],
        set_: Callable[[Any, Any, Any], object],
    ) -> None:
        self.item, self.places, self.get, self.set = item, tuple(places), get, set_
        self.values = [get(item, place) for place in self.places]

    def is_same(self) -> bool:
        """By identity."""
        item, get = self.item, self.get
        return all(get(item, place) is value for place, value in zip(self.places, self.values, strict=True))

    def put_back(self) -> None:
        """Only what changed is written, and nothing over what has come to life."""
        for place, value in zip(self.places, self.values, strict=True):
            now = self.get(self.item, place)
            if now is not value and not lives(type(now)):
                self.set(self.item, place, value)


def slots_state(item: Any, slots: Iterable[Any]) -> PlacesState:
    """Attributes of `__slots__`, by their descriptors."""
    return PlacesState(item, slots, _get_slot, _set_slot)


def cell_state(cells: Iterable[CellType]) -> PlacesState:
    """What a function closes over."""
    return PlacesState(None, cells, _get_cell, _set_cell)


def names_state(namespace: dict[str, Any], names: Iterable[str]) -> PlacesState:
    """Globals by name, those that do not exist yet among them."""
    return PlacesState(namespace, names, _get_name, _set_name)


def class_state(cls: type) -> PlacesState:
    """A class's own attributes, but for those that Python or an abstract base put there."""
    names = [name for name in vars(cls) if not name.startswith("__") and name != "_abc_impl"]
    return PlacesState(cls, names, _get_attribute, _set_attribute)


def _get_slot(item: Any, slot: Any) -> Any:
    try:
        return slot.__get__(item)
    except AttributeError:
        return _ABSENT


def _set_slot(item: Any, slot: Any, value: Any) -> None:
    if value is _ABSENT:
        slot.__delete__(item)
    else:
        slot.__set__(item, value)


def _get_cell(_: Any, cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _set_cell(_: Any, cell: CellType, value: Any) -> None:
    if value is _ABSENT:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _get_name(namespace: dict[str, Any], name: str) -> Any:
    return namespace.get(name, _ABSENT)


def _set_name(namespace: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        del namespace[name]
    else:
        namespace[name] = value


def _get_attribute(cls: type, name: str) -> Any:
    return vars(cls).get(name, _ABSENT)


def _set_attribute(cls: type, name: str, value: Any) -> None:
    if value is _ABSENT:
        type.__delattr__(cls, name)
    else:
        type.__setattr__(cls, name, value)  # not the metaclass's own
