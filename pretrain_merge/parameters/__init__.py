"""The live model on this rank: which tensors are merged, the shards that they are, and their places in memory."""

from pretrain_merge.parameters.elements import all_finite, all_same_bits, copy_
from pretrain_merge.parameters.live import Trained, mergeable_tensors
from pretrain_merge.parameters.masters import Masters
from pretrain_merge.parameters.places import Places
from pretrain_merge.parameters.several import Given, Modules, as_one
from pretrain_merge.parameters.shards import (
    all_tensors,
    as_shards,
    by_plain_name,
    is_sharded,
    named_parameters,
    reshard,
    whole_sizes,
)

__all__ = [
    "Given",
    "Masters",
    "Modules",
    "Places",
    "Trained",
    "all_finite",
    "all_same_bits",
    "all_tensors",
    "as_one",
    "as_shards",
    "by_plain_name",
    "copy_",
    "is_sharded",
    "mergeable_tensors",
    "named_parameters",
    "reshard",
    "whole_sizes",
]
