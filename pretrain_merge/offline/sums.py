"""Tensors of several checkpoints to those of a merge: constants stay, the rest is summed, nothing non-finite passes.

This module knows tensors that are in memory, and whose they are, for messages. It knows no files.
"""

import math
from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from pretrain_merge.errors import MergeInputError
from pretrain_merge.kernels.spread import Spread
from pretrain_merge.kernels.tables import CODES, address_table
from pretrain_merge.offline.pieces import Part
from pretrain_merge.offline.tensors import FLOAT16, FLOAT64, Source

_PROBE = 1024  # elements that are compared before a whole tensor is
_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float64": 0x7FF << 52}


class Row(NamedTuple):
    """A tensor, or a piece of one, to be merged.

    Attributes:
        name: Of the tensor.
        target: Is written.
        parts: Of each source, oldest first.
    """

    name: str
    target: Part
    parts: Sequence[Part]


def sum_rows(
    rows: Sequence[Row],
    sources: Sequence[Source],
    coefficients: Sequence[float],
    *,
    device: str = "cpu",
    most_threads: int = 1,
) -> Spread:
    """Write every target.

    Args:
        rows: On the CPU.
        sources: Whose parts they are.
        coefficients: One for each.
        device: Where sums are made.
        most_threads: That may work at a time.

    Returns:
        How far the sources lie from their mean.

    Raises:
        MergeInputError: A tensor is not finite; says whose.
    """
    differing = []
    for row in rows:
        if _are_equal(row.parts):
            row.target.bits[...] = row.parts[-1].bits  # a constant or a frozen weight stays as it is, to the last bit
        else:
            differing.append(row)
    if not differing:
        return Spread(0.0, 0.0)
    spread = _summed(differing, coefficients, device, most_threads)
    is_finite = math.isfinite(spread.squared_distance) and math.isfinite(spread.squared_norm)
    # the only dtype that is narrower in range than what a mean of others needs
    narrow = [row.target for row in differing if row.target.dtype == FLOAT16]
    if not is_finite or not all(map(_is_finite, narrow)):
        _refuse_non_finite(differing, sources)
    return spread


def _summed(rows: Sequence[Row], coefficients: Sequence[float], device: str, most_threads: int) -> Spread:
    flat = _compiled() if device == "cpu" else None
    if flat is None:
        from pretrain_merge.offline.torch_memory import sum_by_torch

        return sum_by_torch(rows, coefficients, device)
    total = Spread(0.0, 0.0)
    for double in (False, True):
        group = [row for row in rows if _needs_double(row) == double]
        if not group:
            continue
        table = address_table([_entry(part) for part in (row.target, *row.parts)] for row in group)
        sizes = [row.target.bits.size for row in group]
        sums = flat.merge_memory(table, sizes, coefficients, double=double, spread=True, most_threads=most_threads)
        total = total + sums.spread_or(
            partial(_measured, group), num_snapshots=len(coefficients), num_elements=sum(sizes), double=double
        )
    return total


def _measured(rows: Sequence[Row]) -> Spread:
    from pretrain_merge.offline.torch_memory import measure_by_torch

    return measure_by_torch(rows)


@cache
def _compiled() -> Any:
    """The compiled kernel; None where torch is needed in its place."""
    try:
        return import_module("pretrain_merge.kernels.flat")
    except ImportError:  # torch's own way warns of it
        return None


def _entry(part: Part) -> tuple[int, int]:
    return part.bits.ctypes.data, CODES[part.dtype.name]


def _needs_double(row: Row) -> bool:
    return any(part.dtype == FLOAT64 for part in (row.target, *row.parts))


def _refuse_non_finite(rows: Sequence[Row], sources: Sequence[Source]) -> None:
    for row in rows:
        for source, part in zip(sources, row.parts, strict=True):
            if not _is_finite(part):
                raise MergeInputError(
                    f"{row.name} of {source.place} is not finite: that checkpoint is of a run that diverged. Leave it "
                    f"out."
                )
        if not _is_finite(row.target):
            raise MergeInputError(
                f"{row.name} of the merge is not finite: it is beyond what {row.target.dtype} holds. Write another "
                f"dtype."
            )


def _is_finite(part: Part) -> bool:
    # infinities and NaN have every bit of the exponent, whatever the dtype
    exponent = np.array(_EXPONENTS[part.dtype.name], part.bits.dtype)
    return not bool(((part.bits & exponent) == exponent).any())


def _are_equal(parts: Sequence[Part]) -> bool:
    """Whether all are the same bits; mostly told by the first ones."""
    first = parts[0].bits.reshape(-1)
    if any(part.dtype != parts[0].dtype for part in parts):
        return False
    for length in (_PROBE, first.size):
        if not all(np.array_equal(first[:length], part.bits.reshape(-1)[:length]) for part in parts[1:]):
            return False
    return True
