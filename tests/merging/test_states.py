"""A merger in a loop of one's own: training is untouched, and it goes on from any checkpoint exactly where it was."""

import copy
import json
import pickle
import random

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pretrain_merge import RollingMerger
from pretrain_merge.errors import CheckpointError, ConfigError

DATA = TensorDataset(torch.linspace(-1, 1, 64).reshape(16, 4))


class Noisy(nn.Module):
    """Dropout: what an evaluation draws from the run's random numbers shows in the weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x).square().mean()


class Loop:
    """A plain loop with a validation loader, whose iterator draws from the run's random numbers (P6)."""

    def __init__(self, *, merger=None, fabric=None):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.step, self.merger, self.measured, self.fabric = 0, merger, [], fabric
        self.model, self.validation = Noisy(), DataLoader(DATA, batch_size=4, shuffle=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        if fabric is not None:
            self.model, self.optimizer = fabric.setup(self.model, self.optimizer)
            self.validation = fabric.setup_dataloaders(self.validation)
        if merger is not None:
            merger.watch(self.model, [self.optimizer])

    def run(self, until):
        while self.step < until:
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 4) + random.random() + np.random.rand()).backward()
            self.optimizer.step()
            self.step += 1
            if self.merger is not None:
                self.merger.observe(self.model, self.step, lr=0.01)
                if self.merger.merge_is_due():
                    self.measure()
        return self

    @torch.no_grad()
    def measure(self):
        losses = self.merger.evaluate(self.model, self.validate)
        self.measured.append((self.step, losses["raw"], losses["sma"]))

    def validate(self):
        loss = torch.stack([self.model(batch) for (batch,) in self.validation]).mean()
        random.random(), np.random.rand()
        return loss.item()

    def state(self):
        own = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        own |= {"random": (torch.get_rng_state(), random.getstate(), np.random.get_state())}
        return copy.deepcopy(own) | ({"merger": self.merger.state_dict()} if self.merger is not None else {})

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.set_random(state["random"])
        if self.merger is not None:
            self.merger.load_state_dict(state["merger"])
        return self

    def set_random(self, states):
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def merger_of(folder, **options):
    return RollingMerger(**{"window": 3, "every": 2, "window_folder": folder} | options)


def weights(loop):
    return torch.cat([parameter.detach().flatten() for parameter in loop.model.parameters()])


def files(folder):
    return sorted(path.name for path in folder.glob("snapshot-*"))


@pytest.mark.parametrize("average", ["last", "block"])
def test_p06_training_is_untouched_by_an_evaluation_with_a_loader_of_its_own(tmp_path, average):
    without, merging = Loop().run(20), Loop(merger=merger_of(tmp_path, average=average)).run(20)
    assert len(merging.measured) == 9
    assert torch.equal(weights(without), weights(merging))
    ours, theirs = without.state()["random"], merging.state()["random"]
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    assert np.array_equal(ours[2][1], theirs[2][1])


def test_p06_raw_and_every_view_draw_the_same_random_numbers(tmp_path):
    loop, drawn = Loop(merger=merger_of(tmp_path, views=["sma", "sma2"])).run(7), []
    with loop.merger.swap(loop.model) as merge_view:
        drawn.append(torch.rand(3).tolist())
        for view in loop.merger.views:
            merge_view(view)
            drawn.append(torch.rand(3).tolist())
    with loop.merger.merged(loop.model, "sma"):
        drawn.append(torch.rand(3).tolist())
    assert drawn == [torch.rand(3).tolist()] * 4


@pytest.mark.parametrize("average", ["last", "block"])
@pytest.mark.parametrize("at", [3, 8, 11])
def test_a_plain_loop_resumes_exactly(tmp_path, average, at):
    whole = Loop(merger=merger_of(tmp_path / "whole", average=average)).run(20)
    first = Loop(merger=merger_of(str(tmp_path / "part"), average=average)).run(at)
    torch.save(first.state(), tmp_path / "checkpoint.pt")
    first.run(at + 4)  # what comes after the checkpoint must not matter
    first.merger.close()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    again = Loop(merger=merger_of(str(tmp_path / "part"), average=average)).load(state).run(20)
    assert torch.equal(weights(whole), weights(again))
    assert again.measured == whole.measured[-len(again.measured) :]
    assert len(again.measured) == len([step for step in range(at + 1, 21) if step % 2 == 0 and step >= 4])


def test_fabric_saves_and_loads_the_merger_like_any_other_part(tmp_path):
    def loop(folder):
        fabric = L.Fabric(accelerator="cpu", devices=1)
        return Loop(merger=merger_of(folder), fabric=fabric)

    def parts(loop):
        return {"model": loop.model, "optimizer": loop.optimizer, "merger": loop.merger}

    without = Loop(fabric=L.Fabric(accelerator="cpu", devices=1)).run(20)
    whole = loop(tmp_path / "whole").run(20)
    assert torch.equal(weights(without), weights(whole))
    assert list(whole.merger.tensors(whole.model)) == list(whole.merger.tensors(Noisy()))
    first = loop(tmp_path / "part").run(9)
    first.fabric.save(tmp_path / "checkpoint.ckpt", parts(first))
    drawn = first.state()["random"]
    first.merger.close()
    again = loop(tmp_path / "part")
    again.fabric.load(tmp_path / "checkpoint.ckpt", parts(again))
    again.step = 9
    again.set_random(drawn)
    again.run(20)
    assert torch.equal(weights(whole), weights(again))
    assert again.measured == whole.measured[-len(again.measured) :]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning", "ignore:TypedStorage:UserWarning")
def test_distributed_checkpoints_take_the_merger_too(tmp_path):
    first = Loop(merger=merger_of(tmp_path / "window")).run(9)
    dcp.save({"merger": first.merger, "model": first.model}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    first.merger.close()
    again = Loop(merger=merger_of(tmp_path / "window"))
    dcp.load({"merger": again.merger, "model": again.model}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert [item.progress.step for item in again.merger.window.valid] == [4, 6, 8]
    assert again.merger.progress.step == 9


def test_a_state_is_one_text_and_its_snapshots_are_files_beside(tmp_path):
    loop = Loop(merger=merger_of(tmp_path / "window")).run(9)
    state = loop.merger.state_dict()
    assert {type(value) for value in state.values()} == {str}
    assert json.loads(json.dumps(state)) == state
    assert len(files(tmp_path / "window")) == 3
    loop.merger.state_dict()
    assert len(files(tmp_path / "window")) == 3


def test_old_files_go_with_the_states_that_needed_them(tmp_path):
    loop, states = Loop(merger=merger_of(tmp_path, keep_windows=2)), {}
    for step in range(6, 31, 6):
        states[step] = loop.run(step).state()
        assert len(files(tmp_path)) <= 6  # two windows
    loop.merger.close()
    for step in (24, 30):
        again = Loop(merger=merger_of(tmp_path, keep_windows=2)).load(states[step])
        assert [item.progress.step for item in again.merger.window.valid] == [step - 4, step - 2, step]
        again.merger.close()
    with pytest.raises(CheckpointError, match=r"snapshot-.* is not there.*window_folder.*keep_windows.*refill"):
        Loop(merger=merger_of(tmp_path)).load(states[6])


def test_without_a_limit_every_state_can_be_gone_on_from(tmp_path):
    loop = Loop(merger=merger_of(tmp_path))
    states = {step: loop.run(step).state() for step in range(6, 31, 6)}
    loop.merger.close()
    for step, state in states.items():
        again = Loop(merger=merger_of(tmp_path)).load(state)
        assert [item.progress.step for item in again.merger.window.valid] == [step - 4, step - 2, step]
        again.merger.close()


def test_the_state_that_a_run_went_back_to_counts_as_the_newest(tmp_path):
    loop = Loop(merger=merger_of(tmp_path, keep_windows=2))
    states = {step: loop.run(step).state() for step in (6, 12)}
    loop.merger.close()
    again = Loop(merger=merger_of(tmp_path, keep_windows=2)).load(states[6])
    again.run(18).state()
    again.merger.close()
    kept = Loop(merger=merger_of(tmp_path)).load(states[6])
    assert [item.progress.step for item in kept.merger.window.valid] == [2, 4, 6]


def test_a_window_may_have_moved_with_its_run(tmp_path):
    loop = Loop(merger=merger_of(tmp_path / "before" / "window")).run(8)
    state = loop.state()
    loop.merger.close()
    (tmp_path / "before").rename(tmp_path / "after")
    again = Loop(merger=merger_of(tmp_path / "after" / "window")).load(state)
    assert again.merger.window.num_valid == 3


@pytest.mark.parametrize("options", [{}, {"average": "block"}])
def test_a_window_that_is_lost_is_an_error_or_starts_empty_as_asked(tmp_path, options):
    loop = Loop(merger=merger_of(tmp_path, **options)).run(9)
    state = loop.state()
    loop.merger.close()
    for file in tmp_path.glob("snapshot-*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        Loop(merger=merger_of(tmp_path, **options)).load(state)
    again = Loop(merger=merger_of(tmp_path, on_missing="refill", **options)).load(state).run(16)
    assert [item.progress.step for item in again.merger.window.valid] == [12, 14, 16]


def test_a_configuration_that_makes_other_snapshots_is_an_error_that_names_its_key(tmp_path):
    loop = Loop(merger=merger_of(tmp_path)).run(9)
    state = loop.state()
    loop.merger.close()
    with pytest.raises(ConfigError, match="every: '3 steps', and the snapshots of the resumed run"):
        Loop(merger=merger_of(tmp_path, every=3)).load(state)


def test_a_state_needs_a_folder_and_a_model_that_is_known(tmp_path):
    with pytest.raises(ConfigError, match="window_folder: None"):
        Loop(merger=RollingMerger(window=3, every=2)).run(4).merger.state_dict()
    state = Loop(merger=merger_of(tmp_path)).run(4).merger.state_dict()
    with pytest.raises(ConfigError, match=r"before the model is known.*watch\(model\)"):
        merger_of(tmp_path).load_state_dict(state)
    for damaged in ({}, {"window": "{}"}, {"window": state["window"].replace('"step": 4', '"step": 5')}):
        with pytest.raises(CheckpointError, match=r"Resume from another checkpoint"):
            Loop(merger=merger_of(tmp_path / "other")).merger.load_state_dict(damaged)
    for keep in (0, True, "all"):
        with pytest.raises(ConfigError, match=r"keep_windows: .* Allowed: 1 and up, or None"):
            merger_of(tmp_path, keep_windows=keep)
    with pytest.raises(ConfigError, match="on_missing: 'ignore'"):
        merger_of(tmp_path, on_missing="ignore")


def test_two_runs_do_not_share_a_folder(tmp_path):
    first, second = (Loop(merger=merger_of(tmp_path)).run(4) for _ in range(2))
    first.merger.state_dict()
    with pytest.raises(CheckpointError, match="in use by process"):
        second.merger.state_dict()
    first.merger.close()
    second.merger.state_dict()


def test_a_merger_is_not_pickled_by_accident(tmp_path):
    with pytest.raises(CheckpointError, match=r"Put merger\.state_dict\(\) into the checkpoint"):
        pickle.dumps(merger_of(tmp_path))


def test_an_evaluation_leaves_out_views_that_are_not_ready(tmp_path):
    loop = Loop(merger=merger_of(tmp_path, window=4, views=["sma", "sma4"])).run(4)
    raw = weights(loop)
    found = loop.merger.evaluate(loop.model, lambda: weights(loop))
    assert list(found) == ["raw", "sma"]
    assert torch.equal(found["raw"], raw)
    assert not torch.equal(found["sma"], raw)
    assert torch.equal(weights(loop), raw)


def test_a_window_is_restored_where_what_it_holds_is_frozen_by_now(tmp_path):
    def merger(model):
        found = RollingMerger(window=3, every=1, window_folder=tmp_path)
        found.watch(model)  # no optimizer is there yet that could tell
        return found

    model = Noisy()
    before = merger(model)
    for step in (1, 2, 3):
        before.observe(model, step)
    state = before.state_dict()
    before.close()
    model.layers[0].requires_grad_(False)
    after = merger(model)
    after.load_state_dict(state)
    assert set(after.tensors(model)) == set(before.tensors(model)) == set(dict(model.named_parameters()))
    assert [snapshot.progress.step for snapshot in after.window.snapshots] == [1, 2, 3]
