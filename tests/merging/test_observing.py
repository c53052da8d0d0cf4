"""Which steps become snapshots and merge points, and which counters are refused."""

import numpy as np
import pytest
import torch
from merging.moved_models import counting, held, model_at, observe_at

from pretrain_merge import RollingMerger
from pretrain_merge.cadence import Progress
from pretrain_merge.errors import ProgressError


def test_snapshots_are_taken_where_the_interval_is_crossed():
    merging = RollingMerger(window=10, every=10, start=20)
    _, taken = counting(merging, [3, 10, 19, 23, 24, 31, 40, 65])
    assert taken == [23, 31, 40, 65]
    assert held(merging) == taken


def test_the_window_keeps_the_newest_and_reuses_their_memory():
    merging = RollingMerger(window=3, every=1)
    module, _ = counting(merging, range(1, 12))
    assert held(merging) == [9, 10, 11]
    with merging.merged(module, "sma"):
        assert module.weight.item() == 10.0


@pytest.mark.parametrize(("merge_every", "expected"), [(None, [20, 30, 40, 50]), (20, [20, 40]), (25, [30, 50])])
def test_merges_are_due_at_the_first_snapshot_at_or_after_a_multiple(merge_every, expected):
    merging, due, module = RollingMerger(window=4, every=10, merge_every=merge_every), [], model_at()
    for step in range(1, 56):
        observe_at(merging, module, step)
        due += [step] if merging.merge_is_due() else []
    assert due == expected


def test_merges_may_be_due_in_another_unit_than_snapshots():
    merging, due, module = RollingMerger(window=4, every="10 steps", merge_every="1K tokens"), [], model_at()
    for step in range(1, 61):
        merging.observe(module, Progress(step, tokens=37 * step))
        due += [step] if merging.merge_is_due() else []
    assert due == [30, 60]  # 1000 tokens are crossed at step 28, 2000 at step 55


def test_a_merge_is_due_once_per_snapshot():
    merging = RollingMerger(window=4, every=10)
    module, _ = counting(merging, range(1, 21))
    assert merging.merge_is_due()
    assert merging.merge_is_due()  # asking changes nothing
    observe_at(merging, module, 21)
    assert not merging.merge_is_due()


@pytest.mark.parametrize("step", [5, 4, 0])
def test_a_step_that_does_not_grow_is_refused(step):
    merging = RollingMerger(window=4, every=10)
    merging.observe(model_at(), 5)
    with pytest.raises(ProgressError) as caught:
        merging.observe(model_at(), step)
    assert f"Progress(step={step}, samples=0, tokens=0) after Progress(step=5" in str(caught.value)
    assert "once after each optimizer step with totals" in str(caught.value)


def test_tokens_that_shrink_are_refused():
    merging = RollingMerger(window=4, every=10)
    merging.observe(model_at(), Progress(1, tokens=50))
    with pytest.raises(ProgressError, match="other counters must not shrink"):
        merging.observe(model_at(), Progress(2, tokens=49))


def test_a_run_that_goes_on_takes_no_snapshot_for_what_lies_behind_it():
    merging = RollingMerger(window=4, every=10)
    merging.resume_from(Progress(57))
    _, taken = counting(merging, range(58, 72))
    assert taken == [60, 70]


def test_a_share_counts_from_a_break_between_two_of_its_points():
    merging = RollingMerger(window=4, every="10%")
    _, taken = counting(merging, range(1, 206))
    merging.mark_phase("long")  # at step 205; the point after 201 would be 222
    _, more = counting(merging, range(206, 220))
    assert taken[-1] == 201
    assert more == [*range(206, 216), 217, 218, 219]  # as from the begin of a run: 1 to 10, 12, 13, 14


def test_a_run_that_goes_back_asks_anew_where_the_next_snapshot_is():
    merging = RollingMerger(window=4, every=100)
    counting(merging, range(101, 151))
    merging.resume_from(Progress(57))
    _, taken = counting(merging, [110])  # among the steps that were known to be quiet before
    assert taken == [110]


def test_counters_rates_and_phase_of_the_last_step_can_be_read():
    merging, module = RollingMerger(window=4, every=10), model_at()
    merging.observe(module, Progress(3, 30, 300), lr=[0.1, 0.2])
    merging.mark_phase("long")
    assert merging.progress == Progress(3, 30, 300)
    assert merging.lr == (0.1, 0.2)
    assert merging.phase == "long"


@pytest.mark.parametrize("lr", [0.1, np.float32(0.1), torch.tensor(0.1), [0.1], (torch.tensor(0.1),)], ids=repr)
def test_a_rate_may_be_any_kind_of_number(lr):
    merging = RollingMerger(window=4, every=10)
    merging.observe(model_at(), 1, lr=lr)
    assert merging.lr == pytest.approx((0.1,))
