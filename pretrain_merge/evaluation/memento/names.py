"""The state of named places of which each holds one object: slots, closure cells, globals, attributes of classes.

This module knows how each kind of place is read and written. It searches nothing.
"""

from collections.abc import Callable, Iterable
from itertools import repeat
from operator import is_
from types import CellType
from typing import Any

from pretrain_merge.evaluation.memento.kinds import lives
from pretrain_merge.evaluation.memento.states import ABSENT


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
        return all(map(is_, map(self.get, repeat(self.item), self.places), self.values))

    def put_back(self) -> None:
        """Only what changed is written, and nothing over what has come to life."""
        for place, value in zip(self.places, self.values, strict=True):
            now = self.get(self.item, place)
            # a logger or client that a hook opened would be lost open, and its files unfinished
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


class ClassState(PlacesState):
    """A class's own attributes, but for those that Python or an abstract base put there."""

    __slots__ = ("before",)

    def __init__(self, cls: type) -> None:
        super().__init__(cls, _own_names(cls), _get_attribute, _set_attribute)
        self.before = dict(vars(cls))

    def is_same(self) -> bool:
        """By name and identity."""
        now, before = vars(self.item), self.before
        # as a whole, Python's own entries and all: names are asked one by one only where something changed
        if len(now) == len(before) and all(map(is_, now.values(), before.values())) and all(map(is_, now, before)):
            return True
        return len(_own_names(self.item)) == len(self.places) and super().is_same()

    def put_back(self) -> None:
        """Those that are new are gone, too, unless they have come to life."""
        for name in _own_names(self.item):
            if name not in self.places and not lives(type(vars(self.item)[name])):
                type.__delattr__(self.item, name)
        super().put_back()


def _own_names(cls: type) -> list[str]:
    # `_abc_impl` caches which classes are subclasses, and Python fills it whenever it asks
    return [name for name in vars(cls) if not name.startswith("__") and name != "_abc_impl"]


def _get_slot(item: Any, slot: Any) -> Any:
    try:
        return slot.__get__(item)
    except AttributeError:
        return ABSENT


def _set_slot(item: Any, slot: Any, value: Any) -> None:
    if value is ABSENT:
        slot.__delete__(item)
    else:
        slot.__set__(item, value)


def _get_cell(_: Any, cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def _set_cell(_: Any, cell: CellType, value: Any) -> None:
    if value is ABSENT:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _get_name(namespace: dict[str, Any], name: str) -> Any:
    return namespace.get(name, ABSENT)


def _set_name(namespace: dict[str, Any], name: str, value: Any) -> None:
    if value is ABSENT:
        del namespace[name]
    else:
        namespace[name] = value


def _get_attribute(cls: type, name: str) -> Any:
    return vars(cls).get(name, ABSENT)


def _set_attribute(cls: type, name: str, value: Any) -> None:
    if value is ABSENT:
        type.__delattr__(cls, name)
    else:
        type.__setattr__(cls, name, value)  # not the metaclass's own
