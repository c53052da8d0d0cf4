"""Parts of a metric that ranks measured add up to that of all data."""

import math

import pytest

from pretrain_merge.evaluation.reduction import Part, over_ranks
from pretrain_merge.runtime import ranks


@pytest.fixture
def of_ranks(monkeypatch):
    """What ranks gave, the first of them this one."""

    def reduced(*parts):
        monkeypatch.setattr(ranks, "gather", lambda _: list(parts))
        return over_ranks(parts[0])

    return reduced


def test_a_mean_is_weighted_by_what_it_was_found_on(of_ranks):
    assert of_ranks({"loss": Part(1.0, 3.0)}, {"loss": Part(5.0, 1.0)}) == {"loss": 2.0}


def test_a_mean_of_equal_numbers_is_that_number_whatever_the_weights(of_ranks):
    assert of_ranks(*({"loss": Part(0.1, weight)} for weight in (3.0, 7.0, 11.0))) == {"loss": 0.1}


def test_sums_and_extremes_hold_over_all_ranks(of_ranks):
    parts = [{how: Part(value, how=how) for how in ("sum", "max", "min")} for value in (2.0, -1.0, 5.0)]
    assert of_ranks(*parts) == {"sum": 6.0, "max": 5.0, "min": -1.0}


def test_a_sum_of_ranks_that_read_the_same_data_counts_them_once(of_ranks):
    assert of_ranks(*[{"sum": Part(4.0, 0.5, "sum")}] * 2) == {"sum": 4.0}


@pytest.mark.parametrize("how", ["mean", "sum", "max", "min"])
@pytest.mark.parametrize("first", [True, False])
def test_one_value_that_is_not_a_number_makes_all_of_it_none(of_ranks, how, first):
    parts = [{"loss": Part(math.nan, how=how)}, {"loss": Part(1.0, how=how)}]
    assert math.isnan(of_ranks(*(parts if first else parts[::-1]))["loss"])


def test_what_one_rank_alone_measured_is_its_own(of_ranks):
    assert of_ranks({}, {"sum": Part(4.0, 0.5, "sum"), "loss": Part(1.5, 8.0)}) == {"sum": 4.0, "loss": 1.5}


def test_one_process_keeps_every_bit():
    assert over_ranks({"loss": Part(0.1, 3.0), "sum": Part(0.7, 0.5, "sum")}) == {"loss": 0.1, "sum": 0.7}
