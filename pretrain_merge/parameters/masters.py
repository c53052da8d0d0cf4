"""Parameters in 16 bits of which an optimizer keeps the float32 original: what a snapshot then holds of each.

This module knows parameters and their masters. It knows no optimizers: where one keeps its masters is its own affair.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain_merge.errors import UnsupportedModelError

Masters = Callable[[Any], Tensor | None]


@torch.no_grad()
def with_masters(
    masters: Masters, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The masters in place of the tensors that have one.

    Args:
        masters: Gives the master of a parameter; None where it has none.
        parameters: By name.
        tensors: What is merged of them on this rank, by the same names; buffers too.

    Raises:
        UnsupportedModelError: No parameter has a master, or one is not the whole of its parameter in float32.
    """
    found = {name: masters(parameters[name]) for name in tensors if name in parameters}
    given = {name: master for name, master in found.items() if master is not None}
    if not given:
        raise UnsupportedModelError(
            f"masters gave None for all {len(found)} parameters that are merged. Allowed: a function from a parameter "
            f"to the float32 tensor that the optimizer keeps of it. Take a snapshot after the first optimizer step "
            f"only, or leave masters out to merge the parameters themselves."
        )
    return dict(tensors) | {name: _local(name, master, tensors[name]) for name, master in given.items()}


def _local(name: str, master: Tensor, tensor: Tensor) -> Tensor:
    local = master.to_local() if isinstance(master, DTensor) else master.detach()
    # in another layout its elements would be in another order than those that are written
    if local.dtype not in (torch.float32, torch.float64) or local.shape != tensor.shape or not local.is_contiguous():
        raise UnsupportedModelError(
            f"the master of {name!r} is {tuple(local.shape)} in {local.dtype}, and what this rank holds of the "
            f"parameter is {tuple(tensor.shape)}. Allowed: masters in float32, contiguous, of the parameter's own "
            f"shape. An optimizer that cuts them into flat shards (a distributed optimizer) has none such: leave "
            f"masters out."
        )
    return local.to(tensor.device)
