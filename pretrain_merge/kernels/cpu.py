"""The compiled CPU backend: one call for a whole list of tensors, on as many threads as torch uses.

Knows how the work of a merge is shared between threads. The arithmetic is in `cpu_kernel`.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pretrain_merge.kernels import reference
from pretrain_merge.kernels.cpu_kernel import Kernel, compile_kernel
from pretrain_merge.kernels.llvm import converts_float16
from pretrain_merge.kernels.spread import Spread, Sums
from pretrain_merge.kernels.tables import SUMS_WIDTH, address_table, item_table

if not converts_float16():
    raise ImportError("this CPU does not convert float16 in hardware")

DEVICES = ("cpu",)

# Elements that a thread takes at a time: a millisecond or two, so that a core that is busy elsewhere simply takes
# fewer.
_ITEM = 1 << 19
# A thread takes 0.1 ms to start and to join, in which a core reads about this many elements.
_MIN_READS_PER_THREAD = 1 << 20


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
    rows = address_table(out, snapshots)
    items = item_table(out, _ITEM)
    multipliers = np.array(coefficients, dtype=np.float64 if double else np.float32)
    counter = np.zeros(1, dtype=np.int64)
    sums = np.zeros((len(items), SUMS_WIDTH))
    arguments = (
        rows.ctypes.data,
        items.ctypes.data,
        len(items),
        counter.ctypes.data,
        multipliers.ctypes.data,
        len(snapshots),
        sums.ctypes.data,
    )
    num_reads = len(snapshots) * sum(tensor.numel() for tensor in out)
    num_threads = min(torch.get_num_threads(), len(items), 1 + num_reads // _MIN_READS_PER_THREAD)
    # the one mix that is slower than memory when its elements are converted one by one
    paired = not double and all(tensor.dtype is torch.bfloat16 for tensors in (out, *snapshots) for tensor in tensors)
    _run(_kernel(double, spread, paired), arguments, num_threads)
    if not spread:
        return None
    total = Sums(*(math.fsum(column) for column in sums.T))
    elements = sum(tensor.numel() for tensor in out)
    if double or total.are_trustworthy(num_snapshots=len(snapshots), num_elements=elements):
        return total.spread(len(snapshots))
    return reference.measure(snapshots)


def _run(kernel: Kernel, arguments: tuple[int, ...], num_threads: int) -> None:
    """Run the same call on every thread; the calls share the items among themselves."""
    if num_threads <= 1:
        kernel(*arguments)
        return
    # Threads of this call only. A pool that outlives it would be dead, and waited for, in a forked DataLoader worker.
    with ThreadPoolExecutor(num_threads - 1) as helpers:
        running = [helpers.submit(kernel, *arguments) for _ in range(num_threads - 1)]
        kernel(*arguments)
    for call in running:
        call.result()


@cache
def _kernel(double: bool, spread: bool, paired: bool) -> Kernel:
    return compile_kernel(double=double, spread=spread, paired=paired)
