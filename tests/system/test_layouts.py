"""Four ranks divide a model in every way that PyTorch offers: merges are right, raw comes back, and nobody waits.

The loop is one of one's own, without a Trainer: `RollingMerger` and torch's own `fully_shard` and `parallelize_module`.
"""

from contextlib import ExitStack
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import oracles
from harness.ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from pretrain_merge import RollingMerger, parameters

NUM_RANKS, STEPS, WINDOW = 4, 4, 3  # the last merge is of a window that let its oldest snapshot go
VIEWS = ("sma", "wsm")
LAYOUTS = (
    "uneven and empty shards",
    "sharded and replicated",
    "copies of shards",
    "tensor parallel",
    "shards of tensor parallel",
)
CASES = [
    f"{layout}, {how}"
    for layout in LAYOUTS
    for how in ("resharding", "not resharding")
    if (layout, how) != ("tensor parallel", "not resharding")  # nothing is gathered there
]


class Net(nn.Module):
    """Rows that no number of ranks divides, where the layout allows; two layers alike have one row, for four ranks."""

    def __init__(self, hidden):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, hidden), nn.Linear(hidden, 5)
        self.head, self.gate = nn.Linear(5, 1), nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        hidden = self.down(self.up(x).relu())
        return self.head(hidden) * self.gate(hidden) * self.scale.sum()


@cache
def meshes():
    """Two by two, and all in a row. Each connects its ranks anew, which takes longer than a run: they are shared."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), init_device_mesh("cpu", (NUM_RANKS,))


def divided(layout, reshard):
    """The model, and the ranks over which data differ (gradients of undivided parameters are averaged over them)."""
    mesh, flat = meshes()
    if layout == "tensor parallel":
        return _tensor_parallel(Net(8), flat), 1
    if layout == "shards of tensor parallel":
        model = _tensor_parallel(Net(8), mesh["tensor"])
        _shard(model, mesh["data"], reshard)
        return model, 1  # data are the same on all ranks, so that no average is needed
    model = Net(7)
    if layout == "sharded and replicated":
        fully_shard(model.up, mesh=flat, reshard_after_forward=reshard)
        fully_shard(model.down, mesh=flat, reshard_after_forward=reshard)
        return model, NUM_RANKS
    _shard(model, mesh if layout == "copies of shards" else flat, reshard)
    return model, NUM_RANKS


def _tensor_parallel(model, mesh):
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _shard(model, mesh, reshard):
    fully_shard(model.up, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def full(model):
    """All of each parameter, whatever part of it is on this rank."""
    parameters.reshard(model)
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        for name, weight in model.named_parameters()
    }


def train(layout, reshard, *, merging):
    """Raw weights after each step; with merging also the merged ones, outputs under them, and what was communicated."""
    model, num_data = divided(layout, reshard)
    generator = torch.Generator().manual_seed(dist.get_rank() if num_data > 1 else 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)
    merger = RollingMerger(window=WINDOW, every=1, views=list(VIEWS), store="device")
    run = {"raw": [], "merged": [], "outputs": [], "calls": [], "captures": [], "held": [], "spread": []}
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=generator)).square().mean().backward()
        for weight in model.parameters():
            if num_data > 1 and not isinstance(weight, DTensor):
                dist.all_reduce(weight.grad)
                weight.grad /= num_data
        optimizer.step()
        if merging:
            with CommDebugMode() as communicated:
                merger.observe(model, step)
            run["captures"].append(counted(communicated))
            if merger.merge_is_due():
                merge(model, merger, run)
        run["raw"].append(full(model))
    run["held"] = [shard.numel() for shard in parameters.mergeable_tensors(model).values()]
    return run


def counted(communicated):
    return {str(call): count for call, count in communicated.get_comm_counts().items()}


def merge(model, merger, run):
    x = torch.linspace(-1, 1, 10).view(2, 5)
    with torch.no_grad(), ExitStack() as until_raw_is_back:
        with CommDebugMode() as communicated:
            merge_view = until_raw_is_back.enter_context(merger.swap(model))
        run["calls"].append(counted(communicated))
        for view in VIEWS:
            with CommDebugMode() as communicated:
                merge_view(view)
            run["calls"].append(counted(communicated))
            # the forward comes first: it must not see what a gathered copy from before the merge holds (P18)
            output = model(x)
            run["outputs"].append((output.full_tensor() if isinstance(output, DTensor) else output).clone())
            run["merged"].append(full(model))
        with CommDebugMode() as communicated:
            until_raw_is_back.close()
        run["calls"].append(counted(communicated))
    run["spread"].append(tuple(merger.spread_sums))


def all_layouts():
    # one for both: when layers are divided again changes no number, else one of the comparisons would fail
    off = {layout: train(layout, True, merging=False)["raw"] for layout in LAYOUTS}
    runs = {}
    for case in CASES:
        layout, how = case.split(", ")
        runs[case] = {"on": train(layout, how == "resharding", merging=True), "off": off[layout]}
    return runs


@pytest.fixture(scope="module")
def runs():
    return on_ranks(all_layouts, num_ranks=NUM_RANKS, timeout=150)


def merges(run):
    """For each view of each merge point: the snapshots in it, their coefficients, and the merged weights."""
    merged = iter(run["merged"])
    for step in range(2, STEPS + 1):
        snapshots = run["raw"][:step][-WINDOW:]
        for coefficients in (
            oracles.sma(len(snapshots)),
            oracles.decay(oracles.SHAPES["1-sqrt"], range(len(snapshots))),
        ):
            yield snapshots, coefficients, next(merged)
    assert next(merged, None) is None


def test_the_layouts_are_what_they_are_called(runs):
    held = {case: [rank[case]["on"]["held"] for rank in runs] for case in CASES}
    uneven = held["uneven and empty shards, resharding"]
    assert any(0 in rank for rank in uneven)
    assert len({sum(rank) for rank in uneven}) > 1
    mixed = held["sharded and replicated, resharding"]
    whole = [weight.numel() for weight in Net(7).parameters()]
    assert all(any(a == b for a, b in zip(rank, whole, strict=True)) for rank in mixed)
    assert all(any(a < b for a, b in zip(rank, whole, strict=True)) for rank in mixed)
    hidden = [weight.numel() for weight in Net(8).parameters()]
    assert [rank[1] for rank in held["tensor parallel, resharding"]] == [hidden[1] // 4] * 4
    assert [rank[1] for rank in held["shards of tensor parallel, resharding"]] == [hidden[1] // 4] * 4
    assert [rank[0] for rank in held["shards of tensor parallel, resharding"]] == [2, 2, 1, 1]  # a vector of three


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_the_weighted_sum_of_the_gathered_snapshots(runs, case):
    for rank in runs:
        for snapshots, coefficients, merged in merges(rank[case]["on"]):
            for name, weight in merged.items():
                held = [item[name].double().numpy() for item in snapshots]
                error = np.abs(weight.double().numpy() - oracles.merged(held, coefficients))
                assert np.all(error <= oracles.merge_tolerance(held, coefficients, "float32"))


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_sees_the_merged_weights(runs, case):
    x = torch.linspace(-1, 1, 10).view(2, 5)
    plain = Net(8 if "tensor" in case else 7)
    for rank in runs:
        run = rank[case]["on"]
        for merged, output in zip(run["merged"], run["outputs"], strict=True):
            expected = torch.func.functional_call(plain, merged, x)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_raw_bit_for_bit(runs, case):
    for rank in runs:
        for with_merging, without in zip(rank[case]["on"]["raw"], rank[case]["off"], strict=True):
            assert with_merging.keys() == without.keys()
            assert all(torch.equal(with_merging[name], without[name]) for name in without)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_and_its_restore_communicate_nothing(runs, case):
    for rank in runs:
        assert rank[case]["on"]["calls"] == [{}] * (len(VIEWS) + 2) * (STEPS - 1)


@pytest.mark.parametrize("case", CASES)
def test_a_snapshot_communicates_one_decision_before_and_one_after_it_is_written(runs, case):
    for rank in runs:
        first, *others = rank[case]["on"]["captures"]
        assert others == [{"c10d.allreduce_": 2}] * (STEPS - 1)
        # names of hosts for the choice of a store, and sizes: who holds what; before each, that no rank has failed
        assert first.keys() <= {"c10d.allreduce_", "c10d.allgather_"}
        assert first["c10d.allreduce_"] == 5


@pytest.mark.parametrize("case", CASES)
def test_the_spreads_of_ranks_add_up_to_that_of_the_whole_model(runs, case):
    raw = runs[0][case]["on"]["raw"]
    for merge, sums in enumerate(zip(*(rank[case]["on"]["spread"] for rank in runs), strict=True)):
        held = [np.concatenate([weight.double().numpy().ravel() for weight in item.values()]) for item in raw]
        held = held[: merge + 2][-WINDOW:]
        distance, norm = (sum(part) for part in zip(*sums, strict=True))
        mean = sum(held) / len(held)
        assert distance == pytest.approx(sum(((item - mean) ** 2).sum() for item in held) / len(held), rel=1e-6)
        assert norm == pytest.approx((mean**2).sum(), rel=1e-6)
        assert (distance / norm) ** 0.5 == pytest.approx(oracles.relative_spread(held), rel=1e-6)
