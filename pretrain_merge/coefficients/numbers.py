"""What is a number here, and what is refused as one: finite, ascending where it is a time, summing to 1 at the end.

This module knows numbers and messages. It knows no kind of coefficients.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral, Real

from pretrain_merge.errors import CoefficientError

SUM_TOLERANCE = 1e-12
_LARGEST = 1e300  # no sum and no difference of two numbers below this overflows


def absorb_rounding(values: Iterable[float]) -> tuple[float, ...]:
    """Gives what rounding left of 1 to the largest coefficient, where it is relatively smallest."""
    coefficients = list(values)
    coefficients[coefficients.index(max(coefficients))] += 1.0 - math.fsum(coefficients)
    return tuple(coefficients)


def summing_to_one(name: str, values: Sequence[float], n: int | None = None) -> tuple[float, ...]:
    """Coefficients as they are, if they sum to 1 within `SUM_TOLERANCE`; else the error has the normalised ones."""
    # fsum: a thousand terms must not drift out of the tolerance by themselves
    checked = finite_numbers(name, values, n)
    total = math.fsum(checked)
    if not abs(total - 1.0) <= SUM_TOLERANCE:
        way_out = f"Normalised: {[value / total for value in checked]}." if total > 0.0 else "They need a positive sum."
        raise CoefficientError(f"{name} {list(checked)} sum to {total!r}; the sum must be 1. {way_out}")
    return checked


def ascending(times: object, n: int) -> tuple[float, ...]:
    """Times, one per snapshot, each later than the one before; None: 0, 1, 2, ..."""
    taken = finite_numbers("times", range(n) if times is None else times, n)
    for before, after in pairwise(taken):
        if not before < after:
            raise CoefficientError(
                f"times have {after!r} after {before!r}; each must be later than the one before it. "
                f"Pass them oldest to newest, one per snapshot."
            )
    return taken


def finite_numbers(name: str, values: object, n: int | None) -> tuple[float, ...]:
    """A list of finite numbers; None: of any length but 0."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise CoefficientError(f"{name} is {values!r}; allowed is a list of numbers. Pass one number per snapshot.")
    numbers = tuple(finite_number(f"{name}[{index}]", value) for index, value in enumerate(values))
    if len(numbers) != (n or max(1, len(numbers))):
        raise CoefficientError(
            f"{name} has length {len(numbers)} and must have {n or 'at least 1'}: one number per snapshot, oldest to "
            f"newest. Pass as many as there are snapshots in the merge."
        )
    return numbers


def finite_number(name: str, value: object) -> float:
    """A number whose sums and differences do not overflow."""
    # `yes` in YAML is a bool, which Python counts as 1; NaN fails the comparison
    if isinstance(value, bool) or not isinstance(value, Real) or not value <= _LARGEST or value < -_LARGEST:
        raise CoefficientError(f"{name} is {value!r}; allowed are finite numbers. Replace it by one.")
    return float(value)


def count(n: object) -> int:
    """How many snapshots, at least 1."""
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise CoefficientError(f"n is {n!r}; allowed are integers from 1. Pass the number of snapshots in the merge.")
    return int(n)
