"""Identities that every kind of coefficients obeys, for any number of snapshots and any times."""

import math

import numpy as np
import pytest
from coefficients.strategies import PARAMETERS, assert_close, counts, law, merges, normalised_lists_of, shapes, times_of
from harness import oracles
from hypothesis import given
from hypothesis import strategies as st

from pretrain_merge.coefficients import KINDS, compute, decay, decay_curve, mean_age, n_eff, qam, sma
from pretrain_merge.lr_schedules import SHAPES


def test_every_kind_is_under_the_laws():
    assert set(PARAMETERS) == set(KINDS)


@law
@given(merge=merges())
def test_coefficients_are_floats_one_per_snapshot_that_sum_to_one(merge):
    name, n, times, parameters = merge
    computed = compute(name, n, times=times, **parameters)
    assert isinstance(computed, tuple)
    assert [type(c) for c in computed] == [float] * n
    assert abs(math.fsum(computed) - 1.0) <= 1e-12


@pytest.mark.parametrize("n", [1, 2, 3, 49, 64, 1000])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sma", {}), ("wma", {}), ("ema", {"alpha": 0.01}), ("ema", {"half_life": 250.0})]
    + [(name, {"shape": shape}) for name in ("decay", "qam") for shape in SHAPES],
)
def test_long_windows_sum_to_one_too(name, parameters, n):
    assert abs(math.fsum(compute(name, n, **parameters)) - 1.0) <= 2.0**-52


def test_rounding_is_not_made_up_for_at_the_expense_of_a_small_coefficient():
    no_step_happens = math.prod((j / 22) ** 2 for j in range(1, 22))  # 1e-17, below the rounding of the sum
    assert qam(22, shape="1-square")[0] == pytest.approx(no_step_happens, rel=1e-9)


@law
@given(merge=merges(kinds=("sma", "wma", "ema", "decay", "qam")))
def test_no_average_and_no_decay_has_a_negative_coefficient(merge):
    name, n, times, parameters = merge
    assert min(compute(name, n, times=times, **parameters)) >= 0.0


@law
@given(merge=merges())
def test_one_snapshot_is_its_own_merge(merge):
    name, _, times, parameters = merge
    parameters = {"weights": [1.0]} if name == "custom" else parameters
    assert compute(name, 1, times=times[:1], **parameters) == (1.0,)


@law
@given(data=st.data(), n=counts, shape=shapes)
def test_decay_curve_and_coefficients_invert_each_other(data, n, shape):
    weights = sorted(data.draw(normalised_lists_of(n).map(np.abs)))
    weights = list(np.array(weights) / math.fsum(weights))
    for coefficients in (weights, weights[::-1], decay(n, shape=shape, times=data.draw(times_of(n)))):
        curve = decay_curve(coefficients)
        assert_close(decay(n, shape=[1.0, *curve, 0.0]), coefficients, n)


@law
@given(data=st.data(), n=counts, name=st.sampled_from(list(SHAPES)))
def test_the_decay_curve_of_a_decay_is_its_rates(data, n, name):
    times = data.draw(times_of(n))
    rates = oracles.decay_rates(oracles.SHAPES[name], times)
    assert_close(decay_curve(decay(n, shape=name, times=times)), rates, n)


@law
@given(n=counts)
def test_a_linear_decay_at_even_spacing_is_a_simple_average(n):
    assert_close(decay(n, shape="linear"), sma(n), n)
    assert_close(decay(n, shape="linear", times=range(1000, 1000 * (n + 1), 1000)), sma(n), n)


@law
@given(merge=merges(tuple(set(KINDS) - {"power"})), shift=st.integers(-(10**12), 10**12))
def test_when_the_clock_started_does_not_matter(merge, shift):
    name, n, times, parameters = merge
    shifted = [time + shift for time in times]
    assert compute(name, n, times=shifted, **parameters) == compute(name, n, times=times, **parameters)


@law
@given(merge=merges(), scale=st.floats(1e-6, 1e9))
def test_the_unit_of_time_does_not_matter(merge, scale):
    name, n, times, parameters = merge
    times = [time - times[0] for time in times]
    scaled_parameters = {key: value * scale if key == "half_life" else value for key, value in parameters.items()}
    scaled = compute(name, n, times=[time * scale for time in times], **scaled_parameters)
    expected = compute(name, n, times=times, **parameters)
    # A list's corners turn rounding of a position into as much again in a rate, times at most the steepness 20.
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-12)


@law
@given(merge=merges(kinds=("decay", "ema")))
def test_even_times_are_the_default(merge):
    name, n, _, parameters = merge
    assert compute(name, n, times=range(5, 5 + n), **parameters) == compute(name, n, **parameters)


@law
@given(merge=merges())
def test_n_eff_lies_between_one_and_n_unless_coefficients_are_negative(merge):
    name, n, times, parameters = merge
    coefficients = compute(name, n, times=times, **parameters)
    assert n_eff(coefficients) == pytest.approx(1 / np.square(coefficients).sum(), rel=1e-12)
    assert n_eff(coefficients) <= n * (1 + 1e-12)
    assert n_eff(coefficients) >= 1 - 1e-12 or min(coefficients) < 0.0


@law
@given(n=counts)
def test_n_eff_counts_equal_snapshots(n):
    assert n_eff(sma(n)) == pytest.approx(n, rel=1e-14)


@law
@given(merge=merges())
def test_a_merge_lags_by_the_part_of_each_interval_that_its_decay_holds_back(merge):
    name, n, times, parameters = merge
    coefficients = compute(name, n, times=times, **parameters)
    held_back = (1 - np.array(decay_curve(coefficients))) @ np.diff(times) if n > 1 else 0.0
    scale = 1 + (times[-1] - times[0]) * np.abs(coefficients).sum()
    assert mean_age(coefficients, times) == pytest.approx(held_back, abs=1e-13 * n * scale)


def test_mean_age_counts_snapshots_unless_times_are_given():
    assert mean_age((0.5, 0.0, 0.5)) == 1.0
    assert mean_age((0.5, 0.0, 0.5), times=[0, 90, 100]) == 50.0


@law
@given(merge=merges())
def test_compute_calls_the_kind_and_hands_times_only_to_kinds_that_take_them(merge):
    name, n, times, parameters = merge
    takes_times = {"times": times} if name in ("ema", "power", "decay", "qam") else {}
    assert compute(name, n, times=times, **parameters) == KINDS[name](n, **parameters, **takes_times)
