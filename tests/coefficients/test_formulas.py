"""Coefficients against the papers' tables and against an independent oracle."""

import math

import numpy as np
import pytest
from coefficients.strategies import assert_close, counts, law, nearly_even_times_of, times_of
from harness import oracles
from hypothesis import given
from hypothesis import strategies as st

from pretrain_merge.coefficients import decay, ema, extrapolated, qam, sma, wma
from pretrain_merge.errors import CoefficientError
from pretrain_merge.lr_schedules import SHAPES


def half_a_unit(printed):
    """Half a unit in the last printed place: how far a rightly rounded figure may lie from the number."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2]) + 1e-12


@pytest.mark.parametrize(
    ("computed", "row"),
    [
        pytest.param(decay(10, shape="linear"), " ".join(["0.1"] * 10), id="linear, N=10"),
        pytest.param(
            decay(10, shape="cosine"), ".0245 .071 .111 .139 .155 .155 .139 .111 .071 .0245", id="cosine, N=10"
        ),
        pytest.param(
            decay(10, shape="1-sqrt"), ".316 .131 .1005 .085 .075 .067 .062 .058 .054 .051", id="1-sqrt, N=10"
        ),
        pytest.param(decay(10, shape="1-square"), ".01 .03 .05 .07 .09 .11 .13 .15 .17 .19", id="1-square, N=10"),
        pytest.param(decay(5, shape="1-sqrt"), ".447 .185 .142 .120 .106", id="Megatron-LM minus-sqrt, N=5"),
        pytest.param(ema(10, alpha=0.1)[:1], ".387", id="PMA, oldest of EMA(.1), N=10"),
        pytest.param([math.fsum(ema(10, alpha=0.1)[1:]) + 0.1 * 0.9**9], ".651", id="PMA, sum of its closed form"),
    ],
)
def test_a_published_figure_is_met_to_its_last_digit(computed, row):
    for coefficient, printed in zip(computed, row.split(), strict=True):
        assert abs(coefficient - float(printed)) <= half_a_unit(printed)


def test_the_tables_tell_a_reversed_list_from_a_right_one():
    with pytest.raises(AssertionError):
        test_a_published_figure_is_met_to_its_last_digit(decay(5, shape="1-sqrt")[::-1], ".447 .185 .142 .120 .106")


@law
@given(n=counts)
def test_averages_agree_with_the_oracle(n):
    assert_close(sma(n), oracles.sma(n), n)
    assert_close(wma(n), oracles.wma(n), n)


@law
@given(n=st.integers(2, 60), step=st.floats(0.0, 2.0))
def test_an_extrapolation_lies_on_the_line_through_the_means_of_its_halves(n, step):
    models = np.random.default_rng(n).normal(size=(n, 7))
    older, newer = models[: n // 2].mean(axis=0), models[n // 2 :].mean(axis=0)
    expected = newer + step * (newer - older)
    found = oracles.merged(models, extrapolated(n, step=step))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [-0.1, math.nan, math.inf, True, "0.1"])
def test_an_extrapolation_goes_forward_by_a_number(step):
    with pytest.raises(CoefficientError, match="step is"):
        extrapolated(4, step=step)


@law
@given(n=counts, alpha=st.floats(0.0, 1.0, exclude_min=True))
def test_ema_agrees_with_the_recursion_on_unit_vectors(n, alpha):
    assert_close(ema(n, alpha=alpha), oracles.ema([alpha] * (n - 1)), n)


@law
@given(data=st.data(), n=counts, half_life=st.floats(0.1, 1e6))
def test_ema_by_half_life_agrees_with_the_recursion(data, n, half_life):
    times = data.draw(times_of(n))
    assert_close(ema(n, half_life=half_life, times=times), oracles.ema(1 - 0.5 ** (np.diff(times) / half_life)), n)


@law
@given(data=st.data(), n=counts, name=st.sampled_from(list(SHAPES)))
def test_decay_agrees_with_the_theorem_at_any_spacing(data, n, name):
    times = data.draw(times_of(n))
    assert_close(decay(n, shape=name, times=times), oracles.decay(oracles.SHAPES[name], times), n)
    assert_close(decay(n, shape=name), oracles.decay(oracles.SHAPES[name], range(n)), n)


@law
@given(data=st.data(), n=st.integers(1, 10), name=st.sampled_from(list(SHAPES)))
def test_qam_agrees_with_the_sum_over_every_outcome(data, n, name):
    times = data.draw(nearly_even_times_of(n))
    rates = oracles.decay_rates(oracles.SHAPES[name], times)
    assert_close(qam(n, shape=name, times=times), oracles.qam(rates), n)


def test_alpha_is_per_snapshot_and_half_life_is_per_unit_of_time():
    times = [0, 100, 1000]
    assert ema(3, alpha=0.2, times=times) == ema(3, alpha=0.2)
    assert ema(3, half_life=100, times=times)[-1] > ema(3, half_life=100, times=[0, 100, 200])[-1]


@pytest.mark.parametrize("late", [0, 20, 49])
def test_qam_takes_snapshots_that_are_a_little_late(late):
    times = [0, 100, 200 + late, 300, 400]
    rates = oracles.decay_rates(oracles.SHAPES["cosine"], times)
    assert_close(qam(5, shape="cosine", times=times), oracles.qam(rates), 5)


def test_qam_refuses_times_that_are_not_nearly_even():
    with pytest.raises(CoefficientError) as caught:
        qam(4, times=[0, 1000, 2000, 8000])
    for piece in ("snapshot 1", "0.375 mean intervals", "within half an interval of an even grid", "Use 'decay'"):
        assert piece in str(caught.value)
