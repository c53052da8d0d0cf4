"""Anneal now or later: both ends, and how far their difference can be told."""

import dataclasses

import pytest
from forecast.synthetic import river, run

from pretrain_merge import forecast_anneal
from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast import decide, read_history


def decided(records, steps=200, **options):
    asked = {"shape": "linear", "metric": "val_loss", "coverage": 0.9, "calibration": None} | options
    return decide(read_history(records, "val_loss"), steps=steps, **asked)


def test_both_anneals_are_the_forecasts_of_them():
    answer = decided(run(2000))
    assert answer.now == forecast_anneal(run(2000), steps=200)
    assert answer.later == forecast_anneal(run(2000), steps=200, after=200)
    assert (answer.now.expected.step, answer.later.expected.step, answer.cost) == (2200, 2400, 200)
    assert answer.better == answer.now.mean - answer.later.mean


def test_a_run_that_falls_is_told_to_go_on_and_the_difference_is_that_of_its_river():
    answer = decided(run(2000))
    assert answer.low < river(2100) - river(2300) < answer.high
    assert answer.is_told
    assert answer.sentence().startswith("Go on: annealed from now over 200 steps, val_loss ends at ")
    assert answer.sentence().endswith("lower for 200 steps more.")


def test_what_both_anneals_share_does_not_blur_their_difference():
    answer = decided(run(2000))
    assert answer.high - answer.low < 0.5 * (answer.now.high - answer.now.low)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.002, 0.004, ("Either: ", "0.0010 (-0.0020 to 0.0040) lower, which may be nothing, for 200 steps more.")),
        (-0.004, -0.002, ("Anneal now: ", "0.0030 (0.0020 to 0.0040) higher for 200 steps more.")),
    ],
)
def test_a_difference_that_cannot_be_told_is_said_to_be_none(low, high, said):
    answer = dataclasses.replace(decided(run(2000)), better=(low + high) / 2, low=low, high=high)
    assert answer.sentence().startswith(said[0])
    assert answer.sentence().endswith(said[1])


def test_what_cannot_be_forecast_cannot_be_decided():
    with pytest.raises(ForecastError, match=r"a whole number of steps"):
        decided(run(2000), steps=0)
