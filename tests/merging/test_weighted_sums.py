"""What a merge is: each view's weighted sum against a float64 oracle, and the spread beside it."""

import numpy as np
import pytest
import torch
from harness import oracles, strategies
from hypothesis import example, given, settings
from hypothesis import strategies as st
from merging.moved_models import VIEWS, Mixed, assert_is_merge, counting, model_at, state, train
from torch import nn

from pretrain_merge import RollingMerger, coefficients
from pretrain_merge.cadence import Progress
from pretrain_merge.errors import WindowNotReadyError


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,), (torch.bfloat16,), (torch.float16,), (torch.float64,), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_p20_every_view_is_its_weighted_sum_to_one_rounding_of_the_output(dtypes):
    module, merging = Mixed(dtypes), RollingMerger(window=5, every=10, views=VIEWS)
    trajectory = train(module, merging, range(1, 61))
    raw = state(module)
    for view in merging.views:
        with merging.merged(module, view) as recipe:
            assert_is_merge(module, trajectory, recipe.steps, recipe.coefficients)
            assert state(module) != raw
        assert state(module) == raw


def test_p20_a_bfloat16_accumulator_would_fail():
    module, merging = Mixed((torch.bfloat16,)), RollingMerger(window=5, every=10)
    trajectory = train(module, merging, range(1, 61))
    with merging.merged(module, "sma") as recipe, torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.zero_()
                for step in recipe.steps:
                    parameter.add_(torch.from_numpy(trajectory[step][name]).bfloat16(), alpha=0.2)
        with pytest.raises(AssertionError, match="weight"):
            assert_is_merge(module, trajectory, recipe.steps, recipe.coefficients)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(2, 6),
    every=st.integers(1, 4),
    num_steps=st.integers(2, 25),
    dtypes=st.lists(strategies.dtypes, min_size=1, max_size=2),
    view=st.sampled_from(["sma", "sma2", "wma", "wsm", "ema"]),
)
@example(size=4, every=1, num_steps=8, dtypes=[torch.float32], view="sma2")  # a view of the newest of a full window
def test_whatever_the_window_a_merge_is_the_oracle_and_raw_comes_back(size, every, num_steps, dtypes, view):
    module, merging = Mixed(dtypes), RollingMerger(window=size, every=every, views=[view], span=None)
    trajectory = train(module, merging, range(1, num_steps + 1))
    raw, due = state(module), list(range(every, num_steps + 1, every))[-size:]
    if len(due) < 2:
        with pytest.raises(WindowNotReadyError), merging.merged(module, view):
            pass
    else:
        with merging.merged(module, view) as recipe:
            assert list(recipe.steps) == (due[-2:] if view == "sma2" else due)
            assert_is_merge(module, trajectory, recipe.steps, recipe.coefficients)
    assert state(module) == raw


def test_a_recipe_names_steps_and_coefficients_oldest_first():
    merging = RollingMerger(window=4, every=10, views=["wma4"])
    module, _ = counting(merging, range(1, 61))
    with merging.merged(module, "wma4") as recipe:
        assert recipe.steps == (30, 40, 50, 60)
        assert recipe.coefficients == coefficients.wma(4)
        assert module.weight.item() == pytest.approx(0.1 * 30 + 0.2 * 40 + 0.3 * 50 + 0.4 * 60)


def test_coefficients_that_depend_on_time_see_the_counter_of_the_interval():
    view = {"name": "slow", "kind": "ema", "half_life": 100}
    merging = RollingMerger(window=4, every="100 tokens", views=[view])
    module = model_at()
    for step, tokens in enumerate([100, 200, 400, 700], start=1):
        with torch.no_grad():
            module.weight.fill_(step)
        merging.observe(module, Progress(step, tokens=tokens))
    with merging.merged(module, "slow") as recipe:
        expected = oracles.ema([1 - 0.5 ** (gap / 100) for gap in (100, 200, 300)])
        assert recipe.coefficients == pytest.approx(expected, abs=1e-15)


def test_the_spread_is_that_of_the_whole_window_also_after_a_shorter_view():
    module, merging = Mixed((torch.float32,)), RollingMerger(window=5, every=10, views=["sma2", "sma"])
    trajectory = train(module, merging, range(1, 51))
    flat = [np.concatenate([v.ravel() for v in trajectory[step].values()]) for step in (10, 20, 30, 40, 50)]
    for view in merging.views:
        with merging.merged(module, view):
            pass
        assert merging.spread == pytest.approx(oracles.relative_spread(flat), rel=1e-6)


def test_the_spread_leaves_out_what_a_break_made_invalid():
    module, merging = Mixed((torch.float32,)), RollingMerger(window=5, every=10, views=["sma2"])
    trajectory = train(module, merging, range(1, 21)) | train(module, merging, range(21, 51), lr=0.2)
    flat = [np.concatenate([v.ravel() for v in trajectory[step].values()]) for step in (30, 40, 50)]
    with merging.merged(module, "sma2"):
        pass
    assert merging.spread == pytest.approx(oracles.relative_spread(flat), rel=1e-6)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt", "1-square"])
@pytest.mark.parametrize("every", [1, 5])
def test_a_decay_view_of_a_real_run_is_where_its_updates_lead_when_replayed_with_a_decaying_rate(shape, every):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    views = [{"name": "annealed", "kind": "decay", "shape": shape}]
    merging, visited = RollingMerger(window=8, every=every, views=views, span=None), []
    for step in range(1, 12 * every + 1):
        x = torch.randn(16, 6, dtype=torch.float64)
        loss = (module(x) - x.sum(1, keepdim=True).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        merging.observe(module, step, lr=0.05)
        if step % every == 0:
            visited.append(np.concatenate([p.detach().numpy().ravel() for p in module.parameters()]))
    in_window = np.array(visited[-8:])
    updates = np.diff(in_window, axis=0)  # what the run itself did in each interval of the window
    rates = oracles.decay_rates(oracles.SHAPES[shape], range(8))
    with merging.merged(module, "annealed"):
        merged = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
    np.testing.assert_allclose(merged, oracles.replayed(in_window[0], updates, rates), rtol=0, atol=1e-14)
