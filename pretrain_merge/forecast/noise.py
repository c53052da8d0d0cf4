"""How much of an iterate's noise is left in a mean of iterates, as a share of its variance.

The noise is taken to be forgotten as exp(-time / MEMORY). This module is a formula; it knows no records and no losses.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MEMORY = 8.0  # steps after which an iterate's noise is forgotten; matters only where snapshots are closer than a few


def left_by_mean(length: float) -> float:
    """Of the mean over a continuous stretch, whose length is given in memories."""
    if length < 1e-3:  # the closed form cancels there
        return 1 - length / 3
    return float(2 / length * (1 - (1 - np.exp(-length)) / length))


@lru_cache(maxsize=1024)  # one gap for a whole run as a rule, and another at each merge where intervals grow
def left_by_samples(number: int, gap: float) -> float:
    """Of the mean of so many samples, equally spaced by a gap in memories."""
    lags = np.arange(1, number)
    return 1 / number + 2 / number**2 * float(np.sum((number - lags) * np.exp(-gap * lags)))


def added_by_sampling(span: float, number: int, average: str) -> float:
    """What a mean of snapshots over a span keeps more than the mean of all iterates there.

    Args:
        span: Steps that it spans.
        number: Snapshots in it.
        average: What a snapshot is: with "block" every iterate is in the mean, or enough of them.
    """
    if average == "block":
        return 0.0
    return left_by_samples(number, span / (number - 1) / MEMORY) - left_by_mean(span / MEMORY)
