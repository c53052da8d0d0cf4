"""Kinds that say how much a snapshot counts by its place or its age, and the one that is spelt out.

This module knows formulas and what their parameters may be; the gate in `registry` checks the rest.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from pretrain_merge.coefficients.numbers import absorb_rounding, count, finite_number, summing_to_one
from pretrain_merge.coefficients.registry import Coefficients, kind
from pretrain_merge.errors import CoefficientError

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,12})?)\s*%", re.ASCII)
_STEEPEST = 1e6  # a power law so steep is its newest snapshot alone
# standard deviation of a uniform density over [0, 1]
_WIDEST = 12.0**-0.5


@kind
def sma(n: int) -> Coefficients:
    """Simple moving average: every snapshot counts the same.

    Args:
        n: Snapshots in the merge, at least 1.

    Raises:
        CoefficientError: `n` is not a positive integer.

    Source: PMA (arXiv 2505.12082). Emulates a linear decay to zero (WSM, arXiv 2507.17634, theorem 3.1).

    >>> sma(4)
    (0.25, 0.25, 0.25, 0.25)
    """
    return (1 / n,) * n


@kind
def wma(n: int) -> Coefficients:
    """Weighted moving average: snapshot i of n counts i times as much as the oldest.

    Args:
        n: Snapshots in the merge, at least 1.

    Raises:
        CoefficientError: `n` is not a positive integer.

    Source: PMA (arXiv 2505.12082).

    >>> wma(4)
    (0.1, 0.2, 0.3, 0.4)
    """
    # an integer, so that each quotient is rounded once
    total = n * (n + 1) // 2
    return tuple(i / total for i in range(1, n + 1))


@kind
def ema(
    n: int, *, alpha: float | None = None, half_life: float | str | None = None, times: Sequence[float] = ()
) -> Coefficients:
    """Exponential moving average: the recursion ``M <- alpha * M_i + (1 - alpha) * M``, started at the oldest snapshot.

    The oldest keeps what no newer one took, ``(1 - alpha)^(n-1)``. The closed form that is printed beside the recursion
    in the paper leaves this term out, and so does not sum to 1.

    Args:
        n: Snapshots in the merge, at least 1.
        alpha: What each newer snapshot takes, in (0, 1], however far apart they are. Give this or `half_life`.
        half_life: The time after which a snapshot's influence has halved, above 0, in the unit of `times`; or a share
            of the time of the newest, such as "5%", so that the horizon grows with the run.
        times: When each snapshot was taken, ascending, counted from where the run or its last break began; default: 0,
            1, 2, ..., so that `half_life` counts snapshots.

    Raises:
        CoefficientError: An argument is out of range, or not exactly one of `alpha` and `half_life` is given.

    Source: PMA (arXiv 2505.12082).

    >>> ema(3, alpha=0.5)
    (0.25, 0.25, 0.5)
    >>> [round(c, 9) for c in ema(3, half_life=1000, times=[5000, 6000, 8000])]
    [0.125, 0.125, 0.75]
    >>> ema(3, half_life="12.5%", times=[5000, 6000, 8000]) == ema(3, half_life=1000, times=[5000, 6000, 8000])
    True
    """
    coefficients, left = [], 1.0  # from the newest, which takes its share of all; the oldest keeps what is left
    for share in reversed(_ema_shares(times, alpha, half_life)):
        coefficients.append(left * share)
        left *= 1.0 - share
    return absorb_rounding([left, *reversed(coefficients)])


@kind
def power(
    n: int, *, relative_width: float | None = None, gamma: float | None = None, times: Sequence[float] = ()
) -> Coefficients:
    """A power-law profile: time tau counts as tau^gamma, so that the horizon grows in proportion to the run.

    The profile in [0, T] is fitted by snapshots in the least-squares sense: each stands for the time since the one
    before, so the fit is the profile's integral over that time. What lies before the window cannot be had any more; the
    rest is scaled to sum to 1.

    Args:
        n: Snapshots in the merge, at least 1.
        relative_width: Standard deviation of the profile over T, above 0 and up to .288. Give this or `gamma`.
        gamma: The exponent, at least 0; 0 is a plain mean over time.
        times: When each snapshot was taken, ascending, counted from where the run or its last break began.

    Raises:
        CoefficientError: An argument is out of range, or not exactly one of `relative_width` and `gamma` is given.

    Source: post-hoc EMA (Karras et al., arXiv 2312.02696), section 3 and appendix C.

    >>> [round(c, 3) for c in power(4, gamma=1, times=[1, 2, 3, 4])]
    [0.062, 0.188, 0.312, 0.438]
    """
    exponent = _exponent(relative_width, gamma) + 1.0
    # a mean interval would be one over none
    if n == 1:
        return (1.0,)
    # the oldest stands for a mean interval, or for what there was
    begin = max(0.0, times[0] - (times[-1] - times[0]) / (n - 1))
    masses = [after**exponent - before**exponent for before, after in pairwise(_relative([begin, *times]))]
    return absorb_rounding([mass / math.fsum(masses) for mass in masses])


@kind
def extrapolated(n: int, *, step: float) -> Coefficients:
    """Beyond the mean of the newer half of the snapshots, away from the mean of the older half. Experimental.

    ``M_new + step (M_new - M_old)``: means taken one after another lie nearly on a line while the rate is constant, and
    the older half weighs less than nothing.

    Args:
        n: Snapshots in the merge, at least 1; the one in the middle of an odd number belongs to the newer half.
        step: In distances between the two means, at least 0; 0 is the mean of the newer half.

    Raises:
        CoefficientError: `step` is not a finite number from 0.

    Source: Extra-Merge (arXiv 2605.26484).

    >>> [round(c, 9) for c in extrapolated(4, step=0.2)]
    [-0.1, -0.1, 0.6, 0.6]
    """
    if not finite_number("step", step) >= 0.0:
        raise CoefficientError(f"step is {step!r}; it must be at least 0. Set 0.1 to 0.3; from 0.5 on it does harm.")
    num_older = n // 2
    if not num_older:  # a single snapshot lies on no line
        return (1.0,)
    newer, older = (1.0 + step) / (n - num_older), -step / num_older
    return absorb_rounding([*[older] * num_older, *[newer] * (n - num_older)])


@kind
def custom(n: int, *, weights: Sequence[float]) -> Coefficients:
    """Takes the coefficients as they are given. Negative ones extrapolate.

    Args:
        n: Snapshots in the merge, at least 1.
        weights: Exactly `n` finite numbers, oldest to newest, that sum to 1 within `SUM_TOLERANCE`.

    Raises:
        CoefficientError: There are not `n` numbers, one is not finite, or the sum is not 1; the message then holds the
            normalised list.

    >>> custom(3, weights=[-0.5, 0.5, 1.0])
    (-0.5, 0.5, 1.0)
    """
    return summing_to_one("weights", weights, count(n))


def _exponent(relative_width: float | None, gamma: float | None) -> float:
    if (relative_width is None) == (gamma is None):
        raise CoefficientError(
            f"power was given relative_width={relative_width!r} and gamma={gamma!r}; it takes exactly one of the two. "
            f"Set relative_width=0.05, which is about that of an EMA over a twentieth of the run."
        )
    if gamma is not None:
        if not 0.0 <= finite_number("gamma", gamma) <= _STEEPEST:
            raise CoefficientError(f"gamma is {gamma!r}; allowed is 0 to {_STEEPEST:g}. Larger ones are narrower.")
        return float(gamma)
    if not 1.0 / _STEEPEST <= finite_number("relative_width", relative_width) <= _WIDEST:
        raise CoefficientError(
            f"relative_width is {relative_width!r}; allowed is {1.0 / _STEEPEST:g} to {_WIDEST:.4f}, that of a plain "
            f"mean over all time. Set 0.05 to 0.15."
        )
    low, high = 0.0, 2.0 * _STEEPEST
    for _ in range(100):  # halved down to the last bit; the width falls with the exponent
        middle = (low + high) / 2.0
        width = math.sqrt(middle + 1.0) / ((middle + 2.0) * math.sqrt(middle + 3.0))
        low, high = (middle, high) if width > float(relative_width or 0.0) else (low, middle)
    return low


def _relative(times: Sequence[float]) -> list[float]:
    if not times[0] >= 0.0 or not times[-1] > 0.0:
        raise CoefficientError(
            f"times are {list(times)}; a power law counts them from where the run began, 0. Give none below 0."
        )
    return [time / times[-1] for time in times]


def _share_of_newest(half_life: str, newest: float) -> float:
    match = _PERCENT.fullmatch(half_life.strip())
    if match is None or not 0.0 < float(match[1]) <= 100.0:
        raise CoefficientError(
            f"half_life is {half_life!r}; allowed are finite numbers, and shares of the run so far, above 0% and up to "
            f"100%. Write it as '5%'."
        )
    return float(match[1]) / 100.0 * newest or 1.0  # one snapshot where the run began: there is nothing to weigh


def _ema_shares(taken: Sequence[float], alpha: float | None, half_life: float | str | None) -> list[float]:
    """What each snapshot but the oldest takes when it is mixed in."""
    if (alpha is None) == (half_life is None):
        raise CoefficientError(
            f"ema was given alpha={alpha!r} and half_life={half_life!r}; it takes exactly one of the two. "
            f"Set alpha=0.2, or a half_life in the unit of the times."
        )
    if alpha is not None:
        if not 0.0 < finite_number("alpha", alpha) <= 1.0:
            raise CoefficientError(f"alpha is {alpha!r}; it must lie in (0, 1]. PMA uses 0.1 and 0.2.")
        # PMA's recursion does not know how far apart snapshots are
        return [float(alpha)] * (len(taken) - 1)
    is_share = isinstance(half_life, str)
    half = _share_of_newest(str(half_life), taken[-1]) if is_share else finite_number("half_life", half_life)
    if not half > 0.0:
        raise CoefficientError(f"half_life is {half!r}; it must be above 0. Give it in the unit of the times.")
    # 1 - 0.5^x, without the cancellation that this form suffers where x is small
    return [-math.expm1(-math.log(2.0) * ((after - before) / half)) for before, after in pairwise(taken)]
