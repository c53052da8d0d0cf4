"""How far snapshots lie from their mean: two sums that add up over chunks, tensors and ranks."""

import math
from collections.abc import Callable
from typing import NamedTuple

# Below this a product in float32 is subnormal and loses bits, or is nothing at all.
_SMALLEST_NORMAL = 2.0**-126
# Share of the mean square below which its difference from the squared mean is taken for rounding, per snapshot. At
# worst (every rounding of float32 in one direction) a distance at the limit is off by a part in 32.
_DOUBTFUL = 2.0**-18


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
        if self.squared_distance <= 0.0:  # a residue of rounding may lie below; NaN goes on
            return 0.0
        return math.sqrt(self.squared_distance / self.squared_norm) if self.squared_norm != 0.0 else math.inf


class Sums(NamedTuple):
    """What a compiled kernel adds up in one pass, with deviations `d_j = x_j - x_0` from the oldest of N snapshots.

    Deviations, since weights are far from zero and close to each other: sums of squares of the weights themselves would
    cancel.

    Attributes:
        squares: `sum_j ||d_j||^2`.
        squared_deviation: `||sum_j d_j||^2`; not of their mean, since a division for every element costs.
        squared_norm: `||x_0 + (1/N) sum_j d_j||^2`.
    """

    squares: float
    squared_deviation: float
    squared_norm: float

    def spread(self, num_snapshots: int) -> Spread:
        """`(1/N) sum_j ||x_j - mean||^2 = (1/N) sum_j ||d_j||^2 - ||mean d||^2`, never below zero.

        As `d_0 = 0`, the difference keeps at least 1/N of its first term, so at most log2(N) bits cancel.
        """
        distance = self._distance(num_snapshots)
        return Spread(0.0 if distance < 0.0 else distance, self.squared_norm)  # NaN stays

    def spread_or(
        self, measure: Callable[[], Spread], *, num_snapshots: int, num_elements: int, double: bool
    ) -> Spread:
        """The spread that these sums say, or what a slower measure says where float32 could not carry them.

        Args:
            measure: Measures the same snapshots in float64.
            num_snapshots: N.
            num_elements: In each snapshot.
            double: Whether the kernel added up in float64.
        """
        if double or self.are_trustworthy(num_snapshots=num_snapshots, num_elements=num_elements):
            return self.spread(num_snapshots)
        return measure()

    def are_trustworthy(self, *, num_snapshots: int, num_elements: int) -> bool:
        """Whether float32 products could carry them: no product that counts was subnormal, infinite or all rounding.

        Weights that decayed to about nothing have deviations whose squares float32 cannot hold (below 1e-19, and none
        at all below 1e-23). Sums at this size have to be made again in float64.
        """
        smallest = num_elements * _SMALLEST_NORMAL
        at_least = (num_snapshots + 8) * _DOUBTFUL * self.squares / num_snapshots
        return (
            num_snapshots * smallest <= self.squares < math.inf
            and smallest <= self.squared_norm < math.inf
            and at_least <= self._distance(num_snapshots)
        )

    def _distance(self, num_snapshots: int) -> float:
        return self.squares / num_snapshots - self.squared_deviation / num_snapshots**2
