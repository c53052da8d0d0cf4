"""What code refers to: closures, globals that a function names, a class's own attributes.

This module knows functions and classes, of users only: libraries are not searched. It has no bounds and writes nothing.
"""

from functools import lru_cache
from types import CellType, CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from pretrain_merge.evaluation.memento import kinds, names

if TYPE_CHECKING:
    from pretrain_merge.evaluation.memento.memento import Memento


def enter_function(memento: "Memento", index: int, item: Any) -> None:
    """What a function closes over, its defaults, and the globals that it names, through modules of the user's own."""
    module = item.__globals__.get("__name__") or ""
    # a function of ours, wrapped around a user's: our own state goes on through an evaluation
    if kinds.is_ours(module):
        return
    # searched also for libraries: a decorator of theirs closes over the user's function
    cells = item.__closure__ or ()
    memento.reach(index, [cell.cell_contents for cell in cells if cell != CellType()])
    if kinds.is_library(module):
        return
    memento.reach(index, [*(item.__defaults__ or ()), item.__kwdefaults__, item.__dict__])
    if cells:
        memento.add(index, names.cell_state(cells))
    # only what the code names: a script's globals hold data sets and other models, too
    named = _names(item.__code__)
    # `config.level` names `level`, too, so the same names are looked up in the user's modules that are named
    waiting, met = [item.__globals__], memento.namespaces
    while waiting:
        namespace = waiting.pop()
        known = met.setdefault(id(namespace), (namespace, set()))[1]
        new = named - known
        known |= new
        if not new:
            continue
        state = names.names_state(namespace, sorted(new))
        memento.add(index, state)
        memento.reach(index, state.values)
        modules = (value for value in state.values if isinstance(value, ModuleType))
        waiting += [vars(module) for module in modules if not kinds.is_library(module.__name__)]


def enter_class(memento: "Memento", index: int, item: Any) -> None:
    """What a class and those above it hold."""
    # torch's classes hold registries that every other model of the process uses, and `object` is everybody's
    if kinds.is_library(kinds.module_of(item)):
        return
    state = names.ClassState(item)
    memento.add(index, state)
    memento.reach(index, state.values)
    # and its metaclass, where instances are registered
    memento.reach(index, (type(item), *item.__bases__))


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    # of functions and comprehensions inside, too: they name globals of the same module
    inside = [_names(constant) for constant in code.co_consts if type(constant) is CodeType]
    return frozenset(code.co_names).union(*inside)
