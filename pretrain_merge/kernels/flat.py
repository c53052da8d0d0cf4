"""The compiled CPU kernel on memory that is given by its address: for callers with tensors, and for those without.

Knows how the work of a merge is shared between threads. The arithmetic is in `cpu_kernel`. Importing it fails where
there is no llvmlite or no hardware for it, and loads no torch.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock

import numpy as np

from pretrain_merge.kernels.cpu_kernel import Kernel, compile_kernel
from pretrain_merge.kernels.llvm import converts_float16
from pretrain_merge.kernels.spread import Sums
from pretrain_merge.kernels.tables import CODES, SUMS_WIDTH, Table, item_table

if not converts_float16():
    raise ImportError("this CPU does not convert float16 in hardware")

# Elements that a thread takes at a time: a millisecond or two, so that a core that is busy elsewhere simply takes
# fewer.
_ITEM = 1 << 19
# A thread takes 0.1 ms to start and to join, in which a core reads about this many elements.
_MIN_READS_PER_THREAD = 1 << 20
_compiling = Lock()


def merge_memory(
    rows: Table,
    sizes: Sequence[int],
    coefficients: Sequence[float],
    *,
    double: bool,
    spread: bool,
    most_threads: int,
) -> Sums | None:
    """Write `sum_j coefficients[j] * input_j` to every output.

    Args:
        rows: Of `tables.address_table`: addresses of one output and of N inputs each. Nobody checks them: memory that
            is shorter than its size, or an output that overlaps anything but the input it replaces, is the caller's
            fault.
        sizes: Elements of each row.
        coefficients: N numbers.
        double: Accumulate in float64. Required where anything is float64.
        spread: Also measure how far the inputs lie from their mean; then no output replaces an input.
        most_threads: That may work at a time.

    Returns:
        What was added up for the spread if it was asked for, else None. No result depends on the number of threads.
    """
    items = item_table(sizes, _ITEM)
    multipliers = np.array(coefficients, dtype=np.float64 if double else np.float32)
    counter = np.zeros(1, dtype=np.int64)
    sums = np.zeros((len(items), SUMS_WIDTH))
    arguments = (
        rows.ctypes.data,
        items.ctypes.data,
        len(items),
        counter.ctypes.data,
        multipliers.ctypes.data,
        len(coefficients),
        sums.ctypes.data,
    )
    num_reads = len(coefficients) * sum(sizes)
    num_threads = min(most_threads, len(items), 1 + num_reads // _MIN_READS_PER_THREAD)
    # the one mix that is slower than memory when its elements are converted one by one
    paired = not double and bool((rows[:, 1::2] == CODES["bfloat16"]).all())
    _run(_kernel(double, spread, paired), arguments, num_threads)
    return Sums(*(math.fsum(column) for column in sums.T)) if spread else None


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


def _kernel(double: bool, spread: bool, paired: bool) -> Kernel:
    # threads that need one at the same moment would each compile it, for as long as the merge of a small model takes
    with _compiling:
        return _compiled(double, spread, paired)


@cache
def _compiled(double: bool, spread: bool, paired: bool) -> Kernel:
    return compile_kernel(double=double, spread=spread, paired=paired)
