"""`every: "1%"`: a window that always spans about a tenth of the run, since its last break."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from pretrain_merge import RollingMerger, config
from pretrain_merge.cadence import Progress
from pretrain_merge.errors import ConfigError


def observed(merging, module, steps, **options):
    """Observes each step; the steps of snapshots and of merge points."""
    snapshots, merges = [], []
    for step in steps:
        with torch.no_grad():
            module.weight.fill_(step)
        progress = Progress(step, 4 * step, 100 * step)
        if merging.observe(module, progress, **options):
            snapshots.append(step)
        if merging.merge_is_due():
            merges.append(step)
    return snapshots, merges


def test_the_window_spans_a_tenth_of_the_run_at_every_merge_point():
    merging, module = RollingMerger(every="1%", window=10, span=None), nn.Linear(1, 1)
    for step in range(1, 2001):
        _, merges = observed(merging, module, [step])
        if merges and step >= 100:
            with merging.merged(module, "sma") as recipe:
                assert module.weight.item() == pytest.approx(sum(recipe.steps) / 10, rel=1e-6)
            assert 0.08 <= (recipe.steps[-1] - recipe.steps[0]) / step <= 0.1


def test_each_merge_has_snapshots_of_its_own_unless_more_are_asked_for():
    snapshots, merges = observed(RollingMerger(every="1%", window=10), nn.Linear(1, 1), range(1, 1001))
    assert [snapshots.index(step) % 10 for step in merges] == [9] * len(merges)
    assert len(merges) == 33  # ten up to step 100, then a tenth apart
    _, more = observed(RollingMerger(every="1%", window=10, merge_every="5%"), nn.Linear(1, 1), range(1, 1001))
    assert len(more) > 1.5 * len(merges)


def test_after_a_break_the_interval_grows_from_there():
    merging, module = RollingMerger(every="10%", window=3), nn.Linear(1, 1)
    before, _ = observed(merging, module, range(1, 501), lr=0.1)
    after, _ = observed(merging, module, range(501, 1001), lr=0.2)
    assert before[-1] - before[-2] > 30
    assert [step - 501 for step in after] == before[: len(after)]  # the rate changed at step 501


def test_tokens_may_be_what_grows_and_coefficients_see_them():
    views = [{"name": "slow", "kind": "ema", "half_life": 1000}]
    merging, module = RollingMerger(every="5% of tokens", window=4, views=views, span=None), nn.Linear(1, 1)
    observed(merging, module, range(1, 400))
    with merging.merged(module, "slow") as recipe:
        gaps = [100 * (b - a) for a, b in zip(recipe.steps, recipe.steps[1:], strict=False)]
    assert len(set(gaps)) > 1
    assert recipe.coefficients[0] == pytest.approx(0.5 ** (sum(gaps) / 1000))


@pytest.mark.parametrize("average", ["last", "block"])
def test_a_run_that_is_resumed_takes_the_same_snapshots_and_merges(tmp_path, average):
    def new():
        return RollingMerger(every="3%", window=4, average=average)

    whole, module = new(), nn.Linear(1, 1)
    observed(whole, module, range(1, 400), lr=0.1)
    expected = observed(whole, module, range(400, 901), lr=0.2)
    first, second = new(), new()
    observed(first, module, range(1, 400), lr=0.1)
    start = observed(first, module, range(400, 601), lr=0.2)
    second.restore(first.manifest(module, tmp_path), module, tmp_path)
    rest = observed(second, module, range(601, 901), lr=0.2)
    assert (start[0] + rest[0], start[1] + rest[1]) == expected
    assert [item.progress for item in second.window.snapshots] == [item.progress for item in whole.window.snapshots]


def test_a_block_is_the_mean_of_all_models_since_the_point_before():
    merging, module = RollingMerger(every="10%", window=2, average="block"), nn.Linear(1, 1)
    snapshots, _ = observed(merging, module, range(1, 301))
    with merging.merged(module, "sma") as recipe:
        assert list(recipe.steps) == snapshots[-2:]
        ends = [snapshots[-3], *snapshots[-2:]]
        means = [sum(range(a + 1, b + 1)) / (b - a) for a, b in pairwise(ends)]
        assert module.weight.item() == pytest.approx(sum(means) / 2, rel=1e-6)


def test_a_view_that_is_not_ready_says_the_step_at_which_it_is():
    merging, module = RollingMerger(every="10%", window=8, views=["sma8"]), nn.Linear(1, 1)
    observed(merging, module, range(1, 201), lr=0.1)
    observed(merging, module, range(201, 206), lr=0.2)
    said = merging.why_not("sma8")
    for step in range(206, 300):
        observed(merging, module, [step], lr=0.2)
        if merging.why_not("sma8") is None:
            break
    assert f"ready at step {step}" in said


def test_a_forecast_of_a_growing_window_is_as_long_as_the_window_and_its_length_is_refused():
    grown = {"window": 10, "every": "1%"}
    assert config.parse_settings(grown | {"forecast": {"soon": {}}}).forecasts["soon"].num_intervals == 9.0
    with pytest.raises(ConfigError, match=r"forecast\.soon\.steps: 200, .*Leave `steps` out"):
        config.parse_settings(grown | {"forecast": {"soon": {"steps": 200}}})
