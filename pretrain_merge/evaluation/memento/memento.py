"""What a run's objects were before an evaluation, put back in place after each pass: the graph of objects, not a list.

This module walks the objects that are reachable from a run's parts (module, optimizers, schedulers, data, callbacks,
Trainer), keeps the shallow state of each that can change, and writes back what did. It knows bounds in objects, items
and bytes, and says once what lies beyond them. What is outside Python's objects (files, sockets, services, threads and
what they own) is never rolled back; `kinds` says what that is.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from pretrain_merge.evaluation.memento.blocks import blocks_of
from pretrain_merge.evaluation.memento.graph import enter_for, place_of
from pretrain_merge.evaluation.memento.kinds import VALUES
from pretrain_merge.evaluation.memento.memory import BytesState
from pretrain_merge.evaluation.memento.states import State
from pretrain_merge.evaluation.memento.tensors import TensorState
from pretrain_merge.evaluation.memento.together import groups_of
from pretrain_merge.runtime.log import WarnOnce

MOST_OBJECTS = 100_000
MOST_ITEMS = 10_000  # of one container whose items are searched: rows of a data set lie in larger ones
MOST_REFERENCES = 4_000_000  # in all containers: those of lists that are shuffled in place
MOST_BYTES = 64 << 20

# empty ones need no state: most of a module's dictionaries of hooks are such, and stay so
_PLAIN = frozenset({dict, list, set, OrderedDict})


class Memento:
    """The state of everything that is reachable from some objects, as it is now.

    Args:
        roots: Where the search begins, by the path that messages give.
        merged: Tensors whose values and memory somebody else puts back; they are never copied.
        notices: What the user was told already.
    """

    def __init__(self, roots: Mapping[str, Any], *, merged: Iterable[Tensor] = (), notices: WarnOnce) -> None:
        self._notices = notices
        self._roots = list(roots)
        self.merged = {place_of(tensor) for tensor in merged}
        self._objects: list[Any] = []
        self._parents: list[int] = []
        self._seen: set[int] = set()
        self._states: list[tuple[State, int]] = []
        self._empty: list[Any] = []
        self.namespaces: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self._num_references = 0
        self._left: dict[str, str] = {}
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            # a user's tensor subclass would see every question that is asked of it
            self._walk(list(roots.values()))
            self._keep_memory()
        self._groups, self._others = groups_of(self._states)
        if self._left:
            paths = "; ".join(f"{path} ({why})" for path, why in list(self._left.items())[:5])
            notices.warn(
                "left alone",
                f"while a merge is evaluated, hooks may change these for good, since they are not put back: {paths}. A "
                f"hook that moves them can ask pretrain_merge.is_evaluating_merge() first.",
            )

    @property
    def num_kept(self) -> int:
        """How many objects are put back where they changed."""
        return len(self._states) + len(self._empty)

    def put_back(self) -> None:
        """Write back what changed since."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for container in filter(None, self._empty):
                container.clear()
            changed = (group.states for group in self._groups if not group.is_same())
            for state, index in chain(*changed, self._others):
                if not state.is_same():
                    self._put_back(state, index)
            for block in self._blocks:
                block.put_back()

    def _put_back(self, state: State, index: int) -> None:
        try:
            state.put_back()
        # one that cannot be put back must not keep all others from it
        except Exception as error:
            path = self._path(index)
            self._notices.warn(
                f"not put back: {path}",
                f"{path} was changed by a hook while a merge was evaluated, and stays changed: {error}. The run may "
                f"differ from one without merging; let the hook ask pretrain_merge.is_evaluating_merge() first.",
            )

    def _walk(self, roots: list[Any]) -> None:
        self.reach(-1, roots)
        # it grows meanwhile: breadth first, so that what is far away is what is left
        for index, item in enumerate(self._objects):
            kind: Any = type(item)
            enter_for(kind)(self, index, item)
        del self._seen

    def reach(self, parent: int, items: Iterable[Any]) -> None:
        """Search these objects too, which the one at an index refers to."""
        objects, parents, seen = self._objects, self._parents, self._seen
        for item in items:
            kind = type(item)
            if kind in VALUES:
                continue
            if kind in _PLAIN and not item:
                self._empty.append(item)
                continue
            name = id(item)
            if name in seen:
                continue
            # said and not raised: a run with a large vocabulary in a dictionary trains on
            if len(objects) >= MOST_OBJECTS:
                self.leave(parent, f"beyond the first {MOST_OBJECTS:,} objects", inside=True)
                return
            seen.add(name)
            objects.append(item)
            parents.append(parent)

    def add(self, index: int, state: State) -> None:
        """Keep a state of the object at an index."""
        self._states.append((state, index))

    def leave(self, index: int, why: str, *, inside: bool = False) -> None:
        """Say of the object at an index, or of the rest in it, that it is not put back."""
        if all(why != other for other in self._left.values()) or not inside:
            self._left[self._path(index) + "[…]" * inside] = why

    def items(self, index: int, items: list[Any]) -> bool:
        """Search a container's items; whether the container itself is small enough to be kept."""
        self._num_references += len(items)
        if self._num_references > MOST_REFERENCES:
            self.leave(index, f"{len(items):,} items", inside=True)
            return False
        # short ones are looked at item by item below, which costs no more than this set
        if len(items) > 32 and VALUES.issuperset(set(map(type, items))):
            return True
        if len(items) > MOST_ITEMS:
            self.leave(index, f"{len(items):,} items are not searched", inside=True)
        else:
            self.reach(index, items)
        return True

    def _keep_memory(self) -> None:
        """Copies, smallest first: a run's counters and buffers, and not twice the state of a large optimizer."""
        of_memory = [state for state, _ in self._states if isinstance(state, (BytesState, TensorState))]
        total = 0
        plain: list[TensorState] = []
        # a large one taken first would leave no room for the many small counters
        for state in sorted(of_memory, key=lambda state: state.nbytes):
            total += state.nbytes
            if total <= MOST_BYTES:
                if state.keep() and isinstance(state, TensorState):
                    plain.append(state)
            else:
                state.watch()
        self._blocks = blocks_of(plain)

    def _path(self, index: int) -> str:
        """From a root to an object, as one would write it."""
        if index < 0:
            return ""
        parent = self._parents[index]
        item = self._objects[index]
        if parent < 0:
            return self._roots[index] if index < len(self._roots) else type(item).__name__
        return self._path(parent) + _step(self._objects[parent], item)


def _step(parent: Any, item: Any) -> str:
    kind = type(parent)
    if kind in (list, tuple, deque):
        return next((f"[{place}]" for place, value in enumerate(parent) if value is item), "")
    if issubclass(kind, dict):
        key = next((key for key, value in dict.items(parent) if value is item), "?")
        return f"[{key!r:.40}]" if type(key) in VALUES else "[…]"
    if kind is FunctionType:
        cells = zip(parent.__code__.co_freevars, parent.__closure__ or (), strict=True)
        names = [name for name, cell in cells if cell != CellType() and cell.cell_contents is item]
        return next((f".{name}" for name in names), f".{getattr(item, '__name__', '…')}")
    if issubclass(type(item), type | FunctionType):
        return f".{item.__name__}"
    with suppress(AttributeError):
        attributes = object.__getattribute__(parent, "__dict__")
        return next((f".{name}" for name, value in attributes.items() if value is item), ".…")
    return ".…"
