"""The look-up of the paper's interval: its rows exactly, between them in logarithms, beyond them the last row."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_merge.plan.paper import DENSE, MIXTURES, used_for


@pytest.mark.parametrize(
    ("activated", "has_experts", "interval", "window"),
    [
        (411e6, False, 2e9, 10),
        (2e9, False, 5e9, 6),
        (8e9, False, 15e9, 10),
        (70e9, False, 40e9, 10),
        (0.7e9, True, 4e9, 10),
        (1.3e9, True, 8e9, 10),
        (10e9, True, 80e9, 10),
    ],
)
def test_a_row_of_the_paper_is_given_as_it_is(activated, has_experts, interval, window):
    advice = used_for(activated, has_experts=has_experts)
    assert (advice.interval, advice.window) == (interval, window)
    assert "interpolated" not in advice.how
    assert "arXiv 2505.12082" in advice.how


def test_halfway_between_two_rows_is_their_geometric_mean():
    advice = used_for(math.sqrt(2e9 * 8e9), has_experts=False)
    assert advice.interval == pytest.approx(math.sqrt(5e9 * 15e9), rel=0.06)  # two digits
    assert advice.how.startswith("interpolated between dense 2B and 8B")


@pytest.mark.parametrize(
    ("activated", "has_experts", "row"), [(1e6, False, DENSE[0]), (4e11, False, DENSE[-1]), (17e9, True, MIXTURES[-1])]
)
def test_beyond_the_rows_it_is_the_nearest_and_says_so(activated, has_experts, row):
    advice = used_for(activated, has_experts=has_experts)
    assert advice.interval == row.interval
    assert advice.how.startswith("beyond the rows of PMA")
    assert row.name in advice.how


@given(st.floats(1e6, 1e12), st.booleans())
def test_it_never_leaves_the_range_of_its_rows(activated, has_experts):
    rows = MIXTURES if has_experts else DENSE
    assert rows[0].interval <= used_for(activated, has_experts=has_experts).interval <= rows[-1].interval
