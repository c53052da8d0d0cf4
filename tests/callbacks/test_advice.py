"""A window that spans too much of its run is said to, once, with an interval that fits."""

import math
from types import SimpleNamespace

import pytest

from pretrain_merge.callbacks.advice import why_too_wide
from pretrain_merge.callbacks.announcements import last_step
from pretrain_merge.config import parse_settings


def said(num_steps=2000, **keys):
    return why_too_wide(parse_settings(keys), num_steps)


def test_a_window_over_nearly_half_of_the_run_is_said_with_numbers_that_fit():
    text = said(window=10, every=100)
    assert "view 'sma' of 10 snapshots every 100 steps spans 45% of this run" in text
    assert "newest within these (`span`)" in text
    assert text.endswith('every: "1%", or 26 steps.')
    assert said(window=10, every=26) is None
    assert said(window=10, every="1%") is None


def test_nothing_is_said_of_a_window_over_a_tenth_of_the_run_which_is_best_at_ordinary_rates():
    assert said(window=10, every="1%") is None


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"window": 20, "every": "2%"}, 'every: "0.6%", or 12 steps.'),
        ({"window": 10, "every": 100, "views": ["sma10"]}, "and so will this one"),
        ({"window": 10, "every": 100, "views": ["sma2", "sma6"]}, "view 'sma6' of 6 snapshots"),
        ({"window": 10, "every": 30, "average": "block"}, "spans 15% of this run"),
        ({"window": 10, "every": 100, "span": 0.4}, "beyond about 40% of the steps"),
    ],
)
def test_what_is_said_fits_the_view(keys, expected):
    assert expected in said(**keys)


@pytest.mark.parametrize(
    "keys", [{"every": "1B tokens"}, {"views": ["sma2"], "every": 100}, {"every": 100, "span": 0.5}]
)
def test_nothing_is_said_where_views_fit_or_where_nobody_knows(keys):
    assert said(**keys) is None


def test_a_run_of_a_few_steps_and_one_without_an_end_are_left_in_peace():
    assert said(40, window=3, every=2) is None
    assert said(math.inf, window=10, every=100) is None


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"max_steps": 500, "max_epochs": None}, 500),
        ({"max_steps": -1, "max_epochs": 3}, 75),
        ({"max_steps": -1, "max_epochs": -1}, math.inf),
    ],
)
def test_the_length_of_a_run_is_what_its_trainer_says(given, steps):
    assert last_step(SimpleNamespace(num_training_batches=100, accumulate_grad_batches=4, **given)) == steps
