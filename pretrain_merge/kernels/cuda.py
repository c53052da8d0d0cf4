"""The CUDA backend: one launch for all tensors of a kind, driven by a table of addresses.

Knows how rows are sorted by the kernel that they need. The arithmetic is in `cuda_kernel`.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pretrain_merge.kernels import cuda_kernel, reference
from pretrain_merge.kernels.addresses import sizes_of, table_of
from pretrain_merge.kernels.spread import Spread, Sums
from pretrain_merge.kernels.tables import SUMS_WIDTH, item_table

# Triton's interpreter runs kernels on CPU tensors; it is chosen by this variable when the kernel below is defined.
DEVICES = ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


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
        out: Tensors of one device to be written. Each is one block of memory with the snapshots' tensors
            (`inputs.is_one_block`). With `spread`, none is a snapshot's tensor.
        snapshots: N sequences as long as `out`, oldest first.
        coefficients: N numbers.
        double: Accumulate in float64. Required where `out` or a snapshot holds a float64 tensor.
        spread: Also measure how far the snapshots lie from their mean. Waits for the device.

    Returns:
        The spread over all tensors if it was asked for, else None.
    """
    total = Spread(0.0, 0.0)
    for (out_dtype, in_dtype, aligned), rows in _group_by_instructions(out, snapshots).items():
        targets = [out[i] for i in rows]
        sources = [[snapshot[i] for i in rows] for snapshot in snapshots]
        # on the host, where it is counted; the device gets it with the launch
        items = torch.from_numpy(item_table(sizes_of(targets), cuda_kernel.ITEM))
        if len(items) == 0:  # tensors without elements: a launch of no blocks is an error
            continue
        device = targets[0].device
        sums = torch.empty(len(items) if spread else 0, SUMS_WIDTH, dtype=torch.float64, device=device)
        multipliers = torch.tensor(coefficients, dtype=torch.float64 if double else torch.float32)
        # Triton launches on the current device, whatever its arguments are on
        with _current(device):
            cuda_kernel.merge_items[(len(items),)](
                torch.from_numpy(table_of(targets, sources)).to(device),
                items.to(device),
                multipliers.to(device),
                sums,
                len(snapshots),
                **cuda_kernel.constants(in_dtype, out_dtype, double=double, aligned=aligned, spread=spread),
                **cuda_kernel.launch_options(double=double, spread=spread),
            )
        if spread:
            # the host waits for the device here, and for the spread only
            added = Sums(*sums.sum(dim=0).tolist())
            total = total + added.spread_or(
                partial(reference.measure, sources),
                num_snapshots=len(snapshots), num_elements=sum(sizes_of(targets)), double=double,
            )  # fmt: skip
    return total if spread else None


def _group_by_instructions(
    out: Sequence[Tensor], snapshots: Sequence[Sequence[Tensor]]
) -> dict[tuple[torch.dtype, torch.dtype | None, bool], list[int]]:
    """Rows that one compiled kernel can take: output dtype, inputs' dtype (None: several), whether all is aligned."""
    groups: dict[tuple[torch.dtype, torch.dtype | None, bool], list[int]] = {}
    for i, target in enumerate(out):
        sources = [snapshot[i] for snapshot in snapshots]
        dtypes = {source.dtype for source in sources}
        # one odd address and the compiler may not use wide accesses for any tensor of the launch
        aligned = all(tensor.data_ptr() % cuda_kernel.WIDE_ACCESS == 0 for tensor in (target, *sources))
        groups.setdefault((target.dtype, dtypes.pop() if len(dtypes) == 1 else None, aligned), []).append(i)
    return groups


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
