"""A whole model as tables of integers, the form in which compiled kernels take it in one call.

Knows addresses, dtype codes and where to cut what is long. Knows no kernel and no tensors: a merge of files has none,
and torch takes longer to load than such a merge.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.int64]

# The codes by which kernels tell dtypes apart at run time.
CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}
# Bytes of an element, by code.
SIZES = {0: 4, 1: 2, 2: 2, 3: 8}

ITEM_WIDTH = 3
# What a kernel leaves per item for the spread: the fields of `spread.Sums`.
SUMS_WIDTH = 3


def address_table(rows: Iterable[Iterable[tuple[int, int]]]) -> Table:
    """One row per tensor: `address of the output, its code, (address of the input, its code) * N`."""
    return np.array([[number for pair in row for number in pair] for row in rows], dtype=np.int64)


def item_table(sizes: Sequence[int], longest: int) -> Table:
    """Pieces of at most `longest` elements, one row each: `row of the address table, first element, end`."""
    lengths = np.array(sizes, dtype=np.int64)
    num_pieces = -(-lengths // longest)
    row = np.repeat(np.arange(len(lengths)), num_pieces)
    first_piece = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    begin = (np.arange(len(row)) - first_piece) * longest
    return np.stack([row, begin, np.minimum(begin + longest, lengths[row])], axis=1)
