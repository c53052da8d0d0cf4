"""Two ranks, FSDP2 and a loop of one's own: what is written into shards is what the next forward computes with."""

import copy

import pytest
import torch
from harness.ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from pretrain_merge import RollingMerger, parameters


def both_ways():
    return {
        "loops": [loop_of_ones_own(reshard) for reshard in (True, False)],
        "zeroed": [zeroed_between_forwards(reshard) for reshard in (True, False)],
    }


def loop_of_ones_own(reshard):
    """FSDP2 without a Trainer, which validates between a step and its snapshot: outputs, and what they should be."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))
    sharded, x = copy.deepcopy(plain), torch.randn(8, 5)
    fully_shard(sharded[0], reshard_after_forward=reshard)
    fully_shard(sharded, reshard_after_forward=reshard)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    merging, taken = RollingMerger(window=3, every=1, views=["sma", "wsm"]), []
    for step in range(1, 5):
        sharded(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            sharded(x)
        merging.observe(sharded, step)
        taken.append({name: weight.full_tensor().detach().clone() for name, weight in sharded.named_parameters()})
    given, expected = [], []
    with torch.no_grad(), merging.swap(sharded) as merge_view:
        for view in merging.views:
            recipe = merge_view(view)
            given.append(sharded(x).clone())
            pairs = list(zip(recipe.coefficients, taken[1:], strict=True))
            merged = {name: sum(c * weights[name] for c, weights in pairs) for name in taken[-1]}
            expected.append(torch.func.functional_call(plain, merged, x))
    given.append(sharded(x).detach().clone())
    expected.append(torch.func.functional_call(plain, taken[-1], x).detach())
    return {"given": given, "expected": expected}


def zeroed_between_forwards(reshard):
    """What a sharded layer gives after its shards were set to zero behind a forward without gradients."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3), torch.randn(4, 5)
    fully_shard(layer)
    layer(x).sum().backward()
    shards = parameters.mergeable_tensors(layer)
    with torch.no_grad():
        layer(x)
    if reshard:
        parameters.reshard(layer)
    for shard in shards.values():
        shard.zero_()
    return layer(x).abs().max().item()


@pytest.fixture(scope="module")
def runs():
    return on_ranks(both_ways)


def test_p18_resharding_makes_the_next_forward_see_what_was_written_into_shards(runs):
    for rank in runs:
        resharded, careless = rank["zeroed"]
        assert resharded == 0.0
        assert careless > 0.0


@pytest.mark.parametrize("loop", [0, 1], ids=["resharding", "not resharding"])
def test_p18_a_loop_of_ones_own_evaluates_each_view_and_goes_on_with_raw(runs, loop):
    for rank in runs:
        sma, wsm, raw = rank["loops"][loop]["expected"]
        assert min((sma - wsm).abs().max(), (wsm - raw).abs().max(), (sma - raw).abs().max()) > 1e-4
        for given, expected in zip(rank["loops"][loop]["given"], (sma, wsm, raw), strict=True):
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)
