"""Horizons that grow with the run: a half-life in percent, and the power law."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_merge import coefficients as module
from pretrain_merge.errors import CoefficientError


def test_a_half_life_may_be_a_share_of_the_time_since_the_run_began():
    times = (70.0, 80.0, 95.0, 100.0)
    assert module.ema(4, half_life="5%", times=times) == module.ema(4, half_life=5.0, times=times)
    assert module.ema(1, half_life="5%") == (1.0,)


@pytest.mark.parametrize("given", ["5", "0%", "101%", "x%", "-5%", ""])
def test_a_half_life_in_words_is_a_percentage(given):
    with pytest.raises(CoefficientError, match=r"half_life is .* Write it as '5%'\."):
        module.ema(3, half_life=given)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94), (12.0**-0.5, 0.0)])
def test_a_relative_width_gives_the_exponent_of_the_paper(width, gamma):
    times = tuple(float(step) for step in range(5, 105, 5))
    wide = module.power(20, relative_width=width, times=times)
    assert wide == pytest.approx(module.power(20, gamma=gamma, times=times), abs=1e-4)
    # an independent reading of the width: the standard deviation of the profile itself
    fine = tuple((step + 1) / 4000 for step in range(4000))
    profile = module.power(4000, relative_width=width, times=fine)
    mean = math.fsum(c * (t - 1 / 8000) for c, t in zip(profile, fine, strict=True))
    variance = math.fsum(c * (t - 1 / 8000 - mean) ** 2 for c, t in zip(profile, fine, strict=True))
    assert math.sqrt(variance) == pytest.approx(width, rel=1e-3)


@given(st.floats(0.0, 50.0), st.lists(st.floats(0.5, 20.0), min_size=2, max_size=12))
def test_a_power_law_is_integrated_over_the_time_that_each_snapshot_stands_for(gamma, gaps):
    times = [math.fsum(gaps[: index + 1]) for index in range(len(gaps))]
    begin = max(0.0, times[0] - (times[-1] - times[0]) / (len(times) - 1))
    edges = [begin, *times]
    masses = [(b / times[-1]) ** (gamma + 1) - (a / times[-1]) ** (gamma + 1) for a, b in itertools.pairwise(edges)]
    expected = [mass / math.fsum(masses) for mass in masses]
    assert module.power(len(times), gamma=gamma, times=times) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "given",
    [{}, {"gamma": 1.0, "relative_width": 0.1}, {"gamma": -1.0}, {"relative_width": 0.3}, {"relative_width": 0}],
)
def test_a_power_law_out_of_range_is_refused(given):
    with pytest.raises(CoefficientError, match=r"Set|Larger"):
        module.power(3, **given, times=[1.0, 2.0, 3.0])
