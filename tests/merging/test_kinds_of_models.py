"""What is merged of a model: ties, frozen parameters, buffers, BatchNorm, compiled modules, smaller slots."""

import numpy as np
import pytest
import torch
from merging.moved_models import Mixed, assert_is_merge, counting, held, model_at, move, state, train, values
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.errors import UnsupportedModelError


def test_p22_ties_frozen_parameters_and_other_state_stay_live():
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    train(module, merging, range(1, 21))
    before = state(module)
    with merging.merged(module, "sma"):
        after = state(module)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
        assert module.tied.weight is module.layers[0].weight


def test_chosen_buffers_are_merged_and_come_back():
    module, merging = Mixed(), RollingMerger(window=4, every=5, merge_buffers=["bias"])
    seen = {}
    train(module, merging, range(1, 21), after_step=lambda step: seen.update({step: module.bias.double().numpy()}))
    raw = state(module)
    with merging.merged(module, "sma"):
        np.testing.assert_allclose(module.bias, np.mean([seen[s] for s in (5, 10, 15, 20)], axis=0), rtol=1e-6)
    assert state(module) == raw


@pytest.mark.parametrize(("choice", "merged"), [("live", False), ("merge", True)])
def test_batch_norm_statistics_are_live_or_merged_as_chosen(choice, merged):
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    merging = RollingMerger(window=4, every=1, batch_norm=choice)
    for step in range(1, 5):
        module(torch.randn(8, 3) * step)
        merging.observe(module, step)
    before = module[1].running_var.clone()
    with merging.merged(module, "sma"):
        assert torch.equal(module[1].running_var, before) != merged
        assert module[1].num_batches_tracked == 4
    assert torch.equal(module[1].running_var, before)


def test_a_model_with_batch_norm_is_refused_at_its_first_snapshot():
    merging = RollingMerger(window=4, every=1)
    with pytest.raises(UnsupportedModelError, match="batch_norm='live'"):
        merging.observe(nn.BatchNorm1d(3), 1)


def test_a_compiled_model_and_the_model_inside_it_are_one():
    module, merging = Mixed((torch.float32,)), RollingMerger(window=4, every=5)
    compiled = torch.compile(module, backend="eager")
    trajectory = train(module, merging, range(1, 11))
    for step in range(11, 21):
        move(module, step)
        merging.observe(compiled, step, lr=0.1)
        trajectory[step] = values(module)
    assert held(merging) == [5, 10, 15, 20]
    with merging.merged(compiled, "sma") as recipe:
        assert_is_merge(module, trajectory, recipe.steps, recipe.coefficients)


def test_gradients_and_hooks_are_not_touched():
    module, merging = nn.Linear(3, 1), RollingMerger(window=4, every=1)
    for step in range(1, 4):
        move(module, step)
        merging.observe(module, step)
    module(torch.ones(1, 3)).sum().backward()
    gradient, parameter = module.weight.grad.clone(), module.weight
    with merging.merged(module, "sma"):
        assert module.weight is parameter
    assert torch.equal(module.weight.grad, gradient)


@pytest.mark.parametrize("average", ["last", "block"])
def test_a_closed_merger_holds_no_snapshots_and_can_start_again(average):
    merging = RollingMerger(window=3, every=10, average=average)
    counting(merging, range(1, 31))
    merging.close()
    assert merging.window.snapshots == ()
    assert merging._stored._store is None
    module, _ = counting(merging, range(31, 51))
    with merging.merged(module, "sma"):
        assert module.weight.item() == (45.0 if average == "last" else 40.5)


def test_smaller_slots_round_each_snapshot_once():
    module, merging = model_at(), RollingMerger(window=4, every=1, slot_dtype="bfloat16")
    values_ = [1.001, 2.003, 3.005, 4.007]
    for step, value in enumerate(values_, start=1):
        with torch.no_grad():
            module.weight.fill_(value)
        merging.observe(module, step)
    raw = module.weight.item()
    with merging.merged(module, "sma"):
        rounded = torch.tensor(values_).bfloat16().double().mean().item()
        assert module.weight.item() == pytest.approx(rounded, rel=1e-7)
    assert module.weight.item() == raw
