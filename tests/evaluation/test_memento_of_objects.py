"""What hooks change in a run's objects, of every kind, is put back in place."""

import array
import collections
import dataclasses
import enum
import functools
import multiprocessing
import random
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.moved_objects import Plain, kept, put
from harness.models import same_bits
from torch import Tensor, nn

from pretrain_merge.evaluation.memento import Memento
from pretrain_merge.runtime.log import WarnOnce

LEVEL = 1
SHARED = types.SimpleNamespace(level=1)
_HERE = sys.modules[__name__]


class Slotted:
    __slots__ = ("later", "level")

    def __init__(self) -> None:
        self.level = 1


@dataclasses.dataclass
class Curriculum:
    level: int = 1
    history: list[int] = dataclasses.field(default_factory=list)


class Stage(enum.Enum):
    LATE = 1

    def __init__(self, _: int) -> None:
        self.hits = 0


class Levels(list):
    """A list with attributes."""


class OnItsClass:
    level = 1
    history: list[int] = []  # noqa: RUF012 - shared by all instances, as in the wild

    def move(self) -> None:
        type(self).level += 1
        self.history.append(1)

    @staticmethod
    def move_globals(_: Any) -> None:
        global LEVEL, NEW_LEVEL
        LEVEL += 1
        NEW_LEVEL = 1
        SHARED.level += 1
        _bump()


def _bump() -> None:
    SHARED.extra = 3


def _closure() -> Callable[[], int]:
    level, others = 1, Curriculum()

    def move() -> int:
        nonlocal level
        level += 1
        others.level += 1
        return level + others.level

    return move


# what is held, how a hook moves it, and what must be as before
CONTAINERS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], Any]]] = {
    "list": (lambda: [1, 2], lambda x: x.reverse(), list),
    "list of lists": (lambda: [[1], [2]], lambda x: x[0].append(3), str),
    "list with attributes": (
        lambda: Levels([1]),
        lambda x: (x.append(1), put(x, "level")(1)),
        lambda x: (x, vars(x)),
    ),
    "dict": (lambda: {"a": 1}, lambda x: x.update(a=2, b=3), dict),
    "order of a dict": (lambda: {"a": 1, "b": 2}, lambda x: x.update(a=x.pop("a")), list),
    "OrderedDict": (lambda: collections.OrderedDict(a=1, b=2), lambda x: x.move_to_end("a"), list),
    "defaultdict": (lambda: collections.defaultdict(list), lambda x: x["a"].append(1), dict),
    "factory of a defaultdict": (
        lambda: collections.defaultdict(int),
        lambda x: put(x, "default_factory")(str),
        repr,
    ),
    "Counter": (lambda: collections.Counter("ab"), lambda x: x.update("a"), dict),
    "UserDict": (lambda: collections.UserDict(a=1), lambda x: x.update(a=2), dict),
    "set": (lambda: {1, 2}, lambda x: x.add(3), set),
    "deque": (lambda: collections.deque([1, 2], maxlen=2), lambda x: x.append(3), list),
    "bytearray": (lambda: bytearray(b"ab"), lambda x: x.extend(b"c"), bytes),
    "array": (lambda: array.array("i", [1, 2]), lambda x: x.append(3), list),
    "ndarray": (lambda: np.array([0.0, -0.0, np.nan]), lambda x: x.__iadd__(1), lambda x: x.tobytes()),
    "strided ndarray": (lambda: np.arange(6).reshape(2, 3).T, lambda x: x.__iadd__(1), lambda x: x.tobytes()),
    "ndarray of objects": (lambda: np.array([{}, None]), lambda x: x.__setitem__(1, 3), repr),
    "object": (lambda: Plain(level=1), lambda x: (put(x, "level")(2), put(x, "new")(2)), lambda x: dict(vars(x))),
    "dataclass": (Curriculum, lambda x: (x.history.append(1), put(x, "level")(2)), repr),
    "slots": (
        Slotted,
        lambda x: (put(x, "level")(2), put(x, "later")(2)),
        lambda x: (x.level, hasattr(x, "later")),
    ),
    "member of an enumeration": (
        lambda: Stage.LATE,
        lambda x: (put(x, "hits")(2), put(x, "new")(2)),
        lambda x: (x.hits, hasattr(x, "new")),
    ),
    "namespace": (lambda: types.SimpleNamespace(a=1), lambda x: put(x, "a")(2), repr),
    "class": (OnItsClass, lambda x: x.move(), lambda x: (type(x).level, x.history)),
    "globals": (
        OnItsClass,
        lambda x: x.move_globals(x),
        lambda x: (LEVEL, hasattr(_HERE, "NEW_LEVEL"), repr(SHARED)),
    ),
    "closure": (_closure, lambda x: x(), lambda x: next(cell.cell_contents for cell in x.__closure__)),
    "attribute of a function": (lambda: _function(), lambda x: put(x, "calls")(2), lambda x: x.calls),
    "tuple": (lambda: ([1], [2]), lambda x: x[0].append(1), str),
    "weak reference": (lambda: [(c := Curriculum()), weakref.ref(c)][::-1], lambda x: put(x[0](), "level")(3), repr),
    "iterator": (lambda: iter([1, 2, 3]), lambda x: next(x), lambda x: x.__reduce__()),
    "iterator backwards": (lambda: reversed([1, 2, 3]), lambda x: next(x), lambda x: x.__reduce__()),
    "zip": (
        lambda: zip([1, 2], [3, 4], strict=True),
        lambda x: next(x),
        lambda x: str(x.__reduce__()[1][0].__reduce__()),
    ),
    "weak keys": (lambda: _weak_keys(), lambda x: x[0].update({x[1]: 2}), lambda x: x[0][x[1]]),
    "results that are remembered": (lambda: _remembering(), lambda x: x(2), lambda x: x.cache_info().currsize),
    "new attribute of a class": (
        lambda: _class_of_its_own(),
        lambda x: (put(type(x), "later")(1), put(type(x), "level")(2)),
        lambda x: (hasattr(x, "later"), x.level),
    ),
    "class of an object": (Curriculum, lambda x: put(x, "__class__")(Plain), lambda x: (type(x), x.level)),
    "hook on a gradient": (
        lambda: nn.Parameter(torch.ones(1)),
        lambda x: (x.register_hook(_refuse), x.register_post_accumulate_grad_hook(_refuse)),
        lambda x: ((2 * x).sum().backward(), x.grad.item(), put(x, "grad")(None))[1],
    ),
    "scripted module": (
        lambda: torch.jit.script(_Counting()),
        lambda x: x(torch.ones(1)),
        lambda x: (x.number, x.total.item()),
    ),
    "value of processes": (lambda: multiprocessing.Value("i", 1), lambda x: put(x, "value")(2), lambda x: x.value),
    "random.Random": (lambda: random.Random(1), lambda x: x.random(), lambda x: x.getstate()),
    "default_rng": (lambda: np.random.default_rng(1), lambda x: x.normal(), lambda x: str(x.bit_generator.state)),
    "RandomState": (lambda: np.random.RandomState(1), lambda x: x.rand(), lambda x: str(x.get_state())),
    "bit generator": (lambda: np.random.PCG64(1), lambda x: x.random_raw(), lambda x: str(x.state)),
    "Generator": (lambda: torch.Generator(), lambda x: torch.rand(1, generator=x), lambda x: x.get_state()),
    "scalar": (lambda: Plain(best=np.float64(1)), lambda x: put(x, "best")(np.float64(2)), lambda x: x.best),
    "distribution": (lambda: torch.distributions.Normal(0.0, 1.0), lambda x: x.loc.add_(1), lambda x: x.loc.item()),
    "averages": (lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1)), lambda x: x.n_averaged.add_(1), repr),
}


def _weak_keys() -> tuple[Any, ...]:
    key, weak = Plain(), weakref.WeakKeyDictionary()
    weak[key] = 1
    return weak, key


def _remembering() -> Callable[[int], int]:
    @functools.lru_cache
    def double(x: int) -> int:
        return 2 * x

    return double


def _class_of_its_own() -> Any:
    class Own(Plain):
        level = 1

    return Own()


def _refuse(*_: Any) -> None:
    raise AssertionError("a hook that was put back is called")


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        self.total += 1
        self.number += 1
        return x


def _function() -> Callable[[], None]:
    def hook() -> None: ...

    hook.calls = 1
    return hook


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("kind", CONTAINERS)
def test_whatever_a_hook_reaches_is_put_back_in_place(kind):
    make, move, see = CONTAINERS[kind]
    module = nn.Linear(2, 2)
    module.held = make()
    held, before = module.held, see(module.held)
    kept(module, lambda module: move(module.held))
    assert module.held is held
    assert same_bits(see(held), before)


class Hostile:
    """Everything that it is asked raises."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("asked")

    __getattr__ = __getattribute__ = __setattr__ = __eq__ = __bool__ = __len__ = __iter__ = __repr__ = _refuse
    __class__ = property(_refuse)
    __hash__ = object.__hash__


def test_no_object_is_asked_anything():
    hostile = Hostile()
    attributes = object.__getattribute__(hostile, "__dict__")
    attributes["level"] = 1
    module = nn.Module()
    module.held = {"a": hostile, "b": [hostile]}
    kept(module, lambda module: attributes.update(level=2))
    assert attributes == {"level": 1}


def test_what_did_not_change_is_not_written(monkeypatch):
    class Noticing(dict):
        def __setitem__(self, key: Any, value: Any) -> None:
            raise AssertionError("written")

        clear = update = __delitem__ = __setitem__

    module = nn.Linear(2, 2)
    module.held = Noticing(a=1)
    monkeypatch.setattr("pretrain_merge.parameters.bits.write_back", lambda *_: pytest.fail("written"))
    kept(module, lambda module: None)


def test_two_roots_that_share_an_object_keep_it_once():
    shared = Curriculum()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + shared.level))
    memento = Memento({"optimizer": optimizer, "scheduler": scheduler}, notices=WarnOnce())
    shared.level = 7
    optimizer.param_groups[0]["betas"] = 3
    optimizer.step()
    scheduler.step()
    memento.put_back()
    assert (shared.level, scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (1, 0, 0.5)
    assert "betas" not in optimizer.param_groups[0]


def test_attributes_that_were_exchanged_all_at_once_are_the_same_dictionary_again() -> None:
    item = Plain(level=1)
    attributes = vars(item)

    def exchange(item: Any) -> None:
        item.__dict__ = {"level": 2}

    kept(item, exchange)
    assert vars(item) is attributes
    assert attributes == {"level": 1}


@pytest.mark.parametrize("place", [0, 31, 32, 69])
def test_one_of_many_mappings_is_found_whichever_it_is_and_however_it_changed(place: int) -> None:
    items = [{"a": index, "b": [index]} for index in range(70)]
    before = [list(item.items()) for item in items]

    def grow(items: Any) -> None:
        items[place]["c"] = None

    def rename(items: Any) -> None:  # the same values in the same order
        items[place]["z"] = items[place].pop("b")

    def shift(items: Any) -> None:  # what leaves the end of one stands at the beginning of the next
        value = items[place].pop("b")
        following = items[(place + 1) % len(items)]
        values = [value, *following.values()]
        following.clear()
        following.update(zip("bac", values, strict=True))

    for move in (grow, rename, shift):
        kept(items, move)
        assert [list(item.items()) for item in items] == before


def grown(pool):
    """Adds to a set what takes its table beyond its size, and takes it away."""
    new = set(range(1000, 1050))
    pool |= new
    pool -= new


def test_a_set_whose_items_came_back_in_another_order_is_said_to_have_changed(caplog):
    module = nn.Module()
    module.pool = {8 * number for number in range(7, 0, -1)} | {3}
    before = list(module.pool)
    kept(module, lambda module: grown(module.pool))
    assert module.pool == set(before)
    assert bool(caplog.messages) == (list(module.pool) != before)
    caplog.clear()
    module.pool = set(range(5))
    kept(module, lambda module: module.pool.remove(3))
    assert list(module.pool) == list(range(5))
    assert not caplog.messages
