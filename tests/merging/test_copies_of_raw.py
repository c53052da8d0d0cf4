"""Raw is taken from the newest slot where its bits are there, and copied where they are not."""

import pytest
import torch
from merging.moved_models import move, state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain_merge import RollingMerger


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
