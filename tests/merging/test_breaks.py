"""What ends a stretch of snapshots: another rate, a phase, a value that is not finite, other parameters."""

import pytest
import torch
from merging.moved_models import Mixed, assert_is_merge, held, model_at, rates, train

from pretrain_merge import RollingMerger


def test_a_constant_rate_breaks_nothing():
    merging = RollingMerger(window=6, every=10)
    rates(merging, lambda step: 0.1)
    assert held(merging) == [10, 20, 30, 40, 50, 60]
    assert merging.window.last_break is None


def test_a_new_rate_makes_older_snapshots_invalid_from_its_first_step_on():
    merging = RollingMerger(window=6, every=10)
    rates(merging, lambda step: 3e-4 if step < 30 else 2e-4)
    assert held(merging) == [30, 40, 50, 60]
    assert merging.window.last_break.step == 30
    assert merging.window.last_break.reason == "learning rate changed from 0.0003 to 0.0002"


def test_any_parameter_group_can_break():
    merging = RollingMerger(window=6, every=10)
    rates(merging, lambda step: [0.1, 0.2 if step < 35 else 0.3])
    assert held(merging) == [40, 50, 60]


def test_a_further_parameter_group_is_a_break():
    merging = RollingMerger(window=6, every=10)
    rates(merging, lambda step: [0.1] if step < 35 else [0.1, 0.1])
    assert held(merging) == [40, 50, 60]


@pytest.mark.parametrize(("change", "valid"), [(0.9e-3, [10, 20, 30, 40, 50, 60]), (1.1e-3, [40, 50, 60])])
def test_a_change_within_the_tolerance_is_none(change, valid):
    merging = RollingMerger(window=6, every=10)
    rates(merging, lambda step: 0.1 if step < 35 else 0.1 * (1 + change))
    assert held(merging) == valid


def test_a_slow_drift_breaks_once_it_adds_up():
    merging = RollingMerger(window=10, every=10)
    rates(merging, lambda step: 0.1 * (1 - 1e-3 * step / 45))  # each step far below the tolerance
    assert held(merging) == [50, 60]


def test_a_warm_up_keeps_breaking_until_the_rate_is_constant():
    merging = RollingMerger(window=10, every=10)
    rates(merging, lambda step: 0.1 * min(1.0, step / 25))
    assert held(merging) == [30, 40, 50, 60]


def test_a_rate_that_is_no_number_breaks_every_step():
    merging = RollingMerger(window=10, every=10)
    rates(merging, lambda step: float("nan") if 20 < step <= 40 else 0.1)
    assert held(merging) == [50, 60]


def test_a_decaying_run_may_turn_rate_breaks_off():
    merging = RollingMerger(window=6, every=10, breaks={"lr": False})
    rates(merging, lambda step: 0.1 * (1 - step / 100))
    assert held(merging) == [10, 20, 30, 40, 50, 60]


def test_snapshots_remember_the_rate_and_the_phase_of_their_step():
    merging = RollingMerger(window=6, every=10, breaks={"lr": False})
    rates(merging, lambda step: step / 100, range(1, 11))
    merging.mark_phase("long")
    rates(merging, lambda step: step / 100, range(11, 21))
    assert [(item.lr, item.phase) for item in merging.window.snapshots] == [((0.1,), ""), ((0.2,), "long")]


def test_a_phase_separates_the_snapshots_before_it():
    merging = RollingMerger(window=6, every=10)
    rates(merging, lambda step: 0.1, range(1, 36))
    merging.mark_phase("long context")
    rates(merging, lambda step: 0.1, range(36, 61))
    assert held(merging) == [40, 50, 60]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_snapshot_that_is_not_finite_is_refused_counted_and_a_break(value):
    merging, module = RollingMerger(window=6, every=10), model_at()
    for step in range(1, 61):
        with torch.no_grad():
            module.weight.fill_(value if step in (30, 40) else step)
        assert merging.observe(module, step) == (step % 10 == 0 and step not in (30, 40))
    assert merging.num_refused == 2
    assert held(merging) == [50, 60]


def test_a_model_that_trains_other_parameters_starts_over():
    module, merging = Mixed(), RollingMerger(window=6, every=5)
    train(module, merging, range(1, 21))
    module.frozen.requires_grad_(True)
    trajectory = train(module, merging, range(21, 36))
    assert held(merging) == [25, 30, 35]
    with merging.merged(module, "sma") as recipe:
        assert_is_merge(module, trajectory, recipe.steps, recipe.coefficients)
