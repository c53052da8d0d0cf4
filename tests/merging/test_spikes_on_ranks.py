"""A spike on one rank is a break on all, at the same step; what was not read yet is resumed as all ranks had it."""

import torch
from harness.ranks import on_ranks
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.runtime import ranks

_SPIKE = range(60, 66)


def _spikes_on_one_rank(where):
    model, merger = nn.Linear(2, 1), RollingMerger(window=8, every=10, breaks={"distrust": 5})
    for step in range(1, 81):
        spikes = ranks.rank() == where and step in _SPIKE
        loss = None if ranks.rank() == 1 and step == 30 else torch.tensor(2.0 + 0.01 * (step * 7 % 11) + 3.0 * spikes)
        before = merger.progress
        merger.observe(model, step)
        merger.judge(before, loss)
    last = merger.window.last_break
    return [last.step, last.reason, [item.progress.step for item in merger.window.snapshots], merger.num_spikes]


def test_a_spike_on_one_rank_is_one_on_all():
    for where in (0, 1):
        first, second = on_ranks(_spikes_on_one_rank, where)
        assert first == second
        assert first[0] == 70
        assert first[2] == [10, 20, 30, 40, 50, 80]
        assert first[3] == 1


def _kept_between_two_reads():
    merger = RollingMerger(window=8, every=100)
    model = nn.Linear(2, 1)
    for step in range(1, 67):
        before = merger.progress
        merger.observe(model, step)
        merger.judge(before, torch.tensor(float(ranks.rank())))
    merger.meet()
    return str(merger._spikes.state_dict())


def test_what_was_not_read_yet_is_kept_as_all_ranks_had_it():
    first, second = on_ranks(_kept_between_two_reads)
    assert first == second
