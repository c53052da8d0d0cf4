"""The parameters that the benchmarks move: the tensors of a 110M Llama, whole or with every side cut."""

import torch
from torch import Tensor

from benchmarks.merge_kernel import llama_110m

Shapes = tuple[tuple[int, ...], ...]


def llama_shapes(*, shrink: int = 1) -> Shapes:
    """Shapes of a 110M Llama, every side divided by `shrink`."""
    return tuple(tuple(max(1, size // shrink) for size in shape) for shape in llama_110m())


def llama_tensors(dtype: torch.dtype, device: torch.device, *, shrink: int = 1) -> dict[str, Tensor]:
    """Named random tensors of these shapes; random, since pages that were never written are all one and the same."""
    return {
        f"weights.{index}": torch.randn(shape, device=device).to(dtype)
        for index, shape in enumerate(llama_shapes(shrink=shrink))
    }
