"""How far snapshots lie from their mean: two sums that add up over chunks, tensors and ranks."""

import math
from typing import NamedTuple


class Spread(NamedTuple):
    """Squared distances of N snapshots, summed over all elements, with the unweighted mean of the snapshots as centre.

    Both fields are plain sums over elements, so spreads of separate tensors or shards add up (`+`).

    Attributes:
        squared_distance: `(1/N) sum_j ||x_j - mean||^2`.
        squared_norm: `||mean||^2`.
    """

    squared_distance: float
    squared_norm: float

    def __add__(self, other: object) -> "Spread":
        """Add elementwise; a plain tuple's `+` would concatenate."""
        if not isinstance(other, Spread):
            return NotImplemented
        return Spread(self.squared_distance + other.squared_distance, self.squared_norm + other.squared_norm)

    def times(self, count: float) -> "Spread":
        """Both sums, counted so many times."""
        return Spread(self.squared_distance * count, self.squared_norm * count)

    @property
    def relative_rms(self) -> float:
        """Relative RMS distance from the mean, `sqrt(distance / norm)`: 0 where nothing moved, inf at a zero mean."""
        if self.squared_distance == 0.0:
            return 0.0
        return math.sqrt(self.squared_distance / self.squared_norm) if self.squared_norm != 0.0 else math.inf
