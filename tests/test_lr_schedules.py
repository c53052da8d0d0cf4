"""Decay shapes: the four named ones, lists and callables, and what is refused."""

import itertools
import math

import numpy as np
import pytest
from harness import oracles
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_merge.errors import CoefficientError
from pretrain_merge.lr_schedules import ROUNDING, SHAPES, factors, shape

GRID = np.linspace(0.0, 1.0, 101)
law = settings(deadline=None)

falling_lists = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20).map(lambda rest: [1.0, *sorted(rest)[::-1]])


@pytest.mark.parametrize("name", SHAPES)
def test_a_named_shape_is_its_formula(name):
    computed = [shape(name)(t) for t in GRID]
    np.testing.assert_allclose(computed, [oracles.SHAPES[name](t) for t in GRID], rtol=0, atol=4 * 2.0**-53)


@pytest.mark.parametrize("name", SHAPES)
def test_a_named_shape_falls_from_one_to_zero(name):
    rates = [shape(name)(t) for t in GRID]
    assert rates[0] == 1.0
    assert rates[-1] == 0.0
    assert all(np.diff(rates) < 0.0)


def test_every_named_shape_has_an_oracle():
    assert set(SHAPES) == set(oracles.SHAPES)


def test_the_named_shapes_cannot_be_overwritten():
    with pytest.raises(TypeError):
        SHAPES["linear"] = math.cos  # type: ignore[index]


@law
@given(knots=falling_lists, t=st.floats(0.0, 1.0))
def test_a_list_of_factors_is_joined_by_straight_lines(knots, t):
    expected = np.interp(t, np.linspace(0.0, 1.0, len(knots)), knots)
    assert shape(knots)(t) == pytest.approx(expected, abs=1e-13)


@law
@given(knots=falling_lists, positions=st.lists(st.floats(0.0, 1.0), max_size=30).map(sorted))
def test_factors_never_increase_and_stay_within_zero_and_one(knots, positions):
    rates = [1.0, *factors(knots, positions), 0.0]
    assert len(rates) == len(positions) + 2
    assert all(after <= before for before, after in itertools.pairwise(rates))


def test_a_list_may_come_as_an_array_and_need_not_end_at_zero():
    assert shape(np.array([1.0, 0.4, 0.2]))(1.0) == pytest.approx(0.2, abs=1e-15)


def test_a_callable_is_used_as_it_is():
    assert factors(lambda t: (1.0 - t) ** 3, [0.0, 0.5, 1.0]) == (1.0, 0.125, 0.0)


def test_rounding_is_not_taken_for_an_increase():
    wobble = ROUNDING / 2
    flat_then_up = factors(lambda t: 0.5 + wobble if t == 0.75 else 0.5 if t else 1.0 + wobble, [0.25, 0.5, 0.75])
    assert flat_then_up == (0.5, 0.5, 0.5)
    assert shape(lambda t: 1.0 if t == 0.0 else -wobble)(1.0) == 0.0
    assert factors([1.0 + wobble, 1.0 + wobble, -wobble], [0.5, 1.0]) == (1.0, 0.0)


def test_an_increase_beyond_rounding_is_refused():
    with pytest.raises(CoefficientError, match="rises"):
        factors(lambda t: 1.0 if t == 0.0 else 0.5 + 3 * ROUNDING * t, [0.1, 0.9])


@pytest.mark.parametrize(
    ("spec", "pieces"),
    [
        ("linaer", ["'linaer'", "'1-sqrt'", "Did you mean 'linear'?"]),
        ("minus-sqrt", ["Did you mean '1-sqrt'?"]),
        ("COSINE", ["Did you mean 'cosine'?"]),
        ("xyz", ["'xyz'", "'linear', 'cosine', '1-sqrt', '1-square'", "callable"]),
        ([3e-4, 1.5e-4, 0.0], ["0.0003", "start at 1", "Divide the list by its first entry"]),
        ([1.0, 0.5, 0.6], ["factor 2", "0.6 after 0.5", "never increase"]),
        ([1.0, math.nan], ["factor 1", "nan"]),
        ([1.0, -0.1], ["factor 1", "-0.1", "[0, 1]"]),
        ([math.nan, 0.5], ["start at nan"]),
        ([math.inf, 0.5], ["start at inf"]),
        ([10**400, 0.5], ["start at 1000"]),
        ([1.0], ["at least two"]),
        ([], ["at least two"]),
        ([True, 0.0], ["[True, 0.0]", "at least two learning-rate factors"]),
        ([1.0, "0.5"], ["'0.5'", "a list of at least two"]),
        (0.5, ["shape is 0.5", "'linear'", "callable"]),
        (None, ["shape is None"]),
        (lambda t: 3e-4 * (1.0 - t), ["0.0003 at t=0", "Divide learning rates by their peak"]),
        (lambda t: math.nan, ["nan", "t=0", "from 0 to 1"]),
        (lambda t: 1.0 + t, ["returned 1.5 at t=0.5"]),
        (lambda t: 1.0 - 4.0 * t, ["returned -1.0 at t=0.5"]),
        (lambda t: "high", ["'high'", "fraction of the peak rate"]),
    ],
)
def test_what_is_no_decay_is_refused(spec, pieces):
    with pytest.raises(CoefficientError) as caught:
        factors(spec, [0.5])
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
