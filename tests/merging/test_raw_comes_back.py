"""Raw weights come back bit for bit: however the block ends, and whatever was done to them before."""

import copy
import os
import signal
import threading

import pytest
import torch
from merging.moved_models import VIEWS, Mixed, assert_is_merge, held, move, state, train
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.errors import ProgressError, WindowNotReadyError


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


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_the_parameters_of_a_scripted_module_are_merged_and_come_back():
    module = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 1))
    merger = RollingMerger(window=2, every=1)
    for step in (1, 2):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(step)
        merger.observe(module, step)
    with merger.merged(module, "sma"):
        assert {parameter.mean().item() for parameter in module.parameters()} == {1.5}
    assert {parameter.mean().item() for parameter in module.parameters()} == {2.0}
