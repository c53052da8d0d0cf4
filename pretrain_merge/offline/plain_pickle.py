"""Pickles of other programs, read as plain data: no name of theirs is imported, and nothing of theirs is called.

What runs is the standard library's unpickler in Python, with the operations that plain data need and no others. A name
becomes the stand-in that the caller's closed list has for it, or is an error. This module knows pickles. It knows no
tensors and no checkpoints.
"""

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

# protocols 2 to 5, as far as plain data go. LONG4 and BYTEARRAY8 are not among them: they are long without need, and
# set memory aside for whatever length a file says
_OPERATIONS = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
    "BINPERSID", "GLOBAL", "STACK_GLOBAL", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "EMPTY_DICT",
)  # fmt: skip
_MODERN = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # protocol 2 keeps names of Python 2
_LONGEST_NAME = 200  # in a message
_LONGEST_KEY = 64  # items of a tuple, bits of a number


_passed_over: set[str] = set()

Persistent: TypeAlias = Callable[[Any], Any]


class NotPlainError(ValueError):
    """A name that is not in the list; whoever knows the file says of which.

    Attributes:
        path: The name.
    """

    def __init__(self, path: str) -> None:
        self.path = path[:_LONGEST_NAME]
        super().__init__(f"it names {self.path}, which is not run.")


@dataclass(frozen=True, eq=False)
class Name:
    """Stands for a class or function.

    Attributes:
        path: Its own name, with its module.
        make: What a call of it gives.
    """

    path: str
    make: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Inert:
    """Stands for an object that nobody needs; whatever is put into it is dropped.

    Attributes:
        path: The name of its class.
    """

    path: str


class Record:
    """Stands for an object of which attributes are needed, and nothing else."""

    def __init__(self, *_: Any) -> None:
        pass


def inert(path: str) -> Name:
    """A name whose objects nobody needs."""
    return Name(path, lambda *_: Inert(path))


def load(pickled: bytes, names: Mapping[str, Any], persistent: Persistent | None = None) -> Any:
    """The object in a pickle.

    Args:
        pickled: Believed in nothing.
        names: What stands for each name that may be in it: a `Name`, or a value.
        persistent: What stands for an object outside of it, by its key; None: there may be none.

    Raises:
        NotPlainError: It names something else.
        Exception: Any other, where it is damaged.
    """
    return _Unpickler(pickled, names, persistent).load()


def pass_over(paths: Iterable[str]) -> None:
    """Let names that the user trusts through, for the rest of the process: nothing is imported, nothing made."""
    _passed_over.update(paths)


def _allowed_by_user(path: str) -> bool:
    """Whether the process said so, or `torch.serialization.add_safe_globals`, which needs torch to be loaded."""
    if path in _passed_over:
        return True
    if "torch" not in sys.modules:
        return False
    from torch.serialization import get_safe_globals

    return path in (
        item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in get_safe_globals()
    )


# the one in C is faster by half. It takes as much memory as the largest number of its memo says (32 GB for 8 bytes),
# and gives keys to be hashed to dict, where a tuple that is nested a million deep ends the process
class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, pickled: bytes, names: Mapping[str, Any], persistent: Persistent | None) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._names, self._persistent = names, persistent

    def find_class(self, module: str, name: str) -> Any:
        path = f"{_MODERN.get(module, module)}.{name}"
        if path in self._names:
            return self._names[path]
        if _allowed_by_user(path):
            return inert(path)
        raise NotPlainError(path)

    def persistent_load(self, saved: Any) -> Any:
        if self._persistent is None:
            raise ValueError("it refers to objects outside it")
        return self._persistent(saved)

    def _refuse(self) -> None:
        raise ValueError("it has operations that plain data do not need")

    def _call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise ValueError(f"it calls a {type(name).__name__}")
        self.stack.append(name.make(*arguments))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            vars(target).update(state if isinstance(state, dict) else {"state": state})
        # an OrderedDict's are the versions of its modules. Of whatever else is there, attributes are our own
        elif not isinstance(target, Inert | OrderedDict):
            raise ValueError(f"it changes a {type(target).__name__}")

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise ValueError(f"it appends to a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        keys = items[::2]
        for key in keys:
            if type(key) is not str:  # nearly all of them are
                _check_key(key)
        target.update(zip(keys, items[1::2], strict=True))

    def _append_one(self) -> None:
        self._append([self.stack.pop()])

    def _append_marked(self) -> None:
        self._append(self.pop_mark())

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_marked(self) -> None:
        self._set_items(self.pop_mark())

    def _start_set(self) -> None:
        # nobody needs one, and its members would have to be fit to be hashed
        self.stack.append(Inert("builtins.set"))

    def _freeze_set(self) -> None:
        self.pop_mark()
        self.stack.append(Inert("builtins.frozenset"))

    _own: ClassVar[Mapping[str, Callable[["_Unpickler"], None]]] = {
        "REDUCE": _call, "NEWOBJ": _call, "BUILD": _build, "APPEND": _append_one, "APPENDS": _append_marked,
        "SETITEM": _set_one, "SETITEMS": _set_marked, "EMPTY_SET": _start_set, "ADDITEMS": _append_marked,
        "FROZENSET": _freeze_set,
    }  # fmt: skip
    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), _refuse),
        **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPERATIONS},
        **{getattr(pickle, name)[0]: operation for name, operation in _own.items()},
    }


def _check_key(key: Any) -> None:
    """Refuse what takes long to hash: tuples of tuples, that may be one another's; and numbers that all hash alike."""
    items = key if isinstance(key, tuple) else (key,)
    is_short = len(items) <= _LONGEST_KEY and not any(isinstance(item, tuple) for item in items)
    if not is_short or any(isinstance(item, int) and item.bit_length() > _LONGEST_KEY for item in items):
        raise ValueError("it has a key other than a short number, text or tuple")
