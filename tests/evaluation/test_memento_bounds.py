"""What lives by itself is not touched, what is too large is not copied, and both are said once."""

import itertools
import logging
import queue
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.moved_objects import Plain, kept
from torch import nn

from pretrain_merge.evaluation.memento import Memento
from pretrain_merge.evaluation.memento import memento as module_under_test
from pretrain_merge.runtime.log import WarnOnce


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
    assert [block.nbytes for block in memento._blocks] == [200]
    said = [line for line in caplog.messages if line.startswith("module.large was changed by a hook")]
    assert len(said) == 1
    assert len([line for line in caplog.messages if line.startswith("module.rows was changed by a hook")]) == 1
    assert "is_evaluating_merge" in said[0]


def _turned(cycle):
    """In its second round, where it goes through what it remembers."""
    for _ in range(4):
        next(cycle)
    return cycle


@pytest.mark.parametrize(
    "moving",
    [
        itertools.count,
        lambda: (number for number in range(9)),
        pytest.param(
            lambda: itertools.cycle([1, 2, 3]),
            marks=pytest.mark.skipif(sys.version_info >= (3, 14), reason="a cycle does not tell where it is"),
        ),
        pytest.param(
            lambda: _turned(itertools.cycle([1, 2, 3])),
            marks=pytest.mark.skipif(sys.version_info >= (3, 14), reason="a cycle does not tell where it is"),
        ),
    ],
)
def test_what_can_only_be_seen_to_move_is_said(moving, caplog):
    module = nn.Module()
    module.ids = moving()
    with caplog.at_level(logging.WARNING):
        kept(module, lambda module: next(module.ids))
    assert [line for line in caplog.messages if line.startswith("module.ids was changed by a hook")]
