"""Objects as users have them, moved by a hook and put back."""

from collections.abc import Callable
from typing import Any

from pretrain_merge.evaluation.memento import Memento
from pretrain_merge.runtime.log import WarnOnce


def kept(item: Any, move: Callable[[Any], object], **options: Any) -> Memento:
    """The memento of an object that was moved and put back, twice."""
    memento = Memento({"module": item}, notices=WarnOnce(), **options)
    for _ in range(2):
        move(item)
        memento.put_back()
    return memento


class Plain:
    """An object of the user's."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def put(item: Any, name: str) -> Callable[..., None]:
    return lambda value: setattr(item, name, value)
