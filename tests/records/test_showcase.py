"""The picture and the table that W&B is given: of the whole run, seldom, and never at the cost of training."""

import itertools
import random

import numpy as np
import pytest
import torch
from harness.records import at, falling_run

from pretrain_merge.records import plots
from pretrain_merge.records.showcase import Showcase, table
from pretrain_merge.records.thinning import History, with_extremes


class Logger:
    """Keeps what it is given; looks at the clock whenever it is asked to show something."""

    def __init__(self, clock=None, cost=0.0):
        self.tables, self.pictures, self.clock, self.cost = [], [], clock, cost

    def log_table(self, key, columns, data, step):
        self.tables.append((key, step, len(data)))

    def log_image(self, key, images, step):
        self.pictures.append((key, step, images[0].size))
        if self.clock is not None:
            self.clock.now += self.cost


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def no_drawing(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda records, metric: None)
    monkeypatch.setattr("pretrain_merge.records.showcase._picture", lambda records, metric: np.zeros((2, 2)))


def silent(key, message):
    raise AssertionError(message)


def test_the_end_of_a_run_shows_all_of_it_once():
    showcase, logger = Showcase("merge", History(), silent), Logger()
    for record in falling_run(6):
        showcase.add(record, [logger])
    assert logger.tables == []  # a young run is not held up
    showcase.show([logger])
    showcase.show([logger])
    assert logger.tables == [("merge/merges", 600, 6)]
    ((key, step, size),) = logger.pictures
    assert (key, step, min(size) > 500) == ("merge/curves", 600, True)


@pytest.mark.usefixtures("no_drawing")
def test_pictures_take_a_hundredth_of_the_time_and_are_few_in_a_long_run():
    clock = Clock()
    logger = Logger(clock, cost=2.0)
    showcase = Showcase("merge", History(), silent, clock=clock)
    for step in range(1, 20_001):
        clock.now += 30.0  # a merge every half minute: a week
        showcase.add(at(step), [logger])
    assert 30 < len(logger.pictures) < 120
    assert 2.0 * len(logger.pictures) < 0.01 * clock.now
    assert max(rows for _, _, rows in logger.tables) <= 513


def test_random_numbers_are_as_if_nothing_had_been_drawn():
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    showcase = Showcase("merge", History(), silent)
    for record in falling_run(5):
        showcase.add(record, [])
    showcase.show([Logger()])
    assert [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()] == states


def test_a_picture_that_fails_ends_no_run_and_is_said():
    said = []
    showcase = Showcase("merge", History(), lambda key, message: said.append(message))
    showcase.add(at(1), [])
    logger = Logger()
    logger.log_table = lambda *_, **__: 1 / 0
    showcase.show([logger])
    assert "ZeroDivisionError" in said[0]


def test_a_missing_library_costs_the_picture_and_not_the_table(monkeypatch):
    said, logger = [], Logger()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    showcase = Showcase("merge", History(), lambda key, message: said.append(message))
    showcase.add(at(1), [])
    showcase.show([logger])
    assert (len(logger.tables), logger.pictures) == (1, [])
    assert "pip install 'pretrain-merge[plots]'" in said[0]


def test_a_table_has_a_gap_where_a_view_was_not_made():
    columns, rows = table(falling_run(4))
    place = columns.index("merge/sma2/val_loss")
    assert [row[place] is None for row in rows] == [True, True, True, False]


@pytest.mark.parametrize("number", [1, 2, 7, 8, 9, 1000])
def test_a_history_is_spread_over_the_run_and_has_its_newest(number):
    history = History(8)
    for step in range(1, number + 1):
        history.append(at(step))
    steps = [record.step for record in history.records]
    assert steps[0] == 1
    assert steps[-1] == number
    assert min(number, 4) <= len(steps) <= 9
    assert len({after - before for before, after in itertools.pairwise(steps[:-1])}) <= 1
    assert all(not record.recipes for record in history.records)


def test_no_spike_is_lost_where_a_curve_is_thinned():
    values = [float(index % 7) for index in range(10_000)]
    values[4321], values[1234], values[77] = 99.0, -99.0, float("nan")
    chosen = with_extremes(range(10_000), 200, values.__getitem__)
    assert len(chosen) <= 200
    assert {0, 1234, 4321, 9999} <= set(chosen)
    assert chosen == sorted(chosen)
