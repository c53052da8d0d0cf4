"""`average: block`: the mean of a whole interval, or no snapshot."""

import numpy as np
import pytest
import torch
from harness import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from merging.moved_models import counting, held, model_at, rates

from pretrain_merge import RollingMerger
from pretrain_merge.cadence import Progress


def stored(merging, module):
    """The newest snapshot of a model of one number."""
    out = module.weight.detach().clone()
    merging._stored._store.read_([out], merging.window.newest.slot)
    return out.item()


@pytest.mark.parametrize(("sample_every", "last"), [(1, [31, 40]), (3, [33, 39]), (7, [35, 35]), (10, [40, 40])])
def test_a_block_is_the_mean_of_the_models_sampled_after_the_last_multiple_up_to_this_one(sample_every, last):
    merging = RollingMerger(window=4, every=10, average="block", sample_every=sample_every, span=None)
    module, taken = counting(merging, range(1, 41))
    assert taken == [10, 20, 30, 40]
    sampled = [[step for step in range(k + 1, k + 11) if step % sample_every == 0] for k in (0, 10, 20, 30)]
    assert [sampled[-1][0], sampled[-1][-1]] == last
    with merging.merged(module, "sma"):
        assert module.weight.item() == pytest.approx(np.mean([np.mean(block) for block in sampled]), rel=1e-6)
    assert module.weight.item() == 40.0


@settings(max_examples=40, deadline=None)
@given(strategies.runs(slowest=1), st.integers(70, 200), st.sampled_from(["samples", "tokens"]))
def test_a_block_mean_is_the_mean_of_its_interval_or_there_is_none(run, amount, unit):
    merging, module = RollingMerger(window=64, every=f"{amount} {unit}", average="block"), model_at()
    blocks, means, before = {}, {}, Progress()
    for progress in run:
        with torch.no_grad():
            module.weight.fill_(progress.step)
        block = -(-progress.count(unit) // amount)  # the k of ((k-1)V, kV]
        blocks.setdefault(block, []).append(progress.step)
        if progress.step > before.step + 1:  # a step that nobody saw may lie in any of these
            for doubtful in range(before.count(unit) // amount + 1, block + 1):
                blocks[doubtful] = [float("nan")]
        if merging.observe(module, progress):
            means[progress.count(unit) // amount] = stored(merging, module)
        before = progress
    for block, mean in means.items():
        assert mean == pytest.approx(np.mean(blocks[block]), rel=1e-6)


def test_a_block_counts_iterates_by_tokens():
    merging, module = RollingMerger(window=4, every="100 tokens", average="block"), model_at()
    taken = []
    for step in range(1, 11):  # 40 tokens each: blocks of steps 1-2, 3-5, 6-7, 8-10
        with torch.no_grad():
            module.weight.fill_(step)
        if merging.observe(module, Progress(step, tokens=40 * step)):
            taken.append(step)
    assert taken == [3, 5, 8, 10]
    with merging.merged(module, "sma"):
        assert module.weight.item() == pytest.approx(np.mean([1.5, 4.0, 6.5, 9.0]))


def test_a_block_with_a_break_in_it_is_dropped_and_said(caplog):
    merging = RollingMerger(window=6, every=10, average="block")
    rates(merging, lambda step: 0.1 if step < 34 else 0.2)
    assert held(merging) == [50, 60]
    assert "step 40: no block mean, since its interval was not observed from its start" in caplog.text


def test_a_break_between_two_blocks_costs_none():
    merging = RollingMerger(window=6, every=10, average="block")
    rates(merging, lambda step: 0.1 if step <= 30 else 0.2)
    assert held(merging) == [40, 50, 60]


def test_a_block_with_steps_that_nobody_saw_is_dropped():
    merging = RollingMerger(window=6, every=10, average="block")
    _, taken = counting(merging, [*range(1, 24), *range(26, 51)])
    assert taken == [10, 20, 40, 50]


def test_steps_that_nobody_saw_across_a_boundary_cost_both_blocks():
    merging = RollingMerger(window=6, every=10, average="block")
    _, taken = counting(merging, [*range(1, 19), *range(23, 51)])
    assert taken == [10, 40, 50]


def test_a_resumed_run_drops_the_block_whose_start_it_did_not_see():
    merging = RollingMerger(window=6, every=10, average="block")
    merging.resume_from(Progress(25))
    assert counting(merging, range(26, 51))[1] == [40, 50]


def test_a_resumed_run_keeps_the_block_that_starts_with_it():
    merging = RollingMerger(window=6, every=10, average="block")
    merging.resume_from(Progress(20))
    assert counting(merging, range(21, 41))[1] == [30, 40]


def test_a_block_before_start_is_no_snapshot_and_the_next_one_is_whole():
    merging, module = RollingMerger(window=6, every="100 tokens", start="200 tokens", average="block"), model_at()
    taken = []
    for step in range(1, 8):  # 60 tokens each: step 2 overshoots 100 and is the first of block (100, 200]
        with torch.no_grad():
            module.weight.fill_(step)
        if merging.observe(module, Progress(step, tokens=60 * step)):
            taken.append(step)
    assert taken == [4, 5, 7]
    with merging.merged(module, "sma"):
        assert module.weight.item() == pytest.approx(np.mean([2.5, 4.5, 6.0]))


def test_a_block_that_met_a_value_that_is_not_finite_is_refused():
    merging, module = RollingMerger(window=6, every=10, average="block"), model_at()
    for step in range(1, 51):
        with torch.no_grad():
            module.weight.fill_(float("inf") if step == 15 else step)
        merging.observe(module, step)
    assert merging.num_refused == 1
    assert held(merging) == [30, 40, 50]
