"""What each type of object refers to, and which state of it is kept: one function a type, for a `Memento` to call.

This module knows the insides of containers and attributes; those of functions and classes are `code`'s. It has no
bounds and writes nothing.
"""

import gc
import itertools
import threading
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import count, islice
from types import FunctionType, MappingProxyType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from pretrain_merge.evaluation.memento import kinds, names, states
from pretrain_merge.evaluation.memento.code import enter_class, enter_function
from pretrain_merge.evaluation.memento.kinds import VALUES
from pretrain_merge.evaluation.memento.memory import BufferState, BytesState
from pretrain_merge.evaluation.memento.positions import (
    LOOKED_AT,
    CacheState,
    CountState,
    GeneratorState,
    IterationState,
    IteratorState,
    OwnState,
    blocks_of_table,
    does_not_tell,
    draws,
)
from pretrain_merge.evaluation.memento.tensors import PLAIN, TensorState
from pretrain_merge.parameters.shards import local_part

if TYPE_CHECKING:
    from pretrain_merge.evaluation.memento.memento import Memento

_SHORT = frozenset({list, tuple, dict})
_FEW = 8  # workers are looked for among so many items of an attribute


@lru_cache(maxsize=4096)
def enter_for(cls: Any) -> "_Enter":
    """What keeps the state of objects of a type, and lets the memento search what they refer to."""
    # exact types first: nine of ten objects are dictionaries, lists and tensors
    known = _ENTER.get(cls)
    if known is not None:
        return known
    if issubclass(cls, type):
        return enter_class
    # before the rest: a generator's place is not in its attributes
    if draws(cls):
        return _enter_generator
    if kinds.is_shared_memory(cls) or issubclass(cls, bytearray | array):
        return _enter_bytes
    if kinds.is_buffer(cls):
        return _enter_buffer
    if kinds.is_table(cls):
        return _enter_table
    if issubclass(cls, threading.local):
        return _enter_local
    if not kinds.kind_of(cls).is_state:
        return _enter_nothing
    by_base: dict[Any, _Enter] = {
        Tensor: _enter_tensor, np.ndarray: _enter_array, tuple: _enter_tuple, frozenset: _enter_tuple,
        defaultdict: _enter_defaultdict, OrderedDict: _enter_ordered, dict: _enter_dict, list: _enter_list,
        set: _enter_set, deque: _enter_deque,
    }  # fmt: skip
    chosen = next((function for base, function in by_base.items() if issubclass(cls, base)), None)
    if chosen is None and (account := kinds.own_account(cls)):
        chosen = partial(_enter_itself, account)
    if chosen is None:
        return _enter_object

    def enter_both(memento: "Memento", index: int, item: Any) -> None:
        if _enter_object(memento, index, item):
            chosen(memento, index, item)

    return enter_both


def _enter_nothing(memento: "Memento", index: int, item: Any) -> None:
    pass


def _enter_list(memento: "Memento", index: int, item: Any, kind: Any = list) -> None:
    state = states.ListState(item, kind)
    if memento.items(index, state.items):
        memento.add(index, state)


def _enter_deque(memento: "Memento", index: int, item: Any) -> None:
    _enter_list(memento, index, item, deque)


def _enter_set(memento: "Memento", index: int, item: Any) -> None:
    state = states.SetState(item)
    if memento.items(index, state.items):
        memento.add(index, state)


def _enter_dict(memento: "Memento", index: int, item: Any, kind: Any = dict) -> None:
    state = states.DictState(item, kind)
    # keys, too: a user's object that serves as one may hold a counter
    are_texts = kinds.TEXT.issuperset(map(type, state.keys))
    if memento.items(index, state.values if are_texts else [*state.values, *state.keys]):
        memento.add(index, state)


def _enter_ordered(memento: "Memento", index: int, item: Any) -> None:
    _enter_dict(memento, index, item, OrderedDict)


def _enter_defaultdict(memento: "Memento", index: int, item: Any) -> None:
    state = states.FactoryState(item)
    memento.add(index, state)
    memento.reach(index, [state.factory])
    _enter_dict(memento, index, item)


def _enter_tuple(memento: "Memento", index: int, item: Any) -> None:
    memento.items(index, list(item))


def _enter_proxy(memento: "Memento", index: int, item: Any) -> None:
    memento.items(index, list(item.values()))


def _enter_generator(memento: "Memento", index: int, item: Any) -> None:
    memento.add(index, GeneratorState(item))
    _enter_object(memento, index, item)


def _enter_bytes(memento: "Memento", index: int, item: Any) -> None:
    memento.add(index, BytesState(item))
    _enter_object(memento, index, item)


def _enter_buffer(memento: "Memento", index: int, item: Any) -> None:
    memento.add(index, BufferState(item))
    _enter_object(memento, index, item)


def _enter_table(memento: "Memento", index: int, item: Any) -> None:
    memento.add(index, CountState(item))
    # numbers are put back where they lie; columns and rows that are new are said
    values = (block.values for block in blocks_of_table(item))
    memento.reach(index, [array for array in values if type(array) is np.ndarray and not array.dtype.hasobject])


def _enter_itself(account: Any, memento: "Memento", index: int, item: Any) -> None:
    state = OwnState(item, account)
    memento.add(index, state)
    said = state.said
    memento.reach(index, said.values() if isinstance(said, dict) else said)


def _enter_local(memento: "Memento", index: int, item: Any) -> None:
    # this thread's part: it is the one that runs hooks
    memento.reach(index, [threading.local.__getattribute__(item, "__dict__")])


def _enter_storage(memento: "Memento", index: int, item: Any) -> None:
    memento.reach(index, [torch.empty(0, dtype=torch.uint8, device=item.device).set_(item)])


def _enter_array(memento: "Memento", index: int, item: Any) -> None:
    if item.dtype.hasobject:
        state = states.ObjectsState(item)
        if memento.items(index, state.items):
            memento.add(index, state)
    elif item.flags.writeable and not issubclass(type(item), np.memmap):
        memento.add(index, BytesState(item))


def _enter_tensor(memento: "Memento", index: int, item: Any) -> None:
    # without memory there is nothing to copy, and to ask for its place raises
    if item.is_meta or is_lazy(item):
        return
    is_plain = type(item) in PLAIN
    # by memory and not by identity: `parameter.data` and views of it are other objects
    is_merged = place_of(item) in memento.merged
    is_sharded = not is_plain and isinstance(item, DTensor)
    state = TensorState(item, has_values=not is_merged and not is_sharded)
    memento.add(index, state)
    if is_sharded:
        memento.reach(index, [item._local_tensor])
    if any(state.hooks):
        memento.reach(index, state.hooks)
    if item.grad_fn is None and item.grad is not None and not is_merged:  # gradients of merged ones are out of reach
        # of a tensor inside a graph torch warns when it is asked for a gradient
        memento.reach(index, [item.grad])


def place_of(tensor: Tensor) -> Any:
    """The memory of a tensor on this rank, by which it is told from others."""
    local = tensor if type(tensor) in PLAIN else local_part(tensor)
    # an empty tensor's place is 0, which all empty ones share
    return local.untyped_storage().data_ptr() if local.layout == torch.strided and local.numel() else id(tensor)


def _enter_parameter(memento: "Memento", index: int, item: Any) -> None:
    _enter_tensor(memento, index, item)
    # attributes that a user gave it: mostly none, which costs no state
    memento.reach(index, [object.__getattribute__(item, "__dict__")])


def _enter_object(memento: "Memento", index: int, item: Any) -> bool:
    """Attributes of `__dict__` and `__slots__`, past whatever the class makes of getting and setting them.

    Whether the object is ours to keep: not if something works in it while we evaluate.
    """
    cls: Any = type(item)
    kind = kinds.kind_of(cls)
    if not kind.is_state:
        return False
    found: list[Any] = [states.AttributesState(item, may_own=kind.may_own)] if kind.has_dict else []
    if kind.is_script:  # its tensors and attributes are kept outside of Python
        found.append(names.PlacesState(item, item._concrete_type.get_attributes(), getattr, setattr))
    if kind.slots:
        found.append(names.slots_state(item, kind.slots))
    # values are sorted out here, once for what follows: they are nine of ten attributes
    values = [value for state in found for value in state.values if type(value) not in VALUES]
    # half of it would be put back under a thread that writes the other half
    if values and not kind.may_own and (worker := _worker_in(values)):
        if kind.is_said:
            memento.leave(index, f"owns a {worker}")
        return False
    for state in found:
        memento.add(index, state)
    if values:
        memento.reach(index, values)
    # counters that hooks keep in class attributes: only of the user's own classes
    if kind.is_users:
        memento.reach(index, [type(item)])
    return True


def _worker_in(values: Iterable[Any], *, is_nested: bool = False) -> str | None:
    """The name of what runs beside us, among attributes or in a short list that is one of them."""
    for value in values:  # not a function for each: an object has a dozen, and nearly all are values
        kind: Any = type(value)
        if kind in VALUES:
            continue
        if kind in _SHORT and not is_nested:
            few = islice(value.values() if kind is dict else value, _FEW)
            if value and (worker := _worker_in(few, is_nested=True)):
                return worker
        elif kinds.kind_of(kind).works:
            return str(kind.__name__)
    return None


def _enter_simple(memento: "Memento", index: int, item: Any) -> None:
    state, referred = _SIMPLE[type(item)]
    if state is IterationState and does_not_tell(item):
        memento.leave(index, f"Python does not tell how far a {type(item).__name__} is")
    if state is not None:
        memento.add(index, state(item))
    memento.reach(index, referred(item))


def _reduced(iterator: Any) -> Any:
    return iterator.__reduce__()[1]


def _nothing(_: Any) -> tuple[Any, ...]:
    return ()


_PARTS = ("__func__", "fget", "fset", "fdel")  # of a descriptor
_SIMPLE: dict[type, tuple[Callable[[Any], states.State] | None, Callable[[Any], Iterable[Any]]]] = {
    MethodType: (None, lambda item: (item.__self__, item.__func__)),
    partial: (None, lambda item: (item.func, *item.args, item.keywords)),
    ReferenceType: (None, lambda item: (item(),)),
    memoryview: (None, lambda item: (item.obj,)),
    **dict.fromkeys(
        (property, staticmethod, classmethod),
        (None, lambda item: [getattr(item, name) for name in _PARTS if hasattr(item, name)]),
    ),
    type(lru_cache(len)): (CacheState, lambda item: (item.__wrapped__,)),
    **dict.fromkeys(
        map(type, ([].__iter__(), reversed([]), ().__iter__(), iter(range(0)), iter(""), iter(b""))),
        (IteratorState, _reduced),
    ),
    # what has no position but that of what it goes through
    **dict.fromkeys((zip, map, filter), (None, _reduced)),
    **dict.fromkeys(map(type, (iter({}), iter({}.values()), iter({}.items()))), (CountState, _nothing)),
    **dict.fromkeys(map(type, (iter(set()), iter(deque()), reversed(deque()))), (CountState, _nothing)),
    **dict.fromkeys((count, itertools.repeat, *LOOKED_AT), (CountState, _nothing)),
    enumerate: (CountState, _reduced),
    # a function that is called until it returns a certain value has no position; what it holds may
    type(iter(int, 0)): (None, _reduced),
    type(itertools.tee(())[0]): (IterationState, _nothing),
    **dict.fromkeys(
        (
            itertools.accumulate,
            itertools.chain,
            itertools.combinations,
            itertools.combinations_with_replacement,
            itertools.compress,
            itertools.dropwhile,
            itertools.filterfalse,
            itertools.groupby,
            itertools.islice,
            itertools.pairwise,
            itertools.permutations,
            itertools.product,
            itertools.starmap,
            itertools.takewhile,
            itertools.zip_longest,
        ),
        (IterationState, gc.get_referents),
    ),
}
_Enter = Callable[["Memento", int, Any], object]
_ENTER: dict[type, _Enter] = {
    list: _enter_list,
    dict: _enter_dict,
    tuple: _enter_tuple,
    frozenset: _enter_tuple,
    MappingProxyType: _enter_proxy,
    **dict.fromkeys(_SIMPLE, _enter_simple),
    FunctionType: enter_function,
    defaultdict: _enter_defaultdict,
    type: enter_class,
    deque: _enter_deque,
    set: _enter_set,
    OrderedDict: _enter_ordered,
    Tensor: _enter_parameter,
    DTensor: _enter_tensor,
    torch.nn.Parameter: _enter_parameter,
    np.ndarray: _enter_array,
    torch.UntypedStorage: _enter_storage,
}
