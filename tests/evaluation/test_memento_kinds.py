"""Kinds of state that a hook may move and a memento was blind to once: each is back, or said to have stayed."""

import configparser
import csv
import ctypes
import decimal
import hashlib
import io
import itertools
import json
import logging
import mmap
import sys
import threading
import types
from collections import deque
from contextlib import ExitStack
from csv import DictReader
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evaluation.moved_objects import kept
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pretrain_merge.evaluation.memento import Memento, positions
from pretrain_merge.runtime.log import WarnOnce


class Registry(type):
    """Singletons: the one instance of each class is held by its metaclass."""

    made: ClassVar[dict[type, object]] = {}

    def __call__(cls):
        return Registry.made.setdefault(cls, super().__call__())


class Single(metaclass=Registry):
    num = 0


class SafeForThreads:
    def __init__(self):
        self.num, self.lock, self.changed = 0, threading.RLock(), threading.Condition()

    def add(self):
        with self.lock, self.changed:
            self.num += 1


class OfTheUser(torch.Tensor):
    pass


def local():
    item = threading.local()
    item.num = 0
    return item


def add(item):
    item.num += 1


def grow(item):
    item.resize(len(item) + 1, refcheck=False)


def reshape(item):
    np.ndarray.resize(item, (2, 2), refcheck=False)
    item[...] = 1
    item.flags.writeable = False


def begun():
    item = io.BytesIO(b"abcd")
    item.read(1)
    return item


def give_attribute(item):
    item.num = getattr(item, "num", 0) + 1


# what there is, what a hook does to it, and what is looked at
KINDS = {
    "a counter with a lock": (SafeForThreads, SafeForThreads.add, lambda item: item.num),
    "a namespace with a lock": (
        lambda: types.SimpleNamespace(num=0, lock=threading.Lock(), ready=threading.Event()),
        add,
        lambda item: item.num,
    ),
    "this thread's values": (local, add, lambda item: item.num),
    # the module holds the class alone
    "an instance that its metaclass holds": (lambda: type(Single()), lambda _: add(Single()), lambda _: Single().num),
    "an attribute of a parameter": (
        lambda: nn.Parameter(torch.zeros(1)),
        give_attribute,
        lambda item: dict(vars(item)),
    ),
    "a tensor of the user's class": (
        lambda: torch.zeros(2).as_subclass(OfTheUser),
        lambda item: item.add_(1),
        lambda item: item.tolist(),
    ),
    "memory behind a view of bytes": (
        lambda: memoryview(bytearray(2)),
        lambda item: item.__setitem__(0, item[0] + 1),
        bytes,
    ),
    "a number of C's": (ctypes.c_int, lambda item: setattr(item, "value", item.value + 1), lambda item: item.value),
    "an array that grows in place": (lambda: np.zeros(3), grow, np.ndarray.tolist),
    "an array of another shape that is read only": (
        lambda: np.zeros(4),
        reshape,
        lambda item: (item.tolist(), item.flags.writeable),
    ),
    "a sequence of Sobol": (
        lambda: torch.quasirandom.SobolEngine(2, scramble=True, seed=1),
        lambda item: item.draw(),
        lambda item: (item.num_generated, item.quasi.tolist()),
    ),
    "text in memory": (io.StringIO, lambda item: item.write("a\n"), lambda item: (item.getvalue(), item.tell())),
    "text in memory with ends of lines": (
        lambda: io.StringIO("a\nb", newline="\r\n"),
        lambda item: item.read() + str(item.write("\n")),
        lambda item: item.__getstate__()[:3],
    ),
    "bytes in memory": (
        begun,
        lambda item: (item.read(1), item.truncate(2)),
        lambda item: (item.getvalue(), item.tell()),
    ),
    "bytes in memory that are closed": (lambda: io.BytesIO(b"abc"), io.BytesIO.close, lambda item: item.closed),
    "text in memory that is closed": (lambda: io.StringIO("abc"), io.StringIO.close, lambda item: item.closed),
    "an element of XML": (
        lambda: ElementTree.fromstring("<run lr='1'>text<row/></run>"),
        lambda item: (item.set("lr", "2"), item.append(ElementTree.Element("new")), setattr(item, "text", "other")),
        ElementTree.tostring,
    ),
    "what an element of XML holds": (
        lambda: ElementTree.ElementTree(ElementTree.fromstring("<run><row/></run>")),
        lambda item: item.getroot()[0].set("a", "1"),
        lambda item: ElementTree.tostring(item.getroot()),
    ),
    "what is done at the end": (ExitStack, lambda item: item.callback(int), lambda item: len(item._exit_callbacks)),
    "an encoder of JSON": (json.JSONEncoder, lambda item: setattr(item, "indent", 2), lambda item: item.indent),
    "the memory of a tensor": (
        lambda: torch.zeros(2).untyped_storage(),
        lambda item: item.__setitem__(0, item[0] + 1),
        list,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_back(kind):
    make, move, look = KINDS[kind]
    module = nn.Module()
    object.__setattr__(module, "item", item := make())
    before = look(item)
    memento = Memento({"module": module}, notices=WarnOnce())
    for _ in range(2):
        move(item)
        assert look(item) != before
        memento.put_back()
        assert look(item) == before


def test_seeds_that_were_spawned_are_said_to_stay(caplog):
    module = nn.Module()
    module.seeds = np.random.SeedSequence(1)
    memento = Memento({"module": module}, notices=WarnOnce())
    module.seeds.spawn(1)
    with caplog.at_level(logging.WARNING):
        memento.put_back()
    assert "module.seeds was changed by a hook" in caplog.text


def test_a_namespace_that_owns_a_thread_is_said_to_be_left_alone(caplog):
    module = nn.Module()
    module.box = types.SimpleNamespace(thread=threading.Thread(), num=0)
    with caplog.at_level(logging.WARNING):
        Memento({"module": module}, notices=WarnOnce())
    assert "module.box (owns a Thread)" in caplog.text


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_optimizers_state_is_back(mesh):
    module = nn.Module()
    module.state = {"exp_avg": distribute_tensor(torch.zeros(2, 2), mesh, [Shard(0)])}
    memento = Memento({"module": module}, notices=WarnOnce())
    module.state["exp_avg"].add_(1)
    memento.put_back()
    assert torch.equal(module.state["exp_avg"].to_local(), torch.zeros(2, 2))


class Diary(Logger):
    """A logger of the user's own, which keeps what it is told in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = [0]

    name = version = property(lambda _: "diary")

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rows.append(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def test_what_a_logger_of_the_users_own_keeps_is_put_back():
    diary = Diary()
    kept({"logger": diary}, lambda _: (diary.rows.append(1), setattr(diary, "num", 1)))
    assert diary.rows == [0]
    assert not hasattr(diary, "num")


def test_a_logger_that_writes_files_is_left_alone(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.rows = [0]
    kept({"logger": logger}, lambda _: logger.rows.append(1))
    assert logger.rows == [0, 1, 1]


def test_classes_of_c_are_not_kept():
    memento = Memento({"module": SafeForThreads()}, notices=WarnOnce())
    of_classes = [state.item for state, _ in memento._states if isinstance(state.item, type)]
    assert of_classes == [SafeForThreads]  # and neither `object` nor `type`, which every other object shares


def taken(make: Any, number: int = 3) -> list[Any]:
    return list(itertools.islice(make, number))


GONE_THROUGH = {
    "a chain": lambda: itertools.chain([1, 2, 3], [4]),
    "a chain that goes on to its next part": lambda: itertools.chain([1], [2, 3]),
    "a starmap": lambda: itertools.starmap(max, [(1, 2), (3, 4), (5, 6)]),
    "a takewhile": lambda: itertools.takewhile(bool, [1, 2, 3]),
    "text": lambda: iter("abc"),
}
LOST = {
    "an islice": lambda: itertools.islice([1, 2, 3, 4], 3),
    "a product": lambda: itertools.product([1, 2], [3, 4]),
    "permutations": lambda: itertools.permutations([1, 2, 3]),
    "a repeat": lambda: itertools.repeat(7, 3),
    "an accumulate": lambda: itertools.accumulate([1, 2, 3, 4]),
    "a tee": lambda: itertools.tee([1, 2, 3, 4])[0],
    "a pairwise": lambda: itertools.pairwise([1, 2, 3, 4]),
    "an iterator of a set": lambda: iter({1, 2, 3}),
    "an iterator of a deque": lambda: iter(deque([1, 2, 3])),
}
if sys.version_info >= (3, 14):  # where Python does not tell any more how far these are
    LOST = {name: make for name, make in LOST.items() if name not in ("an islice", "a product", "permutations")}
    GONE_THROUGH = {name: make for name, make in GONE_THROUGH.items() if "chain" not in name}


@pytest.mark.parametrize("make", GONE_THROUGH.values(), ids=GONE_THROUGH)
def test_what_goes_through_a_list_is_back_where_it_was(make):
    module = nn.Module()
    module.stream = make()
    kept(module, lambda module: next(module.stream))
    assert taken(module.stream) == taken(make())


@pytest.mark.parametrize("make", LOST.values(), ids=LOST)
def test_an_iterator_that_cannot_be_set_back_is_said_to_have_moved(make, caplog):
    module = nn.Module()
    module.stream = make()
    kept(module, lambda _: None)
    assert not caplog.messages
    kept(module, lambda module: next(module.stream))
    assert len([text for text in caplog.messages if "module.stream was changed by a hook" in text]) == 1


def test_a_configuration_of_configparser_is_put_back():
    module, config = nn.Module(), configparser.ConfigParser()
    config.read_dict({"train": {"lr": "1"}})
    module.config = config
    kept(module, lambda _: config["train"].__setitem__("lr", "2"))
    assert config["train"]["lr"] == "1"


class DataFrame:
    """As pandas has it, which need not be installed."""

    __module__ = "pandas.core.frame"

    def __init__(self):
        self._mgr = types.SimpleNamespace(blocks=(types.SimpleNamespace(values=np.zeros((1, 1))),))

    @property
    def shape(self):
        return self._mgr.blocks[0].values.shape

    def add_row(self):
        self._mgr.blocks = (types.SimpleNamespace(values=np.zeros((1, self.shape[1] + 1))),)


def test_numbers_of_a_data_frame_are_put_back():
    module = nn.Module()
    module.table = DataFrame()
    kept(module, lambda module: module.table._mgr.blocks[0].values.__iadd__(1))
    assert module.table._mgr.blocks[0].values == 0


SEEN = {
    "another thread's flag": (threading.Event, threading.Event.set),
    "a semaphore": (threading.Semaphore, threading.Semaphore.release),
    "mapped memory": (lambda: mmap.mmap(-1, 8), lambda item: item.write(b"a")),
    "a reader of CSV": (lambda: csv.reader(["a", "b", "c", "d"]), next),
    "a hash": (hashlib.sha256, lambda item: item.update(b"a")),
    "a reader of CSV by names": (lambda: DictReader(["a", "1", "2", "3"]), next),
    "a data frame": (DataFrame, lambda item: item.add_row()),
    "a decimal context": (decimal.Context, lambda item: setattr(item, "prec", item.prec + 1)),
    "an iterator of NumPy": (lambda: np.zeros(4).flat, next),
}


@pytest.mark.parametrize(("make", "move"), SEEN.values(), ids=SEEN)
def test_what_others_share_or_nobody_can_set_back_is_said_to_have_moved(make, move, caplog):
    module = nn.Module()
    module.held = make()
    kept(module, lambda _: None)
    assert not caplog.messages
    kept(module, lambda module: move(module.held))
    assert [text.partition(":")[0] for text in caplog.messages] == [
        "module.held was changed by a hook while a merge was evaluated, and stays changed"
    ]


def test_a_file_in_memory_that_is_too_large_keeps_its_place(caplog, monkeypatch):
    monkeypatch.setattr("pretrain_merge.evaluation.memento.memento.MOST_BYTES", 2)
    module = nn.Module()
    module.rows = io.BytesIO(b"abcdef")
    kept(module, lambda module: module.rows.read(2))
    assert module.rows.tell() == 0
    assert not caplog.messages
    kept(module, lambda module: module.rows.seek(0, 2) and module.rows.write(b"g"))
    assert [text for text in caplog.messages if text.startswith("module.rows was changed by a hook")]


def test_where_python_does_not_tell_how_far_a_product_is_that_is_said_at_once(caplog, monkeypatch):
    monkeypatch.setattr(positions, "_TELLS", False)
    module = nn.Module()
    module.pairs = itertools.product([1, 2], [3, 4])
    kept(module, lambda _: None)
    assert [text for text in caplog.messages if "module.pairs (Python does not tell how far a product is)" in text]


def test_an_islice_says_what_becomes_of_it(caplog):
    module, numbers = nn.Module(), iter(range(9))
    module.first = itertools.islice(numbers, 5)
    kept(module, lambda module: next(module.first))
    assert list(module.first) == [0, 1, 2]  # of five, since two were counted
    assert [text for text in caplog.messages if "ends sooner by that many" in text and "may differ" in text]


def test_what_refuses_to_tell_where_it_is_breaks_no_merge():
    module = nn.Module()
    exhausted = np.nditer(np.zeros(1))
    list(exhausted)
    module.held = [exhausted, DictReader(["a"]), ElementTree.Element("a")]
    del module.held[1].reader
    kept(module, lambda _: None)
