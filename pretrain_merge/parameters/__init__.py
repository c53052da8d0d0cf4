"""The live model on this rank: which tensors are merged, and the shards that they are."""

from pretrain_merge.parameters.live import (
    all_finite,
    as_shards,
    copy_,
    identities,
    is_sharded,
    mergeable_tensors,
    plain_name,
    reshard,
    whole_sizes,
)

__all__ = [
    "all_finite",
    "as_shards",
    "copy_",
    "identities",
    "is_sharded",
    "mergeable_tensors",
    "plain_name",
    "reshard",
    "whole_sizes",
]
