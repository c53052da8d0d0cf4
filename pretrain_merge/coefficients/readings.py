"""What coefficients amount to: the decay that they emulate, how much noise they leave, how far they lag behind.

This module knows coefficients as numbers, whatever kind they are of.
"""

import math
from collections.abc import Sequence

from pretrain_merge.coefficients.numbers import ascending, summing_to_one


def decay_curve(coefficients: Sequence[float]) -> tuple[float, ...]:
    """The learning-rate decay that a merge emulates: the factor that is left on each interval's update.

    Args:
        coefficients: Oldest to newest, summing to 1.

    Returns:
        ``w_i = c_i + c_(i+1) + ...`` for i from 1 to n - 1, oldest interval first. Where none is negative,
        ``decay(n, shape=[1, *w, 0])`` is the way back.

    Raises:
        CoefficientError: `coefficients` are not finite numbers that sum to 1.

    Source: WSM (arXiv 2507.17634), theorem 3.1.

    >>> decay_curve((0.25, 0.25, 0.5))
    (0.75, 0.5)
    """
    checked = summing_to_one("coefficients", coefficients)
    # n sums of n terms instead of one running sum, whose rounding would add up
    return tuple(math.fsum(checked[i:]) for i in range(1, len(checked)))


def n_eff(coefficients: Sequence[float]) -> float:
    """How many snapshots of equal weight would average independent noise down as far.

    Args:
        coefficients: Oldest to newest, summing to 1.

    Returns:
        ``1 / sum_j c_j^2``: n for `sma`, 1 for a single snapshot, below 1 where negative coefficients amplify noise.

    Raises:
        CoefficientError: `coefficients` are not finite numbers that sum to 1.

    >>> n_eff((0.5, 0.5, 0.0))
    2.0
    """
    return 1.0 / math.fsum(c * c for c in summing_to_one("coefficients", coefficients))


def mean_age(coefficients: Sequence[float], times: Sequence[float] | None = None) -> float:
    """How far a merge lags behind the newest snapshot, on average.

    Args:
        coefficients: Oldest to newest, summing to 1.
        times: When each snapshot was taken, ascending; default: 0, 1, 2, ...

    Returns:
        ``sum_j c_j (T_end - T_j)`` in the unit of `times`, by default in snapshots.

    Raises:
        CoefficientError: `coefficients` are not finite numbers that sum to 1, or `times` do not fit them.

    >>> mean_age((0.2, 0.2, 0.2, 0.2, 0.2))
    2.0
    """
    checked = summing_to_one("coefficients", coefficients)
    taken = ascending(times, len(checked))
    return math.fsum(c * (taken[-1] - time) for c, time in zip(checked, taken, strict=True))
