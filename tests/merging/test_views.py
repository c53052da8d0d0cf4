"""Views: each resolved once per state of the window, and no snapshot read more often than the arithmetic needs."""

import pytest
import torch
from torch import nn

from pretrain_merge import RollingMerger, coefficients
from pretrain_merge.errors import WindowNotReadyError
from pretrain_merge.stores.device import DeviceStore


@pytest.fixture
def computed(monkeypatch):
    """Kinds of coefficients, in the order in which they are computed."""
    calls, compute = [], coefficients.compute

    def counted(kind, num_snapshots, **options):
        calls.append((kind, num_snapshots))
        return compute(kind, num_snapshots, **options)

    monkeypatch.setattr(coefficients, "compute", counted)
    return calls


@pytest.fixture
def read(monkeypatch):
    """How many snapshots each pass over the window reads, and whether it measures the spread."""
    calls, merge_ = [], DeviceStore.merge_

    def counted(self, out, slots, weights, *, spread=False):
        calls.append((len(slots), spread is not False))
        return merge_(self, out, slots, weights, spread=spread)

    monkeypatch.setattr(DeviceStore, "merge_", counted)
    return calls


def merge_point(merging, module):
    """As a callback does it: asks twice, then merges."""
    ready = [view for view in merging.views if merging.why_not(view) is None]
    skipped = {view: reason for view in merging.views if (reason := merging.why_not(view))}
    with merging.swap(module) as merge_view:
        recipes = {view: merge_view(view) for view in ready}
    return recipes, skipped


def observed(steps, module=None, **options):
    module, merging = (
        module or nn.Linear(2, 1),
        RollingMerger(**{"window": 10, "every": 1, "store": "device"} | options),
    )
    for step in steps:
        with torch.no_grad():
            module.weight.fill_(step)
        merging.observe(module, step)
    return module, merging


def test_the_coefficients_of_a_view_are_computed_once_per_merge_point(computed):
    module, merging = observed(range(1, 8), views=["sma", "sma4", "wma", "sma9"])
    computed.clear()
    recipes, skipped = merge_point(merging, module)
    assert sorted(computed) == [("sma", 4), ("sma", 7), ("wma", 7)]
    assert (list(recipes), list(skipped)) == (["sma", "sma4", "wma"], ["sma9"])
    computed.clear()
    merge_point(merging, module)  # nothing has changed since
    assert computed == []


def test_a_new_snapshot_or_a_break_is_seen_at_once():
    module, merging = observed(range(1, 5))
    assert merge_point(merging, module)[0]["sma"].steps == (1, 2, 3, 4)
    merging.observe(module, 5)
    assert merge_point(merging, module)[0]["sma"].steps == (1, 2, 3, 4, 5)
    merging.mark_phase("another")
    assert "holds 0 since the break at step 5 (phase 'another')" in merging.why_not("sma")
    merging.close()
    assert "holds 0" in merging.why_not("sma")


def test_sma4_and_sma_over_ten_read_fourteen_snapshots_and_measure_the_spread_once(read):
    module, merging = observed(range(1, 13), views=["sma4", "sma"])
    merge_point(merging, module)
    assert read == [(4, False), (10, True)]
    merge_point(merging, module)  # the same window: its spread is known
    assert read[2:] == [(4, False), (10, False)]


def test_where_no_view_reads_the_whole_window_one_pass_at_the_end_measures_the_spread(read):
    module, merging = observed(range(1, 13), views=["sma4", "sma2"])
    merge_point(merging, module)
    assert read == [(4, False), (2, False), (10, True)]
    assert merging.spread > 0


def test_no_pass_is_spent_on_the_spread_where_nothing_was_merged_or_the_block_failed(read):
    module, merging = observed(range(1, 13), views=["sma4"])
    with merging.swap(module):
        pass
    with pytest.raises(ValueError, match="evaluator"), merging.merged(module, "sma4"):
        raise ValueError("evaluator")
    assert read == [(4, False)]


def test_a_merge_that_the_user_asks_for_does_not_hide_why_a_view_is_not_ready():
    module, merging = observed(range(1, 4), views=["sma", "sma9"])
    with pytest.raises(WindowNotReadyError) as caught, merging.merged(module, "sma9"):
        pass
    assert str(caught.value) == merging.why_not("sma9")


def spans(every, last_step, views=("sma",), **options):
    """Of each view at each snapshot from the second on: by step, how many snapshots and over how many steps."""
    merging, module, found = RollingMerger(every=every, views=list(views), **options), nn.Linear(2, 1), {}
    for step in range(every, last_step + 1, every):
        merging.observe(module, step)
        if merging.why_not(merging.views[0]) is None:
            recipes, _ = merge_point(merging, module)
            found[step] = {view: (len(item.steps), item.steps[-1] - item.steps[0]) for view, item in recipes.items()}
    return found


def test_a_view_spans_a_share_of_the_run_at_most_or_two_snapshots():
    for step, views in spans(100, 4000).items():
        number, span = views["sma"]
        assert span <= 0.06 * step or number == 2
        assert number == 10 or span + 100 > 0.06 * step  # and not fewer than fit


def test_a_number_of_snapshots_is_taken_as_it_was_given_and_so_is_a_window_without_a_limit():
    views = ["sma10", {"name": "all", "kind": "sma", "span": None}, {"name": "wide", "kind": "wma", "span": "50%"}]
    at_end = spans(100, 1000, views)[1000]
    assert at_end == {"sma10": (10, 900), "all": (10, 900), "wide": (6, 500)}
    assert spans(100, 1000, span=None)[1000] == {"sma": (10, 900)}
    assert spans(100, 1000, ["sma", "sma3"], span=0.35)[1000] == {"sma": (4, 300), "sma3": (3, 200)}


def test_a_young_run_is_merged_as_if_there_were_no_limit():
    assert spans(1, 12)[12] == {"sma": (10, 9)}
    assert spans(5, 20)[20] == {"sma": (4, 15)}
    assert spans(8, 40)[40] == {"sma": (2, 8)}


def test_blocks_begin_one_interval_before_the_first_snapshot_and_it_counts():
    merging, module = RollingMerger(every=50, average="block"), nn.Linear(2, 1)
    for step in range(1, 1001):
        merging.observe(module, step)
    assert merge_point(merging, module)[0]["sma"].steps == (950, 1000)  # of ((900, 950], (950, 1000]]


def test_the_share_is_of_the_steps_since_the_last_break_and_a_resumed_run_takes_the_same(tmp_path):
    merging, module, again = RollingMerger(every=10), nn.Linear(2, 1), RollingMerger(every=10)
    for step in range(1, 1401):
        merging.observe(module, step, lr=0.1 if step <= 1000 else 0.2)
    again.restore(merging.manifest(module, tmp_path), module, tmp_path)
    steps = merge_point(merging, module)[0]["sma"].steps
    assert steps == (1380, 1390, 1400)  # 20 of 399 steps, not 80 of 1,400
    assert merge_point(again, module)[0]["sma"].steps == steps
