"""Coefficients against the papers' tables, an independent oracle, and the identities that define them."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from harness import oracles
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pretrain_merge import coefficients as module
from pretrain_merge.coefficients import (
    KINDS,
    compute,
    custom,
    decay,
    decay_curve,
    ema,
    kind,
    mean_age,
    n_eff,
    qam,
    registry,
    replays,
    sma,
    wma,
)
from pretrain_merge.errors import CoefficientError
from pretrain_merge.lr_schedules import SHAPES

law = settings(deadline=None)

counts = st.integers(1, 60)
falling_lists = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20).map(lambda rest: [1.0, *sorted(rest)[::-1]])
powers = st.floats(0.1, 5.0).map(lambda p: lambda t: (1.0 - t) ** p)
shapes = st.one_of(st.sampled_from(list(SHAPES)), falling_lists, powers)


def times_of(n):
    """Step counters at any spacing, as a run whose interval was changed has them."""
    gaps = st.lists(st.integers(1, 1000), min_size=n - 1, max_size=n - 1)
    return st.builds(lambda start, gaps: list(itertools.accumulate(gaps, initial=start)), st.integers(0, 10**6), gaps)


def nearly_even_times_of(n):
    """Step counters that crossed multiples of 100 a little late, as with an interval in tokens."""
    delays = st.lists(st.integers(0, 20), min_size=n, max_size=n)
    return delays.map(lambda late: [100 * j + delay for j, delay in enumerate(late)])


def normalised_lists_of(n):
    parts = st.lists(st.floats(-1.0, 1.0), min_size=n, max_size=n).map(np.array)
    return parts.filter(lambda v: v.sum() > 0.5).map(lambda v: list(v / v.sum()))


# What each kind can be asked for: n -> its parameters. A new kind adds its line here, and every law below holds for it.
PARAMETERS = {
    "sma": lambda n: st.just({}),
    "wma": lambda n: st.just({}),
    "ema": lambda n: st.one_of(
        st.fixed_dictionaries({"alpha": st.floats(0.0, 1.0, exclude_min=True)}),
        st.fixed_dictionaries({"half_life": st.floats(1e-3, 1e6)}),
    ),
    "power": lambda n: st.one_of(
        st.fixed_dictionaries({"gamma": st.floats(0.0, 100.0)}),
        st.fixed_dictionaries({"relative_width": st.floats(0.01, 0.28)}),
    ),
    "decay": lambda n: st.fixed_dictionaries({"shape": shapes}),
    "qam": lambda n: st.fixed_dictionaries({"shape": shapes}),
    "custom": lambda n: st.fixed_dictionaries({"weights": normalised_lists_of(n)}),
}


@st.composite
def merges(draw, kinds=tuple(KINDS)):
    """A kind, a number of snapshots, their times and parameters that fit."""
    name, n = draw(st.sampled_from(kinds)), draw(counts)
    times = draw(nearly_even_times_of(n) if name == "qam" else times_of(n))
    return name, n, times, draw(PARAMETERS[name](n))


def assert_close(computed, expected, n):
    """Equal to a rounding of numbers around 1 for each of n terms."""
    np.testing.assert_allclose(computed, expected, rtol=0, atol=4 * n * 2.0**-53)


# The tables of the papers


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


# The formulas, written a second time


@law
@given(n=counts)
def test_averages_agree_with_the_oracle(n):
    assert_close(sma(n), oracles.sma(n), n)
    assert_close(wma(n), oracles.wma(n), n)


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


# What the coefficients are for


def walk(rng, n, size=7):
    """Snapshots of a run, and the updates that led from each to the next."""
    updates = rng.normal(size=(n - 1, size))
    start = rng.normal(size=size)
    return np.vstack([start, start + np.cumsum(updates, axis=0)]), updates


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "times", [range(12), [0, 1, 2, 30, 31, 32, 33, 34, 100, 101, 102, 103]], ids=["even", "uneven"]
)
def test_a_decay_merge_is_where_the_recorded_updates_lead_when_each_is_scaled(name, times):
    snapshots, updates = walk(np.random.default_rng(0), len(times))
    merged = np.array(decay(len(times), shape=name, times=times)) @ snapshots
    rates = oracles.decay_rates(oracles.SHAPES[name], times)
    np.testing.assert_allclose(merged, oracles.replayed(snapshots[0], updates, rates), rtol=0, atol=1e-13)


@law
@given(merge=merges(), seed=st.integers(0, 2**32 - 1))
def test_any_merge_is_where_the_updates_lead_when_scaled_by_its_decay_curve(merge, seed):
    name, n, times, parameters = merge
    snapshots, updates = walk(np.random.default_rng(seed), n)
    merge_coefficients = compute(name, n, times=times, **parameters)
    expected = oracles.replayed(snapshots[0], updates, decay_curve(merge_coefficients))
    scale = 1 + np.abs(merge_coefficients).sum() * np.abs(snapshots).max()
    np.testing.assert_allclose(np.array(merge_coefficients) @ snapshots, expected, rtol=0, atol=1e-13 * n * scale)


def quadratic(rng, size=5):
    """A Hessian whose curvatures times the learning rate .7 reach from slow to oscillating, and its minimum."""
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return basis @ np.diag(np.linspace(0.05, 2.5, size)) @ basis.T, rng.normal(size=size)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_a_qam_merge_is_where_decayed_gradient_descent_on_a_quadratic_ends(name, n):
    rng = np.random.default_rng(n)
    start, (hessian, minimum) = 10 * rng.normal(size=5), quadratic(rng)
    constant = oracles.gradient_descent(start, hessian, minimum, [0.7] * (n - 1))
    annealed = oracles.gradient_descent(
        start, hessian, minimum, 0.7 * oracles.decay_rates(oracles.SHAPES[name], range(n))
    )
    np.testing.assert_allclose(np.array(qam(n, shape=name)) @ constant, annealed[-1], rtol=0, atol=1e-12)
    if n > 2:  # with one update the two kinds agree
        assert np.abs(np.array(decay(n, shape=name)) @ constant - annealed[-1]).max() > 1e-3


def test_a_qam_merge_of_stochastic_gradient_descent_is_right_in_expectation_only():
    """Two minibatch losses, every one of the 2^6 orders in which six steps can meet them."""
    rng = np.random.default_rng(7)
    n, start, batches = 7, 10 * rng.normal(size=5), [quadratic(rng), quadratic(rng)]
    rates = oracles.decay_rates(oracles.SHAPES["cosine"], range(n))

    def iterates(order, learning_rates):
        theta = [start]
        for batch, learning_rate in zip(order, learning_rates, strict=True):
            theta.append(oracles.gradient_descent(theta[-1], *batches[batch], [learning_rate])[-1])
        return np.array(theta)

    orders = list(itertools.product([0, 1], repeat=n - 1))
    merged = np.array([np.array(qam(n, shape="cosine")) @ iterates(order, [0.4] * (n - 1)) for order in orders])
    annealed = np.array([iterates(order, 0.4 * rates)[-1] for order in orders])
    np.testing.assert_allclose(merged.mean(axis=0), annealed.mean(axis=0), rtol=0, atol=1e-12)
    assert np.abs(merged - annealed).max() > 1e-2


@law
@given(data=st.data(), n=counts, half_life=st.floats(1.0, 1e5))
def test_what_is_one_half_life_old_and_older_holds_half_the_mass(data, n, half_life):
    times = data.draw(times_of(n))
    held = np.cumsum(ema(n, half_life=half_life, times=times))
    np.testing.assert_allclose(held, 0.5 ** ((times[-1] - np.array(times)) / half_life), rtol=0, atol=1e-13)


# Laws


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


# Uneven times, where a formula must choose


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


# Errors

NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, "1", None, 1j, 10**400, [1.0]]


@pytest.mark.parametrize("n", [0, -1, 2.0, math.nan, math.inf, True, False, "3", None, np.True_, np.float64(3)])
@pytest.mark.parametrize("name", KINDS)
def test_n_must_be_a_positive_integer(name, n):
    parameters = {"ema": {"alpha": 0.2}, "custom": {"weights": [1.0]}}.get(name, {})
    for call in (KINDS[name], lambda n, **parameters: compute(name, n, **parameters)):
        with pytest.raises(CoefficientError) as caught:
            call(n, **parameters)
        assert f"n is {n!r}; allowed are integers from 1" in str(caught.value)


def test_n_may_be_an_integer_of_numpy():
    assert sma(np.int64(4)) == sma(4)
    assert decay(np.uint8(200)) == decay(200)


@pytest.mark.parametrize("bad", NOT_NUMBERS)
def test_every_number_must_be_finite_and_a_number(bad):
    calls = {
        "alpha": lambda: ema(3, alpha=[bad] if bad is None else bad),
        "half_life": lambda: ema(3, half_life=[bad] if bad is None else bad),
        "times[1]": lambda: decay(3, times=[0, bad, 2]),
        "weights[1]": lambda: custom(3, weights=[0.5, bad, 0.5]),
        "coefficients[1]": lambda: decay_curve([0.5, bad]),
    }
    for name, call in calls.items():
        with pytest.raises(CoefficientError, match="allowed are finite numbers") as caught:
            call()
        assert str(caught.value).startswith(f"{name} is ")
    for measure in (n_eff, mean_age):
        with pytest.raises(CoefficientError, match="allowed are finite numbers"):
            measure([0.5, bad])
    with pytest.raises(CoefficientError, match="allowed are finite numbers"):
        mean_age([0.5, 0.5], times=[0, bad])


@pytest.mark.parametrize(
    ("call", "pieces"),
    [
        (lambda: ema(3), ["alpha=None and half_life=None", "exactly one", "Set alpha=0.2"]),
        (lambda: ema(3, alpha=0.2, half_life=2.0), ["alpha=0.2 and half_life=2.0", "exactly one"]),
        (lambda: ema(3, alpha=0.0), ["alpha is 0.0", "(0, 1]"]),
        (lambda: ema(3, alpha=1.5), ["alpha is 1.5", "(0, 1]"]),
        (lambda: ema(3, half_life=0), ["half_life is 0.0", "above 0", "unit of the times"]),
        (lambda: ema(3, half_life=-1.0), ["half_life is -1.0"]),
        (lambda: decay(3, times=[0, 1]), ["times has length 2", "must have 3"]),
        (lambda: decay(3, times=[0, 2, 2]), ["2.0 after 2.0", "later", "oldest to newest"]),
        (lambda: decay(3, times=[2, 1, 0]), ["1.0 after 2.0"]),
        (lambda: ema(2, alpha=0.5, times=[1, 0]), ["0.0 after 1.0"]),
        (lambda: qam(2, times=[1, 0]), ["0.0 after 1.0"]),
        (lambda: decay(3, times=7), ["times is 7", "list of numbers"]),
        (lambda: decay(3, shape=[1.0, 0.2, 0.4]), ["0.4 after 0.2", "never increase"]),
        (lambda: decay(9, shape=lambda t: 1 - t + t**2), ["rises", "never increases", "'linear'"]),
        (lambda: qam(9, shape=lambda t: 1 - t + t**2), ["rises"]),
        (lambda: custom(3, weights=[0.5, 0.5]), ["weights has length 2", "must have 3", "one number per snapshot"]),
        (lambda: custom(3, weights=[]), ["weights has length 0", "must have 3"]),
        (lambda: custom(3, weights=1.0), ["weights is 1.0", "list of numbers"]),
        (lambda: custom(3, weights="001"), ["weights is '001'", "list of numbers"]),
        (lambda: custom(2, weights=[1, 3]), ["[1.0, 3.0] sum to 4.0", "must be 1", "Normalised: [0.25, 0.75]"]),
        (lambda: custom(2, weights=[1.0, 1e-11]), ["sum to 1.00000000001"]),
        (lambda: custom(2, weights=[1, -1]), ["sum to 0.0", "positive sum"]),
        (lambda: custom(2, weights=[1e300, 1e300]), ["sum to 2e+300"]),
        (lambda: custom(2, weights=[1.5e308, 1.5e308]), ["weights[0] is 1.5e+308", "finite numbers"]),
        (lambda: decay(2, times=[-1.5e308, 1.5e308]), ["times[0] is -1.5e+308"]),
        (lambda: decay_curve([]), ["coefficients has length 0", "at least 1"]),
        (lambda: n_eff([0.5, 0.6]), ["sum to 1.1"]),
        (lambda: mean_age([0.5, 0.5], times=[0, 1, 2]), ["times has length 3", "must have 2"]),
        (
            lambda: compute("smaa", 3),
            ["kind: 'smaa'", "sma, wma, ema, power, custom", "Did you mean 'sma'?"],
        ),
        (lambda: compute("DECAY", 3), ["Did you mean 'decay'?"]),
        (lambda: compute("zzz", 3), ["'zzz'", "sma, wma", "Use one of those"]),
        (lambda: compute("1-sqrt", 3), ["'1-sqrt' is a shape", "use kind 'decay' with shape='1-sqrt'"]),
        (lambda: compute(None, 3), ["None"]),
        (lambda: compute("decay", 3, shpae="linear"), ["'shpae'", "known: shape", "Did you mean 'shape'?"]),
        (lambda: compute("ema", 3, halflife=2), ["known: alpha, half_life", "Did you mean 'half_life'?"]),
        (lambda: compute("sma", 3, alpha=0.2), ["parameter of 'sma': 'alpha'", "known: none"]),
        (lambda: compute("sma", 3, n=3), ["parameter of 'sma': 'n'"]),
        (lambda: compute("custom", 3), ["'custom' was given []", "without 'weights'", "Set 'weights'"]),
    ],
)
def test_a_refusal_says_what_was_given_what_is_allowed_and_what_to_do(call, pieces):
    with pytest.raises(CoefficientError) as caught:
        call()
    assert [piece for piece in pieces if piece not in str(caught.value)] == []


@law
@given(n=counts, data=st.data())
def test_the_normalised_list_of_the_message_can_be_pasted(n, data):
    weights = data.draw(st.lists(st.floats(0.0, 1e3), min_size=n, max_size=n))
    assume(math.fsum(weights) > 1e-3 and abs(math.fsum(weights) - 1.0) > 1e-12)
    with pytest.raises(CoefficientError) as caught:
        custom(n, weights=weights)
    pasted = str(caught.value).partition("Normalised: [")[2].removesuffix("].").split(", ")
    assert_close(custom(n, weights=[float(text) for text in pasted]), np.array(weights) / sum(weights), n)


def test_lists_of_a_yaml_file_are_taken():
    config = OmegaConf.create({"weights": [0.25, 0.75], "shape": [1.0, 0.5, 0.0], "times": [10, 20]})
    assert compute("custom", 2, weights=config.weights) == (0.25, 0.75)
    assert compute("decay", 2, shape=config.shape, times=config.times) == (0.5, 0.5)


# By name, and new kinds


@law
@given(merge=merges())
def test_compute_calls_the_kind_and_hands_times_only_to_kinds_that_take_them(merge):
    name, n, times, parameters = merge
    takes_times = {"times": times} if name in ("ema", "power", "decay", "qam") else {}
    assert compute(name, n, times=times, **parameters) == KINDS[name](n, **parameters, **takes_times)


@pytest.fixture
def scratch_kinds(monkeypatch):
    monkeypatch.setattr(registry, "KINDS", dict(KINDS))


@pytest.mark.usefixtures("scratch_kinds")
def test_a_new_kind_is_one_decorated_function():
    @kind
    def trimmed(n, *, ends=1, times=None):
        """Every snapshot the same, without the outermost at either end."""
        inner = n - 2 * ends
        return (0.0,) * ends + (1 / inner,) * inner + (0.0,) * ends

    assert compute("trimmed", 4, times=[0, 1, 5, 6]) == (0.0, 0.5, 0.5, 0.0)
    assert compute("trimmed", 6, ends=2) == (0.0, 0.0, 0.5, 0.5, 0.0, 0.0)
    with pytest.raises(CoefficientError, match="Did you mean 'trimmed'"):
        compute("trimed", 4)
    with pytest.raises(CoefficientError, match=r"known: ends\. Did you mean 'ends'"):
        compute("trimmed", 4, end=1)


@pytest.mark.usefixtures("scratch_kinds")
@pytest.mark.parametrize(
    ("returned", "piece"),
    [
        ((0.5, 0.5), "length 2 and must have 3"),
        ((0.5, 0.5, 0.5), "sum to 1.5"),
        ((math.nan,) * 3, "nan"),
        (None, "None"),
    ],
)
def test_a_new_kind_that_breaks_the_promise_is_caught(returned, piece):
    @kind
    def broken(n):
        return returned

    with pytest.raises(CoefficientError) as caught:
        compute("broken", 3)
    assert "the coefficients of kind 'broken'" in str(caught.value)
    assert piece in str(caught.value)


def test_coefficients_load_neither_numpy_nor_torch():
    code = "import sys, pretrain_merge.coefficients; print(*sorted({'numpy', 'torch', 'lightning'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_qam_is_computed_once_for_snapshots_that_move_on_evenly():
    replays._chances_of_steps.cache_clear()
    for newest in range(3000, 3050):
        compute("qam", 300, shape="cosine", times=range(10 * (newest - 299), 10 * newest + 1, 10))
    assert replays._chances_of_steps.cache_info().misses == 1
    compute("qam", 300, shape="linear")
    assert replays._chances_of_steps.cache_info().misses == 2


@pytest.mark.parametrize("name", ["ema", "qam"])
def test_coefficients_of_a_long_window_take_linear_time_in_python(name):
    calls = []
    parameters = {"ema": {"alpha": 0.2}, "qam": {"shape": "linear"}}[name]
    sys.setprofile(lambda frame, event, arg: calls.append(event))
    try:
        for n in (200, 400):
            calls.append(n)
            compute(name, n, **parameters)
    finally:
        sys.setprofile(None)
    first, second = calls.index(400) - calls.index(200), len(calls) - calls.index(400)
    assert second < 3 * first


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_no_kind_sees_an_impossible_number(n, monkeypatch):
    monkeypatch.setattr(registry, "KINDS", dict(KINDS))

    @kind
    def seen(n):
        raise AssertionError(n)

    with pytest.raises(CoefficientError, match="allowed are integers from 1"):
        seen(n)


def test_a_kind_of_ones_own_sees_times_as_they_may_be_and_must_sum_to_one(monkeypatch):
    monkeypatch.setattr(registry, "KINDS", dict(KINDS))
    asked = []

    @kind
    def newest(n, *, times=()):
        asked.append(times)
        return (0.0,) * (n - 1) + (times[-1],)

    assert newest(2) == (0.0, 1.0)
    assert newest(2, times=[0, 1]) == compute("newest", 2, times=[0, 1]) == (0.0, 1.0)
    assert asked == [(0.0, 1.0)] * 3
    with pytest.raises(CoefficientError, match=r"the coefficients of kind 'newest'.*sum to 2"):
        newest(2, times=[0, 2])
    with pytest.raises(CoefficientError, match="each must be later"):
        newest(2, times=[1, 0])
    with pytest.raises(CoefficientError, match="must have 3"):
        newest(3, times=[0, 1])


# --- horizons that grow with the run ---


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
