"""Wrapping a method of somebody else's object, so that it can be given back in any order.

Two callbacks of one Trainer end in the order in which they began, so the first must be able to take its wrapper away
from under the second's: a stack of replaced attributes would leave it there for ever (twelve fits, 24 wrappers).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

Layer = Callable[..., Any]


class _Layered:
    """A method of an object, and what goes around it.

    Attributes:
        layers: The innermost first.
        own: What the object itself had under the name; None where its class has the method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._method: Callable[..., Any] = getattr(owner, name)
        self.own = vars(owner).get(name)
        self.layers: list[Layer] = []
        update_wrapper(self, self._method, updated=())

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        call = self._method
        for layer in self.layers:
            call = partial(layer, call)
        return call(*arguments, **options)


@contextmanager
def wrapped(owner: Any, name: str, layer: Layer) -> Iterator[None]:
    """A method of an object goes through a layer until the block ends.

    Args:
        owner: The object.
        name: Of the method.
        layer: Called with the method that it wraps, and the method's own arguments.
    """
    now = vars(owner).get(name)
    layered = now if isinstance(now, _Layered) else _Layered(owner, name)
    layered.layers.append(layer)
    setattr(owner, name, layered)
    try:
        yield
    finally:
        layered.layers.remove(layer)
        # else another callback needs it still, or somebody wrapped it since
        if not layered.layers and vars(owner).get(name) is layered:
            delattr(owner, name)
            if layered.own is not None:
                setattr(owner, name, layered.own)
