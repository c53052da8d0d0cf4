"""Averages of weights that Lightning's own callbacks keep, where a run goes back.

This module knows `EMAWeightAveraging` and `StochasticWeightAveraging` by what they hold. It knows no restart points.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def begin_average_anew(callback: Any, module: nn.Module) -> None:
    """Lightning's EMA and SWA hold the damage, and NaN for ever: they begin with the weights that are here now."""
    average = getattr(callback, "_average_model", None)
    if not isinstance(average, nn.Module):
        return
    inner = getattr(average, "module", average)
    for mine, live in zip(_tensors(inner), _tensors(module), strict=True):
        mine.copy_(live)
    for owner in (callback, average):
        count = getattr(owner, "n_averaged", None)
        if isinstance(count, Tensor):
            count.zero_()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
