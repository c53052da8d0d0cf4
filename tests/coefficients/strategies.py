"""Hypothesis strategies of coefficients: kinds with parameters that fit, times at any spacing."""

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from pretrain_merge.coefficients import KINDS
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


# What each kind can be asked for: n -> its parameters. A new kind adds its line here, and every law holds for it.
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
    "extrapolated": lambda n: st.fixed_dictionaries({"step": st.floats(0.0, 2.0)}),
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
