"""Callbacks that hear of no validation, and loggers that keep nothing, while remaining the objects that they are.

What a hook finds in the Trainer, or has held since the start, is the user's own object, with its paths, its version and
its type; only the methods that would record something do nothing, in this thread, for a while. This module knows
Lightning's callbacks and loggers, and clients of trackers by the verbs in their methods' names. It knows no evaluation.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any

# what methods that record something begin with, in Lightning's loggers and in the clients beneath them
_WRITES = (
    "add", "after_save", "alert", "append", "assign", "close", "create", "define", "delete", "display", "emit",
    "end", "finalize", "finish", "histogram", "image", "line", "link", "log", "mark", "plot", "pop", "publish",
    "push", "put", "record", "remove", "report", "save", "scatter", "send", "set", "stop", "text", "track",
    "unwatch", "update", "upload", "upsert", "use_", "watch", "write",
)  # fmt: skip
_MODULES = ("wandb", "mlflow")  # whose functions act on the current run


class Nothing:
    """What a muted method returns: it can be called, waited for, indexed and entered like what it stands for."""

    def __call__(self, *_: Any, **__: Any) -> "Nothing":
        """Nothing again."""
        return self

    def __getattr__(self, name: str) -> "Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    __getitem__ = __enter__ = __call__

    def __setitem__(self, *_: Any) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False


@contextmanager
def muted(callbacks: list[Any], loggers: list[Any]) -> Iterator[None]:
    """No callback hears of validation, and no logger, client or writer of theirs keeps anything from this thread."""
    with ExitStack() as stack:
        for callback in callbacks:
            hooks = [name for name in dir(type(callback)) if name.startswith("on_validation")]
            stack.enter_context(_attributes(callback, dict.fromkeys(hooks, _ignored)))
        for item in [*loggers, *filter(None, map(_experiment, loggers)), *filter(None, map(sys.modules.get, _MODULES))]:
            stack.enter_context(_silent(item))
        yield


def _ignored(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _attributes(item: Any, values: dict[str, Any]) -> Iterator[None]:
    """Attributes of the object itself, past what its class makes of setting them."""
    own = object.__getattribute__(item, "__dict__")
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name, value in values.items():
            if own.get(name) is value:
                del own[name]
        own.update(before)


@contextmanager
def _silent(item: Any) -> Iterator[None]:
    with ExitStack() as stack:
        own = getattr(item, "__dict__", None)
        if type(own) is dict:
            names = {name for name, value in own.items() if _is_writing(name) and callable(value)}
            kind: Any = type(item)
            names |= _writing_methods(kind) if kind is not ModuleType else set()
            stack.enter_context(_attributes(item, {name: _in_other_threads(item, name) for name in names}))
        if hasattr(type(item), "__setitem__"):  # Neptune's run["loss"].append(1.0)
            stack.enter_context(_of_class(item, ("__setitem__", "__getitem__")))
        summary = getattr(item, "summary", None)
        if hasattr(type(summary), "__setitem__"):  # W&B's run.summary["best"] = 1.0
            stack.enter_context(_of_class(summary, ("__setitem__", "__setattr__", "update")))
        yield


def _in_other_threads(item: Any, name: str) -> Callable[..., Any]:
    """A method that works for a thread of the user's that records something else meanwhile, and for nobody here."""
    method, here = getattr(item, name), threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return Nothing() if threading.get_ident() == here else method(*args, **kwargs)

    return call


@contextmanager
def _of_class(item: Any, names: tuple[str, ...]) -> Iterator[None]:
    """Methods of these names do nothing. Special ones are looked up in the class, so the object gets another."""
    kind: Any = type(item)
    here = threading.get_ident()

    def ignoring(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return Nothing() if threading.get_ident() == here else getattr(kind, name)(self, *args, **kwargs)

        return call

    methods = {"__slots__": (), **{name: ignoring(name) for name in names}}
    with suppress(TypeError):  # a class of C cannot be exchanged
        object.__setattr__(item, "__class__", type(kind)(kind.__name__, (kind,), methods))  # past W&B's own setting
    try:
        yield
    finally:
        if type(item) is not kind:
            object.__setattr__(item, "__class__", kind)


def _experiment(logger: Any) -> Any:
    # made if it is not there yet: else a hook would make it, and the record of this merge is about to
    with suppress(Exception):
        return getattr(logger, "experiment", None)
    return None


@lru_cache(maxsize=256)
def _writing_methods(kind: Any) -> set[str]:
    static = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
    kinds = (FunctionType, staticmethod, classmethod)
    return {name for name, value in static.items() if _is_writing(name) and isinstance(value, kinds)}


def _is_writing(name: str) -> bool:
    return name.startswith(_WRITES)
