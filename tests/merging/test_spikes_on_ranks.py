"""A spike on one rank is a break on all, at the same step; what was not read yet is resumed as all ranks had it."""

from pathlib import Path

import torch
from harness.ranks import on_ranks
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.cadence import Progress
from pretrain_merge.config import SaveConfig
from pretrain_merge.merged_models.retention import MergedModels
from pretrain_merge.records import Recipe
from pretrain_merge.runtime import ranks

_SPIKE = range(60, 66)


def _spikes_on_one_rank(where, folder):
    torch.manual_seed(0)
    model, merger = nn.Linear(2, 1), RollingMerger(window=8, every=10, breaks={"distrust": 5})
    saved = MergedModels(Path(folder) / "merged", SaveConfig(best="loss"), {})
    for step in range(1, 81):
        spikes = ranks.rank() == where and step in _SPIKE
        loss = None if ranks.rank() == 1 and step == 30 else torch.tensor(2.0 + 0.01 * (step * 7 % 11) + 3.0 * spikes)
        before = merger.progress
        merger.observe(model, step)
        damage = merger.judge(before, loss)
        if damage is not None:
            saved.withdraw(damage.after, damage.reason)
        if step in (20, 60):
            trusted = merger.trusted_until
            saved.save_if_due(
                model, "sma", Progress(step), Recipe((step,), (1.0,)), {"loss": -float(step)}, trusted_until=trusted
            )
    last = merger.window.last_break
    held = [item.progress.step for item in merger.window.snapshots]
    return [last.step, last.reason, held, merger.num_spikes, saved.best_path.name, saved.withdrawn]


def test_a_spike_on_one_rank_is_one_on_all(tmp_path):
    for where in (0, 1):
        first, second = on_ranks(_spikes_on_one_rank, where, str(tmp_path / str(where)))
        assert first == second
        assert first[0] == 70
        assert first[2] == [10, 20, 30, 40, 50, 80]
        assert first[3] == 1
        assert first[4] == "step-00000020-sma"
        assert list(first[5]) == ["step-00000060-sma"]


def _told_on_one_rank():
    """Of other data, whose loss is higher, before it comes."""
    model, merger = nn.Linear(2, 1), RollingMerger(window=8, every=100)
    for step in range(1, 121):
        if step == 95 and ranks.rank() == 1:
            merger.mark_phase("other data")
        merger.observe(model, step, loss=torch.tensor(2.0 + 0.01 * (step * 7 % 11) + (step >= 95)))
    return merger.num_spikes, str(merger._spikes.state_dict())


def test_a_phase_that_one_rank_is_told_of_is_no_spike_on_any():
    first, second = on_ranks(_told_on_one_rank)
    assert first == second
    assert first[0] == 0


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
