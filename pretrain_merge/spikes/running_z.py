"""How far a value lies from those before it, at a cost that hardly grows with how many these are.

This module knows one series of numbers. Its values are kept in order, so that a median is one of them and the median of
distances from it is found by halving, where sorting anew at every step would be what watching a run costs.
"""

import math
from bisect import bisect_left, insort

_MAD_OF_NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation


class RunningZ:
    """Median, and robust z `(x - median) / (1.4826 MAD)`, over the values that are let in and not yet out.

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
        """Whether a value is beyond the threshold, and above three quarters of all; None: it cannot be judged."""
        median = self.median
        # around an infinite median every distance is infinite, and their ratio says nothing
        if self._num_finite < self._fewest or math.isinf(median) or value != value:
            return None
        # a level that a quarter of the steps had is not new: networks that train by turns, batches of one source each;
        # it also spares most steps the distances, which are what judging one costs
        if value <= self._ordered[3 * (len(self._ordered) - 1) // 4]:
            return False
        least = self._least_scale * abs(median) if self._relative else self._least_scale
        return (value - median) / max(_MAD_OF_NORMAL * self._mad(median), least, 1e-30) > self._threshold

    def _mad(self, median: float) -> float:
        """The lower median of distances from the median: the `place`-th smallest of two runs that both ascend."""
        ordered = self._ordered
        place = (len(ordered) - 1) // 2  # of the median, and of what is asked for
        # of the place + 1 smallest distances `below` are of the values up to the median, walking down from it
        low, high = max(0, 2 * (place + 1) - len(ordered)), place + 1
        while low < high:
            below = (low + high) // 2
            if median - ordered[place - below] < ordered[2 * place + 1 - below] - median:
                low = below + 1
            else:
                high = below
        above = place + 1 - low  # how many are of the values beyond
        nearest_below = median - ordered[place + 1 - low] if low else 0.0
        nearest_above = ordered[place + above] - median if above else 0.0
        return max(nearest_below, nearest_above)
