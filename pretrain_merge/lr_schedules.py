"""Learning-rate decays, as fractions of the peak rate.

A shape is a function ``f`` of the fraction ``t`` of the decay that has passed: ``f(0) = 1``, it never increases, and it
stays within [0, 1]. This module knows what a decay looks like and refuses what is not one. It knows no optimizer, no
steps and no merge.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import TypeAlias

from pretrain_merge.errors import CoefficientError, nearest

Shape: TypeAlias = Callable[[float], float]
ShapeSpec: TypeAlias = str | Shape | Sequence[float]

# read-only: a shape that one user changed would change the coefficients of all others
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "linear": lambda t: 1.0 - t,
        "cosine": lambda t: (1.0 + math.cos(math.pi * t)) / 2.0,
        "1-sqrt": lambda t: 1.0 - math.sqrt(t),
        "1-square": lambda t: 1.0 - t * t,
    }
)

# An increase, or a start beside 1, as small as this is the rounding of somebody's formula, and is rounded away.
ROUNDING = 1e-12


def shape(spec: ShapeSpec) -> Shape:
    """Turns a name, a callable or a list of learning-rate factors into a shape.

    Args:
        spec: A name in `SHAPES`; or a callable from t in [0, 1] to a fraction of the peak rate; or at least two such
            fractions, equally spaced over the decay and joined by straight lines, of which the first is 1.

    Returns:
        The shape. One made from a callable checks each value that it returns.

    Raises:
        CoefficientError: The name is unknown, the decay does not start at 1, or a list is not a decay.

    >>> shape("linear")(0.25)
    0.75
    >>> shape([1.0, 1.0, 0.1])(0.75)
    0.55
    """
    if isinstance(spec, str):
        return _named(spec)
    if callable(spec):
        return _checked(spec)
    return _piecewise_linear(spec)


def factors(spec: ShapeSpec, positions: Sequence[float]) -> tuple[float, ...]:
    """Reads a shape at some positions and checks that what comes out is a decay.

    Args:
        spec: What `shape` accepts.
        positions: Fractions of the decay in [0, 1], ascending.

    Returns:
        One fraction of the peak rate per position, never increasing.

    Raises:
        CoefficientError: `shape` refuses `spec`, or its values increase.

    >>> factors("1-square", [0.0, 0.5, 1.0])
    (1.0, 0.75, 0.0)
    """
    curve = shape(spec)
    rates: list[float] = []
    previous = 1.0
    for position in positions:
        rate = curve(position)
        # so written that NaN is refused
        if not rate <= previous + ROUNDING:
            raise CoefficientError(
                f"shape {spec!r} rises from {previous!r} to {rate!r} at t={position:.6g}; a decay never increases. "
                f"Pass a shape that falls from 1 towards 0, such as {_choices()}."
            )
        previous = min(previous, rate)  # an increase by rounding would make a coefficient negative
        rates.append(previous)
    return tuple(rates)


def _named(name: str) -> Shape:
    if name not in SHAPES:
        meant = nearest(name, SHAPES)
        way_out = f"Did you mean {meant!r}?" if meant else "A callable or a list of factors is a shape, too."
        raise CoefficientError(f"shape {name!r} is unknown; the named shapes are {_choices()}. {way_out}")
    return SHAPES[name]


def _checked(function: Shape) -> Shape:
    def checked(t: float) -> float:
        rate = function(t)
        if not _is_number(rate) or not -ROUNDING <= rate <= 1.0 + ROUNDING:
            raise CoefficientError(
                f"shape {function!r} returned {rate!r} at t={t:.6g}; a shape returns a fraction of the peak rate, "
                f"from 0 to 1. Divide learning rates by their peak."
            )
        return min(max(float(rate), 0.0), 1.0)

    # asked before any run: most who pass learning rates in place of fractions are caught here
    start = checked(0.0)
    if not start >= 1.0 - ROUNDING:
        raise CoefficientError(
            f"shape {function!r} is {start!r} at t=0; a decay starts at the peak rate, f(0) = 1. "
            f"Divide learning rates by their peak."
        )
    return checked


def _piecewise_linear(spec: Iterable[float]) -> Shape:
    knots = tuple(spec) if isinstance(spec, Iterable) else ()
    if len(knots) < 2 or not all(map(_is_number, knots)):
        raise CoefficientError(
            f"shape is {spec!r}; allowed are {_choices()}, a callable, or a list of at least two learning-rate "
            f"factors. Pass one of these."
        )
    if not 1.0 - ROUNDING <= knots[0] <= 1.0 + ROUNDING:
        raise CoefficientError(
            f"the factors {list(knots)!r} start at {knots[0]!r}; learning-rate factors are fractions of the peak "
            f"rate and start at 1. Divide the list by its first entry."
        )
    rates = [1.0]
    for index, knot in enumerate(knots[1:], start=1):
        if not -ROUNDING <= knot <= rates[-1] + ROUNDING:
            raise CoefficientError(
                f"factor {index} of {list(knots)!r} is {knot!r} after {rates[-1]!r}; learning-rate factors never "
                f"increase and stay within [0, 1]. Correct this entry."
            )
        rates.append(min(max(float(knot), 0.0), rates[-1]))

    def interpolate(t: float) -> float:
        place = t * (len(rates) - 1)
        left = min(int(place), len(rates) - 2)  # t = 1 is the last knot, at which no piece begins
        return rates[left] + (place - left) * (rates[left + 1] - rates[left])

    return interpolate


def _is_number(value: object) -> bool:
    # True is a Real, and would be a rate of 1
    return isinstance(value, Real) and not isinstance(value, bool)


def _choices() -> str:
    return ", ".join(map(repr, SHAPES))
