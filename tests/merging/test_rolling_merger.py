"""RollingMerger: merges against a float64 oracle, raw weights back bit for bit, breaks, blocks and messages."""

import copy
import logging
import os
import signal
import threading

import numpy as np
import pytest
import torch
from harness import oracles, strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain_merge import RollingMerger, coefficients
from pretrain_merge.cadence import Progress
from pretrain_merge.errors import ConfigError, ProgressError, UnsupportedModelError, WindowNotReadyError

VIEWS = [
    "sma",
    "sma2",
    "wma",
    "ema",
    "wsm",
    {"name": "cos3", "kind": "decay", "shape": "cosine", "last": 3},
    {"name": "mine", "kind": "custom", "weights": [-0.5, 0.25, 1.25]},
]


class Mixed(nn.Module):
    """Parameters of several dtypes, a tied one, a frozen one, and buffers that no merge may touch."""

    def __init__(self, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 3, dtype=dtype) for dtype in dtypes)
        self.tied = self.layers[0]
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.randn(2), persistent=False)
        self.register_buffer("bias", torch.randn(2))


def move(module, step):
    """Stands for an optimizer step: another value for every trainable parameter, in place; and buffers that move."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.3)
        for buffer in module.buffers():
            buffer.add_(1) if buffer.dtype != torch.bool else buffer.logical_not_()


def state(module):
    """Every parameter and buffer, bit for bit."""
    return {
        name: (tensor.dtype, bits(tensor)) for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def train(module, merging, steps, *, lr=0.1, after_step=None):
    """Moves and observes; returns the float64 values of the trainable parameters at every step."""
    trajectory = {}
    for step in steps:
        move(module, step)
        if after_step:
            after_step(step)
        merging.observe(module, step, lr=lr)
        trajectory[step] = values(module)
    return trajectory


def values(module):
    named = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    return {name: tensor.detach().double().numpy().copy() for name, tensor in named.items()}


def assert_is_merge(module, trajectory, steps, weights):
    """The live model is the weighted sum of these steps, to one rounding of each parameter's dtype."""
    for name, merged in values(module).items():
        snapshots = [trajectory[step][name] for step in steps]
        dtype = str(module.get_parameter(name).dtype).removeprefix("torch.")
        error = np.abs(merged - oracles.merged(snapshots, weights))
        assert np.all(error <= oracles.merge_tolerance(snapshots, weights, dtype)), name


def model_at(step=0):
    """One number per step, so that a merge can be read off."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, step)
    return module


def counting(merging, steps, **options):
    """Observe a model whose weight is the step number."""
    module = model_at()
    return module, [step for step in steps if observe_at(merging, module, step, **options)]


def observe_at(merging, module, step, **options):
    with torch.no_grad():
        module.weight.fill_(step)
    return merging.observe(module, step, **options)


def stored(merging, module):
    """The newest snapshot of a model of one number."""
    out = module.weight.detach().clone()
    merging._stored._store.read_([out], merging.window.newest.slot)
    return out.item()


def held(merging):
    return [item.progress.step for item in merging.window.valid]


# --- the numbers ---


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


# --- raw comes back ---


def test_several_views_follow_each_other_with_one_restore():
    module, merging = Mixed(), RollingMerger(window=4, every=5, views=VIEWS)
    trajectory = train(module, merging, range(1, 31))
    raw = state(module)
    with merging.swap(module) as merge_view:
        for view in [*merging.views, *reversed(merging.views)]:
            recipe = merge_view(view)
            assert_is_merge(module, trajectory, recipe.steps, recipe.coefficients)
    assert state(module) == raw


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_raw_comes_back_however_the_block_ends(error):
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    train(module, merging, range(1, 31))
    raw = state(module)
    with pytest.raises(error), merging.merged(module, "sma"):
        raise error
    assert state(module) == raw


def test_raw_comes_back_when_a_later_view_is_not_ready():
    module, merging = Mixed(), RollingMerger(window=8, every=5, views=["sma", "sma8"])
    train(module, merging, range(1, 21))
    raw = state(module)

    def put_both():
        with merging.swap(module) as merge_view:
            merge_view("sma")
            merge_view("sma8")

    with pytest.raises(WindowNotReadyError):
        put_both()
    assert state(module) == raw


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("last_step", [20, 22], ids=["from the newest slot", "from a copy"])
def test_ctrl_c_does_not_break_off_the_restore(monkeypatch, last_step):
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    train(module, merging, range(1, last_step + 1))
    raw, copy_, calls = state(module), torch._foreach_copy_, []

    def interrupted(targets, sources):
        calls.append(len(targets))
        os.kill(os.getpid(), signal.SIGINT)
        copy_(targets, sources)

    with pytest.raises(KeyboardInterrupt), merging.merged(module, "sma"):
        monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    assert len(calls) == 1
    assert state(module) == raw


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_twice_interrupts_the_block_and_not_the_restore():
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    train(module, merging, range(1, 21))
    raw = state(module)

    def interrupt_and_interrupt_the_clean_up():
        with merging.merged(module, "sma"):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_and_interrupt_the_clean_up()
    assert state(module) == raw


def test_p08_a_handler_of_sigterm_finds_raw_weights():  # Lightning's handlers save checkpoints
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    train(module, merging, range(1, 21))
    raw, found = state(module), []
    before = signal.signal(signal.SIGTERM, lambda *_: found.append(state(module)))
    try:
        with merging.merged(module, "sma"):
            os.kill(os.getpid(), signal.SIGTERM)
            assert found == []
        assert found == [raw]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(found) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_merging_works_outside_the_main_thread():
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    trajectory, errors = train(module, merging, range(1, 21)), []

    def merge():
        try:
            with merging.merged(module, "sma") as recipe:
                assert_is_merge(module, trajectory, recipe.steps, recipe.coefficients)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=merge)
    thread.start()
    thread.join()
    assert errors == []


def test_a_merge_inside_a_merge_leaves_the_outer_one_in_place():
    module, merging = Mixed(), RollingMerger(window=4, every=5, views=["sma", "sma2"])
    train(module, merging, range(1, 21))
    raw = state(module)
    with merging.merged(module, "sma"):
        outer = state(module)
        for _ in range(2):
            with merging.merged(module, "sma2"):
                assert state(module) not in (outer, raw)
            assert state(module) == outer
    assert state(module) == raw


def test_what_the_block_does_to_the_weights_is_undone():
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    train(module, merging, range(1, 21))
    raw = state(module)
    with merging.merged(module, "sma"), torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    assert state(module) == raw


@pytest.mark.parametrize("last_step", [4, 5], ids=["raw is a slot", "raw is a copy"])
def test_what_is_written_into_raw_is_undone_also_where_no_view_was_merged(last_step):
    module, merging = Mixed(), RollingMerger(window=2, every=2)
    train(module, merging, range(1, last_step + 1))
    raw = state(module)
    with merging.swap(module), torch.no_grad():
        module.layers[0].weight.fill_(7.0)  # as an evaluator may on the raw weights, before any view is in
    assert state(module) == raw


@pytest.mark.parametrize("average", ["last", "block"])
def test_a_step_observed_inside_the_block_is_refused_since_its_snapshot_could_take_the_slot_of_raw(average):
    module, merging = Mixed(), RollingMerger(window=2, every=5, average=average)
    train(module, merging, range(1, 21))
    raw = state(module)
    with pytest.raises(ProgressError, match="merged weights are in the model"), merging.merged(module, "sma"):
        merging.observe(module, 25, lr=0.1)
    assert state(module) == raw
    train(module, merging, range(21, 36))  # the refused step was not counted
    assert held(merging) == [30, 35]


@pytest.mark.parametrize("average", ["last", "block"])
@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_weights_changed_after_the_snapshot_come_back_as_changed_every_time(tmp_path, average, store):
    merging = RollingMerger(window=4, every=5, average=average, store=store, store_folder=str(tmp_path))
    module = Mixed()
    train(module, merging, range(1, 21))
    with torch.no_grad():
        module.layers[0].weight.clamp_(-0.1, 0.1)  # a callback of the user's after ours
    changed = state(module)
    for _ in range(3):
        with merging.merged(module, "sma"):
            assert state(module) != changed
        assert state(module) == changed
    merging.close()


def test_steps_after_the_snapshot_are_not_lost():
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    train(module, merging, range(1, 24))
    raw = state(module)
    with merging.merged(module, "sma") as recipe:
        assert recipe.steps == (5, 10, 15, 20)
    assert state(module) == raw


def test_another_model_of_the_same_layout_gets_its_own_weights_back():
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    other = copy.deepcopy(module)
    trajectory = train(module, merging, range(1, 21))
    for step in range(1, 21):  # as many writes, so that version counters agree
        move(other, 100 + step)
    raw = state(other)
    with merging.merged(other, "sma") as recipe:
        assert_is_merge(other, trajectory, recipe.steps, recipe.coefficients)
    assert state(other) == raw


def test_weights_whose_memory_was_exchanged_come_back_as_they_are():
    module, merging = Mixed(), RollingMerger(window=4, every=5)
    train(module, merging, range(1, 21))
    for parameter in module.parameters():
        parameter.data = parameter.data + 1
    raw = state(module)
    with merging.merged(module, "sma"):
        pass
    assert state(module) == raw


def test_training_goes_on_the_same_with_and_without_merges():
    def run(merging):
        torch.manual_seed(1)
        module = nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        for step in range(1, 31):
            loss = module(torch.randn(8, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if merging and merging.observe(module, step, lr=0.01) and merging.merge_is_due():
                with merging.swap(module) as merge_view:
                    for view in merging.views:
                        merge_view(view)
        return state(module), [item["exp_avg"].tolist() for item in optimizer.state.values()]

    assert run(RollingMerger(window=4, every=5, views=["sma", "wsm"])) == run(None)


# --- memory ---


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


def largest_allocation_of_a_merge(merging, module):
    with Allocations() as allocations, merging.merged(module, "sma"):
        pass
    return allocations.largest


def large_run(**options):
    module = nn.Linear(1024, 2048, bias=False)
    merging = RollingMerger(window=2, every=2, store="device", **options)
    for step in range(1, 5):
        move(module, step)
        merging.observe(module, step)
    return module, merging, module.weight.nbytes


def test_raw_is_taken_from_the_newest_slot_and_never_copied_when_that_slot_is_raw():
    module, merging, num_bytes = large_run()
    for _ in range(2):  # also after a restore the slot is raw
        assert largest_allocation_of_a_merge(merging, module) < num_bytes


def minus_zero_becomes_zero(module):
    module.weight.data[0, 0] = 0.0


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda module: move(module, 5),
        lambda module: module.weight.data.clamp_(-0.01, 0.01),
        lambda module: setattr(module.weight, "data", module.weight.data + 1),
        minus_zero_becomes_zero,
    ],
    ids=["a step", "through .data", "other memory", "the sign of a zero"],
)
@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_p31_raw_is_copied_when_the_newest_slot_has_other_bits_whatever_the_version_says(tmp_path, store, meanwhile):
    module, merging = (
        nn.Linear(64, 64, bias=False),
        RollingMerger(window=2, every=2, store=store, store_folder=str(tmp_path)),
    )
    module.weight.data[0, 0] = -0.0
    for step in range(1, 5):
        merging.observe(module, step)
    meanwhile(module)
    raw = state(module)
    with merging.merged(module, "sma"):
        pass
    assert state(module) == raw
    merging.close()


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda module, merging: None,
        lambda module, merging: merging.observe(module, 5),
        lambda module, merging: setattr(module.weight, "data", module.weight.data.clone()),
        lambda module, merging: module.weight.data.mul_(1),
    ],
    ids=["nothing", "a later step", "other memory", "written with the same"],
)
def test_raw_is_never_copied_when_the_newest_slot_has_its_bits(meanwhile):
    module, merging, num_bytes = large_run()
    meanwhile(module, merging)
    assert largest_allocation_of_a_merge(merging, module) < num_bytes


def test_raw_is_copied_where_a_snapshot_is_a_mean_or_smaller_than_the_parameter():
    for options in ({"average": "block"}, {"slot_dtype": "bfloat16"}):
        module, merging, num_bytes = large_run(**options)
        assert largest_allocation_of_a_merge(merging, module) == num_bytes


# --- when ---


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


# --- breaks ---


def rates(merging, lr_at, steps=range(1, 61)):
    module = model_at()
    for step in steps:
        observe_at(merging, module, step, lr=lr_at(step))
    return module


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


# --- block means ---


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


# --- what it says ---


def reason(merging, view):
    with pytest.raises(WindowNotReadyError) as caught, merging.merged(model_at(), view):
        pass
    assert merging.why_not(view) == str(caught.value)
    return str(caught.value)


def test_a_view_that_is_not_ready_says_how_many_since_when_when_and_what_is():
    merging = RollingMerger(window=8, every=1000, views=["sma8", "sma4"])
    rates(merging, lambda step: 3e-4 if step < 800 else 2e-4, range(1, 5001))
    assert reason(merging, "sma8") == (
        "view 'sma8' needs 8 snapshots and the window holds 5 (steps 1000 to 5000) since the break at step 800 "
        "(learning rate changed from 0.0003 to 0.0002). It will be ready at step 8000; 'sma4' is ready now."
    )


def test_an_empty_window_has_no_steps_and_no_break_to_name():
    assert reason(RollingMerger(window=4, every=10), "sma") == (
        "view 'sma' needs 2 snapshots and the window holds 0. It will be ready at step 20."
    )


def test_readiness_is_told_in_the_unit_of_the_interval():
    message = reason(RollingMerger(window=4, every="1B tokens", start="5B tokens"), "sma")
    assert message.endswith("It will be ready at 6000000000 tokens.")


@pytest.mark.parametrize("average", ["last", "block"])
@pytest.mark.parametrize("start", [0, 15, 20])
@pytest.mark.parametrize("broken_at", [None, 14, 20, 21])
def test_a_view_is_ready_exactly_when_it_was_said_to_be(average, start, broken_at):
    merging, module = RollingMerger(window=4, every=10, start=start, average=average, views=["sma3"]), model_at()
    said = []
    for step in range(1, 101):
        observe_at(merging, module, step, lr=0.1 if broken_at is None or step < broken_at else 0.2)
        if merging.why_not("sma3") is None:
            break
        if broken_at is None or step >= broken_at:  # nobody foresees a break
            said.append(merging.why_not("sma3"))
    assert said
    assert all(f"It will be ready at step {step}." in message for message in said)


def test_a_view_that_is_not_configured_is_named_with_those_that_are():
    merging = RollingMerger(window=4, every=10, views=["sma", "wma"])
    with pytest.raises(ConfigError) as caught, merging.merged(model_at(), "smaa"):
        pass
    assert "view 'smaa' is not configured; did you mean 'sma'? Configured: sma, wma." in str(caught.value)


def test_every_break_of_a_warm_up_is_said_once_and_only_if_it_cost_something(caplog):
    merging = RollingMerger(window=10, every=2)
    rates(merging, lambda step: 0.1 * min(1.0, step / 25))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        "break at step 3 (learning rate changed from 0.008 to 0.012): 1 snapshot is no longer merged; the window "
        "refills."
    ]


def test_two_reasons_are_two_notices(caplog):
    merging = RollingMerger(window=10, every=2)
    rates(merging, lambda step: 0.1, range(1, 11))
    merging.mark_phase("a")
    rates(merging, lambda step: 0.1, range(11, 21))
    merging.mark_phase("b")
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.split(":")[0] for text in said] == ["break at step 10 (phase 'a')", "break at step 20 (phase 'b')"]


def test_refused_snapshots_are_said_once(caplog):
    merging = RollingMerger(window=10, every=1)
    module = model_at(float("nan"))
    for step in range(1, 5):
        merging.observe(module, step)
    assert caplog.text.count("holds NaN or infinity and was refused") == 1
    assert merging.num_refused == 4


# --- models ---


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
