"""Where an optimizer keeps float32 masters of 16-bit parameters, those are merged, and rounded once."""

import numpy as np
import pytest
import torch
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.errors import UnsupportedModelError


class MasterSGD(torch.optim.SGD):
    """Steps float32 masters and rounds them into bfloat16 parameters, as Megatron's optimizers do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype == torch.bfloat16:
                    self.state[parameter]["master"] = parameter.detach().float()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                master = self.master_of(parameter)
                target = parameter if master is None else master
                target.sub_(parameter.grad.float(), alpha=group["lr"])
                parameter.copy_(target)

    def master_of(self, parameter):
        return self.state[parameter].get("master")


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 16, dtype=torch.bfloat16)
        self.norm = nn.Parameter(torch.ones(16))  # stays in float32, so it has no master

    def forward(self, x):
        return self.body(x.bfloat16()).float() * self.norm


def trained(steps, *, state=None, **options):
    torch.manual_seed(0)
    model = Mixed()
    optimizer = MasterSGD(model.parameters(), lr=1e-3)
    merger = RollingMerger(window=4, every=2, masters=optimizer.master_of, **options)
    merger.watch(model, [optimizer])
    if state is not None:
        model.load_state_dict(state["model"])
        for parameter, master in zip(model.parameters(), state["masters"], strict=True):
            optimizer.state[parameter].update({"master": master.clone()} if master is not None else {})
        merger.load_state_dict(state["merger"])
    masters = {}
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        merger.observe(model, step, lr=1e-3)
        masters[step] = optimizer.master_of(model.body.weight).double().numpy().copy()
    return model, optimizer, merger, masters


@pytest.mark.parametrize("average", ["last", "block"])
@pytest.mark.parametrize("store", ["device", "host"])
def test_the_merge_of_masters_is_rounded_once(average, store):
    model, _, merger, masters = trained(range(1, 9), average=average, store=store)
    raw = model.body.weight.clone()
    steps = (2, 4, 6, 8) if average == "last" else range(1, 9)
    exact = np.mean([masters[step] for step in steps], axis=0)
    with merger.merged(model, "sma"):
        # to the accumulator's error before the one rounding
        assert torch.equal(model.body.weight, torch.tensor(exact).float().bfloat16())
    assert torch.equal(model.body.weight, raw)


def test_merging_the_parameters_instead_would_round_each_snapshot_before():
    model, _, merger, masters = trained(range(1, 9))
    exact = np.mean([masters[step] for step in (2, 4, 6, 8)], axis=0)
    rounded = np.mean([torch.tensor(masters[step]).bfloat16().double().numpy() for step in (2, 4, 6, 8)], axis=0)
    assert not torch.equal(torch.tensor(rounded).bfloat16(), torch.tensor(exact).float().bfloat16())
    with merger.merged(model, "sma"):
        assert model.norm.dtype == torch.float32  # no master: the parameter itself


def test_masters_are_read_and_never_written():
    model, optimizer, merger, masters = trained(range(1, 9))
    with merger.merged(model, "sma"):
        pass
    assert np.array_equal(optimizer.master_of(model.body.weight).double().numpy(), masters[8])


def test_a_window_of_masters_resumes_exactly(tmp_path):
    model, _, merger, _ = trained(range(1, 13))
    with merger.merged(model, "sma") as recipe:
        merged = model.body.weight.clone()
    first, optimizer, half, _ = trained(range(1, 8), window_folder=tmp_path)
    state = {
        "model": first.state_dict(),
        "masters": [optimizer.master_of(parameter) for parameter in first.parameters()],
        "merger": half.state_dict(),
    }
    half.close()
    again, _, merger, _ = trained(range(8, 13), state=state, window_folder=tmp_path)
    with merger.merged(again, "sma") as recipe_again:
        assert recipe_again == recipe
        assert torch.equal(again.body.weight, merged)


@pytest.mark.parametrize(
    ("masters", "message"),
    [
        (lambda parameter: None, "masters gave None for all 3 parameters"),
        (lambda parameter: parameter.detach().float().flatten()[:8], "flat shards"),
        (lambda parameter: parameter, "Allowed: masters in float32"),
    ],
)
def test_what_is_no_master_is_refused(masters, message):
    with pytest.raises(UnsupportedModelError, match=message):
        RollingMerger(window=3, every=1, masters=masters).observe(Mixed(), 1)


def test_masters_noted_on_the_parameters_as_megatron_does_are_found_in_chunks():
    chunks = [Mixed(), Mixed()]
    for chunk in chunks:
        chunk.body.weight.main_param = chunk.body.weight.detach().float().add_(1e-4)
    merger = RollingMerger(window=3, every=1, masters=lambda parameter: getattr(parameter, "main_param", None))
    for step in range(1, 4):
        merger.observe(chunks, step)
    with merger.merged(chunks, "sma"):
        for chunk in chunks:
            assert torch.equal(chunk.body.weight, chunk.body.weight.main_param.bfloat16())
