"""How many elements each rank is said to hold is what torch gives it."""

import pytest
import torch
from harness.ranks import on_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from pretrain_merge import parameters
from pretrain_merge.errors import ConfigError
from pretrain_merge.plan import Layout

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


def uneven():
    """Rows that do not divide by two or four, and a layer of one row, which leaves ranks without any."""
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False), nn.Linear(3, 1))


def held(sharded):
    return sum(shard.numel() for shard in parameters.mergeable_tensors(sharded).values())


def four_ranks():
    """FSDP2 over all; two copies, each divided by tensor parallelism over two; and FSDP2 over the outer two instead."""
    model = uneven()
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    found = [held(model)]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "tensor"))
    for shards in (False, True):
        model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Linear(8, 12, bias=False), nn.LayerNorm(12))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": ColwiseParallel()})
        if shards:
            fully_shard(model, mesh=mesh["outer"])
        found.append(held(model))
    return found


@pytest.fixture(scope="module")
def measured():
    """Elements on each rank, under each of the layouts."""
    return list(zip(*on_ranks(four_ranks, num_ranks=4), strict=True))


def test_each_rank_holds_what_fsdp2_gives_it(measured):
    layout, shapes_of_it = Layout(shard=4), [tuple(parameter.shape) for parameter in uneven().parameters()]
    assert tuple(layout.elements(shapes_of_it, rank) for rank in range(4)) == measured[0]
    assert layout.elements_of_all_ranks(shapes_of_it) == sum(measured[0])
    assert layout.elements(shapes_of_it) == max(measured[0]) > min(measured[0])


def test_tensor_parallelism_divides_matrices_and_leaves_vectors_whole(measured):
    model = [(8, 5), (12, 8), (12,), (12,)]
    assert measured[1] == (Layout(replicate=2, tensor=2).elements(model),) * 4
    assert measured[2] == (Layout(shard=2, tensor=2).elements(model),) * 4


@given(shapes, st.integers(1, 12))
def test_shards_are_torchs_chunks(shape, shard):
    chunks = torch.empty(shape, device="meta").chunk(shard)
    sizes = [chunk.numel() for chunk in chunks] + [0] * (shard - len(chunks))
    assert [Layout(shard).elements([shape], rank) for rank in range(shard)] == sizes


@given(st.integers(1, 10**12), st.integers(1, 64), st.integers(1, 16))
def test_a_count_is_divided_by_all_that_divide_a_matrix(count, shard, tensor):
    own = Layout(shard, 3, tensor).elements([(count, 1)])
    assert count / (shard * tensor) <= own < count / (shard * tensor) + 2
    assert Layout(shard, 3, tensor).elements_of_all_ranks([(count, 1)]) >= 3 * count


@pytest.mark.parametrize("sizes", [{"shard": 0}, {"tensor": -2}])
def test_a_layout_without_ranks_is_refused(sizes):
    (name,) = sizes
    with pytest.raises(ConfigError, match=f"{name}: .*Allowed: 1 or more"):
        Layout(**sizes)
