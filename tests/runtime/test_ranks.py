"""All ranks agree before anything collective; and the harness that runs them says what went wrong."""

import time

import pytest
import torch
import torch.distributed as dist
from harness.ranks import on_ranks
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.runtime import ranks as package_ranks


def agreement():
    rank = dist.get_rank()
    return {
        "rank": package_ranks.rank(),
        "num_ranks": package_ranks.num_ranks(),
        "sums": package_ranks.sum_over_ranks([rank + 1, 10**15 + rank]),
        "none": package_ranks.any_rank(False),
        "one": package_ranks.any_rank(rank == 1),
        "held": refused_on_one_rank(),
        "told": failures_one_after_another(),
    }


def failures_one_after_another():
    """What each rank meets: a failure on one of them, and another one while the first is handled."""
    met = []
    try:
        with package_ranks.all_or_none("begin"):
            fail_on_rank_1("first")
    except Exception as first:
        met.append(str(first))
        try:
            with package_ranks.all_or_none("save because of that"):
                fail_on_rank_1("second")
        except Exception as second:
            met.append(str(second))
    return met


def fail_on_rank_1(reason):
    if dist.get_rank() == 1:
        raise ValueError(reason)


def refused_on_one_rank():
    """The steps that each rank holds after one of them met a NaN in its part of the weights."""
    module, merging = nn.Linear(1, 1, bias=False), RollingMerger(window=4, every=10)
    for step in range(1, 51):
        with torch.no_grad():
            module.weight.fill_(float("nan") if step == 20 and dist.get_rank() == 1 else step)
        merging.observe(module, step)
    return [item.progress.step for item in merging.window.valid], merging.num_refused


@pytest.fixture(scope="module")
def agreed():
    return on_ranks(agreement)


def test_every_rank_knows_its_number_and_how_many_there_are(agreed):
    assert [result["rank"] for result in agreed] == [0, 1]
    assert [result["num_ranks"] for result in agreed] == [2, 2]


def test_counts_are_summed_exactly_and_everybody_gets_the_sum(agreed):
    assert [result["sums"] for result in agreed] == [[3, 2 * 10**15 + 1]] * 2


def test_a_flag_on_one_rank_is_seen_by_all(agreed):
    assert [(result["none"], result["one"]) for result in agreed] == [(False, True)] * 2


def test_a_snapshot_that_one_rank_refuses_is_refused_by_all(agreed):
    assert [result["held"] for result in agreed] == [([30, 40, 50], 1)] * 2


def test_a_failure_while_another_is_handled_is_told_as_well(agreed):
    assert agreed[1]["told"] == ["first", "second"]
    assert agreed[0]["told"] == [
        "cannot begin: rank 1 failed with ValueError: first",
        "cannot save because of that: rank 1 failed with ValueError: second",
    ]


def test_one_process_needs_no_group():
    assert (package_ranks.rank(), package_ranks.num_ranks()) == (0, 1)
    assert package_ranks.sum_over_ranks([3, 4]) == [3, 4]
    assert package_ranks.any_rank(True)
    assert not package_ranks.any_rank(False)


def one_rank_fails():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 gave up")
    wait_for_nothing()


def wait_for_nothing():
    time.sleep(600)


def test_a_rank_that_fails_stops_the_others_and_shows_where_they_were():
    with pytest.raises(AssertionError) as caught:
        on_ranks(one_rank_fails)
    report = str(caught.value)
    assert "ValueError: rank 1 gave up" in report
    assert "--- rank 0: still running, stacks below ---" in report
    assert "in wait_for_nothing" in report
