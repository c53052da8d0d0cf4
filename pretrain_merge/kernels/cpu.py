"""The compiled CPU backend: one call for a whole list of tensors, on as many threads as torch uses.

Knows tensors and what is done where float32 cannot carry their spread. How it runs is in `flat`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain_merge.kernels import flat, reference
from pretrain_merge.kernels.addresses import sizes_of, table_of
from pretrain_merge.kernels.spread import Spread

DEVICES = ("cpu",)


def merge_(
    out: Sequence[Tensor],
    snapshots: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float],
    *,
    double: bool,
    spread: bool,
) -> Spread | None:
    """Write `sum_j coefficients[j] * snapshots[j][i]` into every `out[i]`; see `weighted_sum_` for the promises.

    Args:
        out: CPU tensors to be written. Each is one block of memory with the snapshots' tensors (`inputs.is_one_block`).
            With `spread`, none is a snapshot's tensor.
        snapshots: N sequences as long as `out`, oldest first.
        coefficients: N numbers.
        double: Accumulate in float64. Required where `out` or a snapshot holds a float64 tensor.
        spread: Also measure how far the snapshots lie from their mean.

    Returns:
        The spread over all tensors if it was asked for, else None. No result depends on the number of threads.
    """
    sizes = sizes_of(out)
    rows = table_of(out, snapshots)
    total = flat.merge_memory(
        rows, sizes, coefficients, double=double, spread=spread, most_threads=torch.get_num_threads()
    )
    if total is None:
        return None
    return total.spread_or(
        lambda: reference.measure(snapshots), num_snapshots=len(snapshots), num_elements=sum(sizes), double=double
    )
