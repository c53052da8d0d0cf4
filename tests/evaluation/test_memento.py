"""What hooks change in a run's objects is put back in place; what lives by itself is not touched; bounds are said."""

import array
import collections
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import queue
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness.models import same_bits
from torch import Tensor, nn

from pretrain_merge.evaluation.memento import Memento
from pretrain_merge.evaluation.memento import memento as module_under_test
from pretrain_merge.runtime.log import WarnOnce

LEVEL = 1
SHARED = types.SimpleNamespace(level=1)
_HERE = sys.modules[__name__]


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


class Slotted:
    __slots__ = ("later", "level")

    def __init__(self) -> None:
        self.level = 1


@dataclasses.dataclass
class Curriculum:
    level: int = 1
    history: list[int] = dataclasses.field(default_factory=list)


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


def _set(item: Any, name: str) -> Callable[..., None]:
    return lambda value: setattr(item, name, value)


# what is held, how a hook moves it, and what must be as before
CONTAINERS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], Any]]] = {
    "list": (lambda: [1, 2], lambda x: x.reverse(), list),
    "list of lists": (lambda: [[1], [2]], lambda x: x[0].append(3), str),
    "list with attributes": (lambda: Levels([1]), lambda x: (x.append(1), _set(x, "level")(1)), lambda x: (x, vars(x))),
    "dict": (lambda: {"a": 1}, lambda x: x.update(a=2, b=3), dict),
    "order of a dict": (lambda: {"a": 1, "b": 2}, lambda x: x.update(a=x.pop("a")), list),
    "OrderedDict": (lambda: collections.OrderedDict(a=1, b=2), lambda x: x.move_to_end("a"), list),
    "defaultdict": (lambda: collections.defaultdict(list), lambda x: x["a"].append(1), dict),
    "factory of a defaultdict": (lambda: collections.defaultdict(int), lambda x: _set(x, "default_factory")(str), repr),
    "Counter": (lambda: collections.Counter("ab"), lambda x: x.update("a"), dict),
    "UserDict": (lambda: collections.UserDict(a=1), lambda x: x.update(a=2), dict),
    "set": (lambda: {1, 2}, lambda x: x.add(3), set),
    "deque": (lambda: collections.deque([1, 2], maxlen=2), lambda x: x.append(3), list),
    "bytearray": (lambda: bytearray(b"ab"), lambda x: x.extend(b"c"), bytes),
    "array": (lambda: array.array("i", [1, 2]), lambda x: x.append(3), list),
    "ndarray": (lambda: np.array([0.0, -0.0, np.nan]), lambda x: x.__iadd__(1), lambda x: x.tobytes()),
    "strided ndarray": (lambda: np.arange(6).reshape(2, 3).T, lambda x: x.__iadd__(1), lambda x: x.tobytes()),
    "ndarray of objects": (lambda: np.array([{}, None]), lambda x: x.__setitem__(1, 3), repr),
    "object": (lambda: Plain(level=1), lambda x: (_set(x, "level")(2), _set(x, "new")(2)), lambda x: dict(vars(x))),
    "dataclass": (Curriculum, lambda x: (x.history.append(1), _set(x, "level")(2)), repr),
    "slots": (Slotted, lambda x: (_set(x, "level")(2), _set(x, "later")(2)), lambda x: (x.level, hasattr(x, "later"))),
    "namespace": (lambda: types.SimpleNamespace(a=1), lambda x: _set(x, "a")(2), repr),
    "class": (OnItsClass, lambda x: x.move(), lambda x: (type(x).level, x.history)),
    "globals": (
        OnItsClass,
        lambda x: x.move_globals(x),
        lambda x: (LEVEL, hasattr(_HERE, "NEW_LEVEL"), repr(SHARED)),
    ),
    "closure": (_closure, lambda x: x(), lambda x: next(cell.cell_contents for cell in x.__closure__)),
    "attribute of a function": (lambda: _function(), lambda x: _set(x, "calls")(2), lambda x: x.calls),
    "tuple": (lambda: ([1], [2]), lambda x: x[0].append(1), str),
    "weak reference": (lambda: [(c := Curriculum()), weakref.ref(c)][::-1], lambda x: _set(x[0](), "level")(3), repr),
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
        lambda x: (_set(type(x), "later")(1), _set(type(x), "level")(2)),
        lambda x: (hasattr(x, "later"), x.level),
    ),
    "class of an object": (Curriculum, lambda x: _set(x, "__class__")(Plain), lambda x: (type(x), x.level)),
    "hook on a gradient": (
        lambda: nn.Parameter(torch.ones(1)),
        lambda x: (x.register_hook(_refuse), x.register_post_accumulate_grad_hook(_refuse)),
        lambda x: ((2 * x).sum().backward(), x.grad.item(), _set(x, "grad")(None))[1],
    ),
    "scripted module": (
        lambda: torch.jit.script(_Counting()),
        lambda x: x(torch.ones(1)),
        lambda x: (x.number, x.total.item()),
    ),
    "value of processes": (lambda: multiprocessing.Value("i", 1), lambda x: _set(x, "value")(2), lambda x: x.value),
    "random.Random": (lambda: random.Random(1), lambda x: x.random(), lambda x: x.getstate()),
    "default_rng": (lambda: np.random.default_rng(1), lambda x: x.normal(), lambda x: str(x.bit_generator.state)),
    "RandomState": (lambda: np.random.RandomState(1), lambda x: x.rand(), lambda x: str(x.get_state())),
    "bit generator": (lambda: np.random.PCG64(1), lambda x: x.random_raw(), lambda x: str(x.state)),
    "Generator": (lambda: torch.Generator(), lambda x: torch.rand(1, generator=x), lambda x: x.get_state()),
    "scalar": (lambda: Plain(best=np.float64(1)), lambda x: _set(x, "best")(np.float64(2)), lambda x: x.best),
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


def _frozen() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2), requires_grad=False)


TENSORS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], object]]] = {
    "written": (lambda: torch.zeros(2), lambda t: t.add_(1)),
    "written past its version": (_frozen, lambda t: t.data.add_(1)),
    "NaN": (lambda: torch.full((2,), torch.nan), lambda t: t.zero_()),
    "negative zero": (lambda: torch.zeros(2), lambda t: t.neg_()),
    "resized": (lambda: torch.tensor([]), lambda t: t.resize_(4).fill_(1)),
    "of other memory": (_frozen, lambda t: _set(t, "data")(torch.ones(3, dtype=torch.float64))),
    "unfrozen": (_frozen, lambda t: t.requires_grad_(True)),
    "expanded": (lambda: torch.zeros(1).expand(3), lambda t: t[0].add_(1)),
    "sparse": (lambda: torch.eye(2).to_sparse(), lambda t: t._values().add_(1)),
    "csr": (lambda: torch.eye(2).to_sparse_csr(), lambda t: t.values().add_(1)),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), lambda t: t.mul_(1j)),
    "float8": (lambda: torch.ones(2).to(torch.float8_e4m3fn), lambda t: t.view(torch.uint8).zero_()),
    "inference": (lambda: _inferred(), lambda t: t.detach().add_(1)),
}


@torch.inference_mode()
def _inferred() -> Tensor:
    return torch.zeros(2)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_comes_back_by_its_bits_in_its_memory(kind):
    make, move = TENSORS[kind]
    module = nn.Module()
    held = make()
    module.held = [held]
    before = _seen(held)
    kept(module, lambda module: move(module.held[0]))
    assert module.held[0] is held
    assert same_bits(_seen(held), before)


def _seen(tensor: Tensor) -> Any:
    place = tensor.data_ptr() if tensor.layout == torch.strided else None
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach().clone()
    numbers = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return place, tensor.dtype, tuple(tensor.shape), tensor.requires_grad, numbers.to(torch.float32)


def test_a_graph_that_training_holds_can_still_be_walked_backward():
    module = nn.Module()
    module.scale = torch.ones(2)
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * module.scale).sum()
    kept(module, lambda module: module.scale.add_(1))
    loss.backward()
    assert weight.grad.tolist() == [1.0, 1.0]


def free(tensor):
    tensor.untyped_storage().resize_(0)


def released(tensor):
    """What FSDP2 leaves of a parameter that it gathered: all but the memory."""
    free(tensor)
    return tensor


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["copied", "watched"])
def test_p18_a_tensor_whose_memory_was_released_is_left_alone(limit, monkeypatch, caplog):
    monkeypatch.setattr(module_under_test, "MOST_BYTES", limit)
    strided, imaginary = released(torch.ones(6, 4)[1:, ::2]), released(torch.ones(5, dtype=torch.complex64))
    parameter = nn.Parameter(released(torch.ones(3)))
    whole = Plain(gathered=released(torch.ones(300)), view=strided, odd=imaginary, parameter=parameter)
    kept(whole, lambda item: item.gathered.untyped_storage().resize_(1200))
    for tensor in (strided, imaginary, whole.parameter):
        assert tensor.untyped_storage().nbytes() == 0
    assert "not put back" not in caplog.text


@pytest.mark.parametrize("tensor", [torch.arange(6.0), torch.arange(12.0).view(3, 4)[1:, ::2]], ids=["flat", "strided"])
def test_p18_a_tensor_whose_memory_is_released_meanwhile_gets_its_bits_back(tensor):
    before = tensor.clone()
    kept(Plain(tensor=tensor), lambda item: free(item.tensor))
    assert same_bits(tensor, before)


def test_merged_tensors_keep_the_values_that_the_merger_gave_them():
    module = nn.Linear(2, 2)
    module.view = module.weight.detach()[1:]  # the same memory
    before = module.weight.detach() + 1
    kept(module, lambda module: module.weight.data.copy_(before), merged=[module.weight])
    assert same_bits(module.weight.detach(), before)


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


class Prefetcher:
    """Fills a queue from a thread of its own."""

    def __init__(self, *, lazily: bool) -> None:
        self.rows, self.thread, self.is_running = [0], None, False
        if not lazily:
            self.start()

    def start(self) -> None:
        self.rows.append(1)
        self.is_running = True
        self.thread = threading.Thread(target=int)


def test_what_owns_a_thread_is_left_alone_with_all_it_owns_and_said_once(caplog):
    module, prefetcher = nn.Module(), Prefetcher(lazily=False)
    module.data = prefetcher
    with caplog.at_level(logging.WARNING):
        kept(module, lambda module: prefetcher.rows.append(2))
    assert prefetcher.rows == [0, 1, 2, 2]
    assert len([line for line in caplog.messages if "module.data (owns a Thread)" in line]) == 1


def test_a_thread_that_was_started_meanwhile_keeps_its_owner():
    module = nn.Module()
    module.data = Prefetcher(lazily=True)
    kept(module, lambda module: module.data.thread or module.data.start())
    assert module.data.thread is not None
    assert module.data.is_running  # as its thread will find it
    module.lock = None
    kept(module, lambda module: setattr(module, "lock", threading.Lock()))
    assert module.lock is not None


@pytest.mark.parametrize("living", [queue.Queue, threading.Event, lambda: logging.getLogger("a"), lambda: sys.stdout])
def test_what_lives_by_itself_is_not_even_looked_into(living):
    module = nn.Module()
    module.living = living()
    memento = Memento({"module": module}, notices=WarnOnce())
    own = vars(module.living).values() if hasattr(module.living, "__dict__") else []
    assert not [item for state, _ in memento._states for item in own if state.item is item]


def test_large_data_costs_no_search_and_is_said_once_with_its_path(caplog):
    module = nn.Module()
    module.data = Plain(rows=[Plain() for _ in range(module_under_test.MOST_ITEMS + 1)], numbers=list(range(10**5)))
    with caplog.at_level(logging.WARNING):
        memento = kept(module, lambda module: (module.data.rows.reverse(), module.data.numbers.reverse()))
    assert module.data.numbers == list(range(10**5))
    assert len(memento._objects) < 100
    assert [line for line in caplog.messages if "module.data.rows[…] (10,001 items are not searched)" in line]


def test_objects_are_bounded(caplog, monkeypatch):
    monkeypatch.setattr(module_under_test, "MOST_OBJECTS", 50)
    module = nn.Module()
    module.tree = [[Plain() for _ in range(9)] for _ in range(9)]
    with caplog.at_level(logging.WARNING):
        memento = Memento({"module": module}, notices=WarnOnce())
    assert len(memento._objects) == 50
    assert [line for line in caplog.messages if "module.tree[" in line and "beyond the first 50 objects" in line]


def _raise(module: Any) -> None:
    module.rows += 1


def test_copies_are_bounded_smallest_first_and_a_change_beyond_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(module_under_test, "MOST_BYTES", 400)
    module = nn.Module()
    module.small, module.large, module.rows = torch.zeros(50), torch.zeros(1000), np.zeros(1000)
    with caplog.at_level(logging.WARNING):
        memento = kept(module, lambda module: (module.small.add_(1), module.large.data.add_(1), _raise(module)))
    assert module.small.sum() == 0
    assert module.large.sum() == 2000
    assert [block._saved.nbytes for block in memento._blocks] == [200]
    said = [line for line in caplog.messages if line.startswith("module.large was changed by a hook")]
    assert len(said) == 1
    assert len([line for line in caplog.messages if line.startswith("module.rows was changed by a hook")]) == 1
    assert "is_evaluating_merge" in said[0]


@pytest.mark.parametrize("moving", [itertools.count, lambda: (number for number in range(9))])
def test_what_can_only_be_seen_to_move_is_said(moving, caplog):
    module = nn.Module()
    module.ids = moving()
    with caplog.at_level(logging.WARNING):
        kept(module, lambda module: next(module.ids))
    assert [line for line in caplog.messages if line.startswith("module.ids was changed by a hook")]


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


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 100_003])
def test_a_tensor_of_any_size_comes_back_bit_by_bit_in_its_memory(size: int) -> None:
    whole = torch.arange(float(size + 2), dtype=torch.float64)
    item = Plain(whole=whole, inner=whole[1:-1].float()[: max(1, size - 1)], few=torch.zeros(size, dtype=torch.uint8))
    before = {name: value.clone() for name, value in vars(item).items()}

    def write(item: Any) -> None:
        for value in vars(item).values():
            value.data[-1] += 1  # past its version (P31)

    kept(item, write)
    for name, value in vars(item).items():
        assert same_bits(value, before[name])
