"""Lists of tensors as tables of integers, the form in which compiled kernels take a whole model in one call.

Knows addresses, dtype codes and where to cut long tensors. Knows no kernel.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Table = npt.NDArray[np.int64]

# The codes by which kernels tell dtypes apart at run time.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

ITEM_WIDTH = 3
# What a kernel leaves per item for the spread: the fields of `spread.Sums`.
SUMS_WIDTH = 3


def address_table(out: Sequence[Tensor], snapshots: Sequence[Sequence[Tensor]]) -> Table:
    """One row per tensor: `address of the output, its code, (address of the input, its code) * N`."""
    rows = zip(out, *snapshots, strict=True)
    return np.array(
        [[number for tensor in row for number in (tensor.data_ptr(), CODES[tensor.dtype])] for row in rows],
        dtype=np.int64,
    )


def item_table(out: Sequence[Tensor], longest: int) -> Table:
    """Pieces of at most `longest` elements, one row each: `row of the address table, first element, end`."""
    sizes = np.array([tensor.numel() for tensor in out], dtype=np.int64)
    num_pieces = -(-sizes // longest)
    row = np.repeat(np.arange(len(sizes)), num_pieces)
    first_piece = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    begin = (np.arange(len(row)) - first_piece) * longest
    return np.stack([row, begin, np.minimum(begin + longest, sizes[row])], axis=1)
