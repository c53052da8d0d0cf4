"""Agreement between ranks: one small reduction, and nothing where there is one process.

This module knows process groups and nothing of merging. Every rank must call these functions at the same point.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")
_NumberT = TypeVar("_NumberT", int, float)


def num_ranks() -> int:
    """Processes in the default group; 1 where none is set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the default group; 0 where none is set up."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    return sum_over_ranks([int(flag)])[0] > 0


def gather(value: _T) -> list[_T]:
    """What each rank gave, in the order of ranks."""
    values: list[_T] = [value] * num_ranks()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(numbers: Sequence[_NumberT]) -> list[_NumberT]:
    """Sums over all ranks, of integers in int64 and of floats in float64, in one all-reduce."""
    if num_ranks() == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    dtype = torch.int64 if all(isinstance(number, int) for number in numbers) else torch.float64
    total = torch.tensor(numbers, dtype=dtype, device=device)
    dist.all_reduce(total)
    return total.tolist()
