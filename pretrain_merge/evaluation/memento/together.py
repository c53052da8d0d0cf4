"""Many states compared by a few calls, since an evaluation leaves nearly all of them as they were.

This module knows the states of plain mappings, of attributes and of plain tensors, and how to ask many at once whether
anything changed. Which of them did, and what is to be done about it, is asked of each state.
"""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import is_
from typing import Any

from pretrain_merge.evaluation.memento.states import AttributesState, DictState, State
from pretrain_merge.evaluation.memento.tensors import Tensors, TensorState

# One of them changes at nearly every pass (the Trainer's own attributes), and then all of its group are asked.
_TOGETHER = 32
# Larger mappings are compared by themselves as fast, and what a group notes of them would be as large as they are.
_LARGE = 1000
_attributes_of: Callable[[Any, str], Any] = object.__getattribute__


class Mappings:
    """States of mappings whose keys and values are compared in one go, without a loop of Python's own.

    Args:
        states: With the index of the object that each is of; of kind `dict` and not large.
    """

    __slots__ = ("_classes", "_dicts", "_keys", "_owned", "_owners", "_sizes", "_values", "states")

    def __init__(self, states: Sequence[tuple[DictState, int]]) -> None:
        self.states: Sequence[tuple[State, int]] = states
        self._dicts = [state.item for state, _ in states]
        self._sizes = [len(state.values) for state, _ in states]
        self._keys = list(chain.from_iterable([state.keys for state, _ in states]))
        self._values = list(chain.from_iterable([state.values for state, _ in states]))
        attributes = [state for state, _ in states if isinstance(state, AttributesState)]
        self._owners = [state.owner for state in attributes]
        self._owned = [state.item for state in attributes]
        self._classes = [state.cls for state in attributes]

    def is_same(self) -> bool:
        """By identity. Sizes come first: what was added at the end of one would shift all that follow."""
        dicts, owners, of_all = self._dicts, self._owners, chain.from_iterable
        return (
            list(map(dict.__len__, dicts)) == self._sizes
            and all(map(is_, of_all(map(dict.values, dicts)), self._values))
            and all(map(is_, of_all(map(dict.__iter__, dicts)), self._keys))
            and all(map(is_, map(_attributes_of, owners, repeat("__dict__")), self._owned))
            and all(map(is_, map(type, owners), self._classes))
        )


def groups_of(states: Sequence[tuple[State, int]]) -> tuple[list[Mappings | Tensors], list[tuple[State, int]]]:
    """Groups of the states that can be asked together, in the order of their objects, and all others."""
    mappings: list[tuple[DictState, int]] = []
    tensors: list[tuple[TensorState, int]] = []
    others: list[tuple[State, int]] = []
    for state, index in states:
        if isinstance(state, DictState) and state.kind is dict and len(state.keys) < _LARGE:
            mappings.append((state, index))
        elif isinstance(state, TensorState) and state.is_plain:
            tensors.append((state, index))
        else:
            others.append((state, index))
    groups = [Mappings(mappings[start : start + _TOGETHER]) for start in range(0, len(mappings), _TOGETHER)]
    return [*groups, *([Tensors(tensors)] if tensors else [])], others
