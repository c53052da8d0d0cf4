"""Weighted sums in float64 with the error that a right implementation may have. Imports no code under test."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Format(NamedTuple):
    """A binary format: bits of the significand (with the hidden one), smallest normal exponent, maximum."""

    precision: int
    smallest_exponent: int
    maximum: float


FORMATS = {
    torch.float32: Format(24, -126, (2 - 2.0**-23) * 2.0**127),
    torch.bfloat16: Format(8, -126, (2 - 2.0**-7) * 2.0**127),
    torch.float16: Format(11, -14, 65504.0),
    torch.float64: Format(53, -1022, float(np.finfo(np.float64).max)),
}


def as_float64(tensor: Tensor) -> Array:
    """The values of a tensor of any of the four dtypes; the conversion is exact."""
    return tensor.detach().cpu().to(torch.float64).numpy().copy()


def weighted_sum(snapshots: Sequence[Tensor], coefficients: Sequence[float]) -> Array:
    """`sum_j c_j x_j`, one term after another in float64."""
    total = np.zeros(tuple(snapshots[0].shape))
    for snapshot, coefficient in zip(snapshots, coefficients, strict=True):
        total = total + coefficient * as_float64(snapshot)
    return total


def half_ulp(values: Array, dtype: torch.dtype) -> Array:
    """Half the distance between neighbours of `dtype` around each value: the error of one rounding to nearest."""
    form = FORMATS[dtype]
    exponent = np.frexp(np.abs(values))[1] - 1.0
    return np.exp2(np.maximum(exponent, form.smallest_exponent) - form.precision)


def tolerance(snapshots: Sequence[Tensor], coefficients: Sequence[float], out: torch.dtype) -> Array:
    """What one right rounding and an accumulation in float32 (float64 where a float64 takes part) may cost.

    With u = half an ulp of 1, a sum of N products has an error of at most (N + 1) u sum_j |c_j x_j|: one rounding of
    the coefficient, one of the product and at most N - 1 of sums for each term (Higham, Accuracy and Stability, section
    3.1, to first order; twice that is allowed here for the higher orders). Below the normal numbers each operation may
    be off by half of the smallest one instead. Then comes half an ulp of the output at a value that is already off by
    that much.
    """
    double = torch.float64 in {out, *(snapshot.dtype for snapshot in snapshots)}
    sums = FORMATS[torch.float64 if double else torch.float32]
    magnitudes = weighted_sum([snapshot.abs() for snapshot in snapshots], [abs(c) for c in coefficients])
    num_terms = len(snapshots)
    accumulation = 2 * (num_terms + 1) * 2.0**-sums.precision * magnitudes
    accumulation += 2 * num_terms * 2.0 ** max(sums.smallest_exponent - sums.precision, -1074)
    rounding = half_ulp(np.abs(weighted_sum(snapshots, coefficients)) + accumulation, out)
    if double and out in (torch.bfloat16, torch.float16):  # through float32 on the way
        rounding = rounding * (1 + 2.0 ** (FORMATS[out].precision - 24))
    return accumulation + rounding


def assert_is_weighted_sum(result: Tensor, snapshots: Sequence[Tensor], coefficients: Sequence[float]) -> None:
    """Fail unless every element is right to one rounding of its dtype and the accumulation's bound."""
    exact = weighted_sum(snapshots, coefficients)
    allowed = tolerance(snapshots, coefficients, result.dtype)
    error = np.abs(as_float64(result) - exact)
    wrong = np.flatnonzero(~(error <= allowed))  # a NaN is wrong
    if wrong.size:
        worst = wrong[np.argmax((error / allowed).ravel()[wrong])]
        found, right, bound = (values.ravel()[worst] for values in (as_float64(result), exact, allowed))
        raise AssertionError(
            f"{wrong.size} of {exact.size} elements of {result.dtype} are wrong: at {worst} {found!r} instead of "
            f"{right!r}, allowed error {bound:.3e}"
        )


def nearest_even(values: Array, dtype: torch.dtype) -> Array:
    """Each value rounded to `dtype`, to nearest and ties to even, by exact arithmetic on its float64 significand."""
    form = FORMATS[dtype]
    step = 2.0 * half_ulp(values, dtype)
    rounded = np.rint(values / step) * step  # the quotient is exact, and rint rounds ties to even
    return np.where(np.abs(rounded) > form.maximum, np.copysign(np.inf, values), rounded)


def spread(snapshots: Sequence[Sequence[Tensor]]) -> tuple[float, float]:
    """Mean squared distance of the snapshots from their mean, and the squared norm of that mean, in two passes."""
    stacked = [np.concatenate([as_float64(tensor).ravel() for tensor in snapshot]) for snapshot in snapshots]
    mean = np.mean(stacked, axis=0)
    distance = float(np.mean([np.sum((snapshot - mean) ** 2) for snapshot in stacked]))
    return distance, float(np.sum(mean**2))


def random_coefficients(num_snapshots: int, seed: int = 0) -> list[float]:
    """Of either sign, and of no particular sum."""
    return list(np.random.default_rng(seed).uniform(-0.5, 1.0, num_snapshots))
