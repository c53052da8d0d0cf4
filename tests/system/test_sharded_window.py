"""A window that W processes saved goes on, exactly, on any other number of them: FSDP2 on real gloo processes."""

import json
from pathlib import Path

import pytest
import torch
from harness.ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from pretrain_merge import RollingMerger
from pretrain_merge.errors import CheckpointError
from pretrain_merge.resume.manifest import Manifest

OPTIONS = {"window": 3, "every": 2, "average": "block", "views": ["wma"]}
WORLDS = [(2, 1), (1, 2), (2, 4)]


def weights_at(step):
    """Of an iterate, by name, whole: rows that divide by nothing, and one row for four ranks."""
    generator = torch.Generator().manual_seed(step)
    shapes = {"0.weight": (7, 5), "0.bias": (7,), "1.weight": (1, 7), "1.bias": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sharded_model(num_ranks):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
    mesh = init_device_mesh("cpu", (num_ranks,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


@torch.no_grad()
def observe(merger, model, steps):
    for step in steps:
        for name, whole in weights_at(step).items():
            parameter = model.get_parameter(name)
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
        merger.observe(model, step, lr=0.1)


def merged(merger, model):
    with merger.merged(model, "wma"):
        return {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}


def save(folder, num_ranks):
    """Seven steps, so that a block is open; then the rest of the run."""
    model, merger = sharded_model(num_ranks), RollingMerger(**OPTIONS)
    observe(merger, model, range(1, 8))
    manifest = merger.manifest(model, Path(folder))
    if torch.distributed.get_rank() == 0:
        (Path(folder) / "manifest.json").write_text(json.dumps(manifest.to_plain()))
    now = merged(merger, model)
    observe(merger, model, range(8, 11))
    return {"now": now, "later": merged(merger, model)}


def resume(folder, num_ranks):
    model, merger = sharded_model(num_ranks), RollingMerger(**OPTIONS)
    manifest = Manifest.from_plain(json.loads((Path(folder) / "manifest.json").read_text()))
    merger.restore(manifest, model, Path(folder))
    now = merged(merger, model)
    observe(merger, model, range(8, 11))
    result = {"now": now, "later": merged(merger, model), "refused": ""}
    part = sorted(Path(folder).glob("snapshot-00000004-*/shard-*.safetensors"))[0]
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        part.write_bytes(part.read_bytes()[:-1] + b"\0")
    torch.distributed.barrier()
    try:
        RollingMerger(**OPTIONS).restore(manifest, model, Path(folder))
    except CheckpointError as error:
        result["refused"] = str(error)
    return result


@pytest.fixture(scope="module", params=WORLDS, ids=lambda pair: f"{pair[0]} to {pair[1]}")
def runs(request, tmp_path_factory):
    before, after = request.param
    folder = str(tmp_path_factory.mktemp("window"))
    saved = on_ranks(save, folder, before, num_ranks=before)
    return saved[0], on_ranks(resume, folder, after, num_ranks=after)


def test_merges_after_a_resume_on_other_ranks_are_those_of_the_run_before(runs):
    saved, resumed = runs
    for of_rank in resumed:
        for when in ("now", "later"):
            assert saved[when].keys() == of_rank[when].keys()
            for name, tensor in saved[when].items():
                assert torch.equal(tensor, of_rank[when][name]), (when, name)


def test_the_merge_is_the_weighted_mean_of_the_block_means(runs):
    saved, _ = runs
    for name, tensor in saved["now"].items():
        means = [(weights_at(k)[name].double() + weights_at(k + 1)[name].double()) / 2 for k in (1, 3, 5)]
        expected = sum(c / 6 * mean for c, mean in zip((1, 2, 3), means, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_damaged_part_is_an_error_on_every_rank(runs):
    _, resumed = runs
    assert all("is damaged. Copy the folder again" in of_rank["refused"] for of_rank in resumed)
