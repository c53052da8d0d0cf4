"""A module that lists only some of its parameters when asked: all that train are merged, and put back."""

import torch
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.parameters import Places, all_tensors, is_sharded, mergeable_tensors, named_parameters


class ListsItsHead(nn.Module):
    """As modules do that give an optimizer what it is to have."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.register_buffer("count", torch.zeros(1))

    def parameters(self, recurse=True):
        return self.head.parameters(recurse)

    def named_parameters(self, *arguments, **options):
        return self.head.named_parameters(*arguments, **options)

    def named_buffers(self, *arguments, **options):
        return iter(())


def test_places_of_parameters_that_a_module_does_not_list_are_put_back():
    module = ListsItsHead()
    places = Places(module, mergeable_tensors(module))
    raw = module.base.weight.detach().clone()
    memory = module.base.weight.data_ptr()

    module.base.weight.data = raw + 1
    places.put_back()

    assert module.base.weight.data_ptr() == memory
    assert torch.equal(module.base.weight, raw)


def test_a_module_that_lists_some_parameters_is_merged_whole():
    module = ListsItsHead()
    merger = RollingMerger(window=2, every=1)
    values = (1.0, 3.0)
    for step, value in enumerate(values, start=1):
        for _, parameter in named_parameters(module):
            nn.init.constant_(parameter, value)
        merger.observe(module, step)

    with merger.merged(module, "sma"):
        assert all(torch.equal(item, torch.full_like(item, 2.0)) for _, item in named_parameters(module))
    assert all(torch.equal(item, torch.full_like(item, 3.0)) for _, item in named_parameters(module))


def test_all_tensors_has_what_a_module_does_not_list():
    module = ListsItsHead()
    assert len(list(named_parameters(module))) == 4
    assert len(all_tensors(module)) == 5
    assert not is_sharded(module)
