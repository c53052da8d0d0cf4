"""How far a value lies from those before it, at a cost that hardly grows with how many these are.

This module knows one series of numbers. Its values are kept in order, so that a median is one of them and the median of
distances from it is found by halving, where sorting anew at every step would be what watching a run costs.
"""

import math
from bisect import bisect_left, bisect_right, insort

_MAD_OF_NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
_RESOLUTION = 1e-6  # of the median, and in log norm: float32 sums in another order differ by some of that
_UPPER_QUARTILE_OF_NORMAL = 1.1503  # of distances from its median, in standard deviations


class RunningZ:
    """Median, and robust z `(x - median) / scale`, over the values that are let in and not yet out.

    The scale is 1.4826 MAD, or what the upper quartile of distances from the median says of a normal distribution where
    that is more. Values of which half are the very same have no scale: none is judged by them.

    Args:
        fewest: Finite values that must be known before a value is judged.
        threshold: Robust z from which a value is out of bounds.
        least_scale: Least scale that a distance is told in.
        relative: Whether that is a share of the median.
    """

    def __init__(self, *, fewest: int, threshold: float, least_scale: float, relative: bool) -> None:
        self._fewest, self._threshold = fewest, threshold
        self._least_scale, self._relative = least_scale, relative
        self._ordered: list[float] = []  # without what is not known
        self._num_finite = 0

    @property
    def median(self) -> float:
        """The lower one; NaN where nothing is known."""
        return self._ordered[(len(self._ordered) - 1) // 2] if self._ordered else math.nan

    def move(self, entering: float, leaving: float) -> None:
        """One value comes in and another goes; NaN: it is not known, and counts for nothing."""
        if leaving == leaving:
            del self._ordered[bisect_left(self._ordered, leaving)]
            self._num_finite -= math.isfinite(leaving)
        if entering == entering:
            insort(self._ordered, entering)
            self._num_finite += math.isfinite(entering)

    def is_out(self, value: float) -> bool | None:
        """Whether a value is beyond the threshold; None: it cannot be judged."""
        median = self.median
        # around an infinite median every distance is infinite, and their ratio says nothing
        if self._num_finite < self._fewest or math.isinf(median) or value != value:
            return None
        unit = abs(median) if self._relative else 1.0
        if self._is_still(median, _RESOLUTION * unit):
            return None  # whatever comes is far from it: a constant that turns noisy as well as a collapse
        # a quarter of all are as far at least, so the scale below would say the same (networks that train by turns,
        # batches of one source each); this spares most steps the distances, which are what judging one costs
        if value <= self._ordered[3 * (len(self._ordered) - 1) // 4]:
            return False
        least = self._least_scale * unit
        mad = self._distance(median, (len(self._ordered) - 1) // 2)
        if (value - median) / max(_MAD_OF_NORMAL * mad, least) <= self._threshold:
            return False
        # where noise has just begun the middle of half of all distances is next to nothing
        upper = self._distance(median, 3 * (len(self._ordered) - 1) // 4)
        return (value - median) / max(upper / _UPPER_QUARTILE_OF_NORMAL, least) > self._threshold

    def _is_still(self, median: float, resolution: float) -> bool:
        """Whether half of all values are the same but for rounding: the median distance from the median is nothing."""
        same = bisect_right(self._ordered, median + resolution) - bisect_left(self._ordered, median - resolution)
        return same > (len(self._ordered) - 1) // 2

    def _distance(self, median: float, place: int) -> float:
        """The distance from the median that `place` others do not exceed: of two runs that both ascend."""
        ordered = self._ordered
        middle = (len(ordered) - 1) // 2
        # of the place + 1 smallest distances `below` are of the values up to the median, walking down from it
        low, high = max(0, place + 1 - (len(ordered) - 1 - middle)), min(place, middle) + 1
        while low < high:
            below = (low + high) // 2
            if median - ordered[middle - below] < ordered[middle + place + 1 - below] - median:
                low = below + 1
            else:
                high = below
        above = place + 1 - low  # how many are of the values beyond
        nearest_below = median - ordered[middle + 1 - low] if low else 0.0
        nearest_above = ordered[middle + above] - median if above else 0.0
        return max(nearest_below, nearest_above)
