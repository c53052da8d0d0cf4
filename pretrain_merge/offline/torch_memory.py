"""Memory and dtypes of this folder as torch has them, and back: where a file, a device or a module needs torch.

This module knows both sides' words for the same bytes. It copies nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain_merge.kernels import reference
from pretrain_merge.kernels.spread import Spread
from pretrain_merge.kernels.weighted_sum import weighted_sum_
from pretrain_merge.offline.pieces import Part, bits_of, bytes_of
from pretrain_merge.offline.tensors import Dtype

if TYPE_CHECKING:
    from pretrain_merge.offline.sums import Row


def own_dtype(dtype: torch.dtype) -> Dtype:
    """Of torch's."""
    return Dtype(str(dtype).removeprefix("torch."), dtype.itemsize)


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """Torch's own."""
    found = getattr(torch, dtype.name)
    assert isinstance(found, torch.dtype)
    return found


def part_of(tensor: Tensor) -> Part:
    """The memory of a contiguous tensor on the CPU."""
    dtype = own_dtype(tensor.dtype)
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    return Part(flat.view(bits_of(dtype)).reshape(tensor.shape), dtype)


def tensor_of(part: Part) -> Tensor:
    """A tensor in the same memory."""
    return torch.from_numpy(bytes_of(part.bits)).view(torch_dtype(part.dtype)).view(part.bits.shape)


def sum_by_torch(rows: Sequence["Row"], coefficients: Sequence[float], device: str) -> Spread:
    """Write every target, on a device or where no compiled kernel is installed; returns the spread."""
    there = torch.device(device)
    targets = [tensor_of(row.target) for row in rows]
    sources = [[tensor_of(part).to(there, non_blocking=True) for part in column] for column in _columns(rows)]
    # on the CPU both are the same memory
    sums = [target if there.type == "cpu" else torch.empty_like(target, device=there) for target in targets]
    spread = weighted_sum_(sums, sources, coefficients, spread=True)
    for target, total in zip(targets, sums, strict=True):
        if total is not target:
            target.copy_(total)
    assert spread is not None
    return spread


def measure_by_torch(rows: Sequence["Row"]) -> Spread:
    """The spread alone, in float64."""
    return reference.measure([[tensor_of(part) for part in column] for column in _columns(rows)])


def _columns(rows: Sequence["Row"]) -> list[tuple[Part, ...]]:
    return list(zip(*(row.parts for row in rows), strict=True))
