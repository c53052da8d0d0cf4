"""The shallow state of one container: taken, compared without asking the objects in it, and put back in place.

This module knows containers and the attributes of objects. It searches nothing: what the objects in a container hold is
kept by states of their own. A container keeps its identity, and its items are the very same objects.
"""

from collections import defaultdict
from operator import is_
from typing import Any, Protocol

import numpy as np

from pretrain_merge.evaluation.memento.kinds import lives, works

_FACTORY: Any = vars(defaultdict)["default_factory"]  # past a subclass's own
ABSENT: Any = type("Absent", (), {"__repr__": lambda _: "absent"})()


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
        # length first: `map` stops at the shorter one
        return kind.__len__(item) == len(items) and all(map(is_, kind.__iter__(item), items))

    def put_back(self) -> None:
        """The very same items in the same order."""
        # past a subclass's own methods, which may count or refuse
        self.kind.clear(self.item)
        self.kind.extend(self.item, self.items)


class SetState:
    """The items of a set, and the order in which it goes through them.

    That order is of its table, which remembers what came and went. It comes back with the items as a rule; where it
    does not, `list(...)[0]` or `pop()` would give training another item.
    """

    __slots__ = ("item", "items", "size")

    def __init__(self, item: Any) -> None:
        self.item, self.items = item, list(set.__iter__(item))
        self.size = set.__sizeof__(item)

    def is_same(self) -> bool:
        """By identity."""
        item, items = self.item, self.items
        return (
            set.__len__(item) == len(items)
            and set.__sizeof__(item) == self.size
            and all(map(is_, set.__iter__(item), items))
        )

    def put_back(self) -> None:
        """The very same items.

        Raises:
            ValueError: In another order.
        """
        set.clear(self.item)
        set.update(self.item, self.items)
        if not all(map(is_, set.__iter__(self.item), self.items)):
            raise ValueError(
                "its items are what they were, in another order, which a set that grew meanwhile keeps; where order "
                "matters hold a dict"
            )


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
    """Keys and values of a mapping, in order."""

    __slots__ = ("item", "keys", "kind", "values")

    def __init__(self, item: Any, kind: Any = dict) -> None:
        self.item, self.kind = item, kind
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
        new = self._new_values()
        # by identity: to look a key up calls its `__hash__` and `__eq__`
        own = {id(key) for key in self.keys}
        for key, value in list(kind.items(item)):
            if id(key) not in own and not lives(type(value)):
                kind.__delitem__(item, key)
        for key, value in zip(self.keys, self.values, strict=True):
            now = kind.get(item, key, ABSENT)
            if now is not value and not (id(now) in new and lives(type(now))):
                kind.__setitem__(item, key, value)
        if not all(map(is_, kind.__iter__(item), self.keys)):  # in another order, which an optimizer's groups may feel
            others = [(key, value) for key, value in kind.items(item) if id(key) not in own]
            ours = [(key, kind.__getitem__(item, key)) for key in self.keys]
            kind.clear(item)
            kind.update(item, [*ours, *others])

    def _new_values(self) -> dict[int, type]:
        """Types of values that were not there, by identity."""
        was = {id(value) for value in self.values}
        return {id(value): type(value) for value in list(self.kind.values(self.item)) if id(value) not in was}


class AttributesState(DictState):
    """The attributes of an object by its `__dict__`, and its class, which a parametrization exchanges.

    Args:
        owner: The object.
        may_own: Whether it stays under our control even if it starts threads.
    """

    __slots__ = ("cls", "may_own", "owner")

    def __init__(self, owner: Any, *, may_own: bool) -> None:
        self.item = item = object.__getattribute__(owner, "__dict__")
        self.kind, self.keys, self.values = dict, list(item), list(item.values())
        self.owner, self.cls, self.may_own = owner, type(owner), may_own

    def is_same(self) -> bool:
        """By identity."""
        is_its_own = object.__getattribute__(self.owner, "__dict__") is self.item  # a hook may exchange all of them
        return is_its_own and type(self.owner) is self.cls and super().is_same()

    def put_back(self) -> None:
        """As of any mapping, and the class."""
        if not self.may_own and any(map(works, self._new_values().values())):
            return  # a thread was started: the other attributes are its own by now
        if type(self.owner) is not self.cls:
            object.__setattr__(self.owner, "__class__", self.cls)
        if object.__getattribute__(self.owner, "__dict__") is not self.item:
            object.__setattr__(self.owner, "__dict__", self.item)
        super().put_back()


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
