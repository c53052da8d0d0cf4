"""Tensors of several checkpoints to those of a merge: constants stay, the rest is summed, nothing non-finite passes.

This module knows tensors that are in memory, and whose they are, for messages. It knows no files.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain_merge.errors import MergeInputError
from pretrain_merge.kernels.weighted_sum import Spread, weighted_sum_
from pretrain_merge.offline.tensors import Source

_PROBE = 1024  # elements that are compared before a whole tensor is


class Row(NamedTuple):
    """A tensor, or a piece of one, to be merged.

    Attributes:
        name: Of the tensor.
        target: Is written.
        parts: Of each source, oldest first.
    """

    name: str
    target: Tensor
    parts: Sequence[Tensor]


def sum_rows(
    rows: Sequence[Row], sources: Sequence[Source], coefficients: Sequence[float], device: torch.device
) -> Spread:
    """Write every target.

    Args:
        rows: On the CPU.
        sources: Whose parts they are.
        coefficients: One for each.
        device: Where sums are made.

    Returns:
        How far the sources lie from their mean.

    Raises:
        MergeInputError: A tensor is not finite; says whose.
    """
    differing = []
    for row in rows:
        if _are_equal(row.parts):
            row.target.copy_(row.parts[-1])  # a constant or a frozen weight stays as it is, to the last bit
        else:
            differing.append(row)
    return _summed(differing, sources, coefficients, device) if differing else Spread(0.0, 0.0)


def _summed(
    rows: Sequence[Row], sources: Sequence[Source], coefficients: Sequence[float], device: torch.device
) -> Spread:
    out = [row.target for row in rows]
    snapshots = [list(column) for column in zip(*(row.parts for row in rows), strict=True)]
    if device.type == "cpu":
        spread = weighted_sum_(out, snapshots, coefficients, spread=True)
    else:
        there = [[part.to(device, non_blocking=True) for part in column] for column in snapshots]
        sums = [torch.empty(target.shape, dtype=target.dtype, device=device) for target in out]
        spread = weighted_sum_(sums, there, coefficients, spread=True)
        for target, total in zip(out, sums, strict=True):
            target.copy_(total)
    assert spread is not None
    is_finite = math.isfinite(spread.squared_distance) and math.isfinite(spread.squared_norm)
    # the only dtype that is narrower in range than what a mean of others needs
    narrow = [target for target in out if target.dtype is torch.float16]
    if not is_finite or not all(bool(target.isfinite().all()) for target in narrow):
        _refuse_non_finite(rows, sources)
    return spread


def _refuse_non_finite(rows: Sequence[Row], sources: Sequence[Source]) -> None:
    for row in rows:
        for source, part in zip(sources, row.parts, strict=True):
            if not part.isfinite().all():
                raise MergeInputError(
                    f"{row.name} of {source.place} is not finite: that checkpoint is of a run that diverged. Leave it "
                    f"out."
                )
        if not row.target.isfinite().all():
            raise MergeInputError(
                f"{row.name} of the merge is not finite: it is beyond what {row.target.dtype} holds. Write another "
                f"dtype."
            )


def _are_equal(parts: Sequence[Tensor]) -> bool:
    """Whether all are the same bits; mostly told by the first ones."""
    first = parts[0].reshape(-1)
    if any(part.dtype is not first.dtype for part in parts):
        return False
    for length in (_PROBE, first.numel()):
        bits = [part.reshape(-1)[:length].view(torch.uint8) for part in parts]
        if not all(torch.equal(bits[0], other) for other in bits[1:]):
            return False
    return True
