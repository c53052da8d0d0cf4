"""The plainest float64 implementation of each formula, in NumPy, written from the papers.

Nothing here imports the code under test. Speed and input checks do not matter; being obviously right does.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: float(1 - np.float64(t)),
    "cosine": lambda t: float(0.5 * (1 + np.cos(np.pi * np.float64(t)))),
    "1-sqrt": lambda t: float(1 - np.sqrt(np.float64(t))),
    "1-square": lambda t: float(1 - np.float64(t) ** 2),
}


def sma(n: int) -> Array:
    """PMA (arXiv 2505.12082): w_i = 1 / N."""
    return np.ones(n) / n


def wma(n: int) -> Array:
    """PMA: w_i = i / sum(i)."""
    i = np.arange(1, n + 1, dtype=np.float64)
    return i / i.sum()


def ema(shares: Sequence[float]) -> Array:
    """PMA's recursion M <- a M_i + (1 - a) M, run on unit vectors as snapshots, so that M is the coefficients.

    `shares` are the a of every snapshot but the oldest.
    """
    snapshots = np.eye(len(shares) + 1)
    merged = snapshots[0]
    for a, snapshot in zip(shares, snapshots[1:], strict=True):
        merged = a * snapshot + (1 - a) * merged
    return merged


def decay_rates(shape: Callable[[float], float], times: Sequence[float]) -> Array:
    """w_1 .. w_(N-1), the rate at each snapshot but the oldest: f((T_j - T_0) / (T_end - T_0 + spacing))."""
    t = np.asarray(times, dtype=np.float64)
    if len(t) == 1:
        return np.array([])
    spacing = np.diff(t).mean()
    return np.array([shape(float(x)) for x in (t[1:] - t[0]) / (t[-1] - t[0] + spacing)])


def decay(shape: Callable[[float], float], times: Sequence[float]) -> Array:
    """WSM (arXiv 2507.17634), theorem 3.1: c_k = w_k, c_j = w_j - w_(j+1), c_0 = 1 - w_1."""
    w = decay_rates(shape, times)
    k = len(w)
    if k == 0:
        return np.array([1.0])
    c = np.empty(k + 1)
    c[0] = 1 - w[0]
    for j in range(1, k):
        c[j] = w[j - 1] - w[j]
    c[k] = w[k - 1]
    return c


def qam(rates: Sequence[float]) -> Array:
    """QAM: the distribution of a sum of Bernoulli variables, by adding up all their 2^k outcomes."""
    q = np.zeros(len(rates) + 1)
    for outcome in itertools.product([0, 1], repeat=len(rates)):
        q[sum(outcome)] += np.prod([w if b else 1 - w for b, w in zip(outcome, rates, strict=True)])
    return q


def replayed(start: Array, updates: Array, rates: Sequence[float]) -> Array:
    """Where recorded updates lead from `start` when each is scaled by its rate."""
    theta = start.copy()
    for rate, update in zip(rates, updates, strict=True):
        theta = theta + rate * update
    return theta


def gradient_descent(start: Array, hessian: Array, minimum: Array, learning_rates: Sequence[float]) -> Array:
    """Every iterate, the start included, of gradient descent on (theta - minimum)' H (theta - minimum) / 2."""
    iterates = [start]
    for learning_rate in learning_rates:
        gradient = hessian @ (iterates[-1] - minimum)
        iterates.append(iterates[-1] - learning_rate * gradient)
    return np.array(iterates)


# Bits of the significand, the leading one included, and the exponent of the smallest normal number.
FORMATS = {"float64": (53, -1022), "float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}


def merged(snapshots: Sequence[Array], coefficients: Sequence[float]) -> Array:
    """sum_j c_j theta_j."""
    total = np.zeros_like(snapshots[0], dtype=np.float64)
    for coefficient, snapshot in zip(coefficients, snapshots, strict=True):
        total = total + coefficient * snapshot
    return total


def half_unit(x: Array, dtype: str) -> Array:
    """Half a unit in the last place of `dtype` at `x`: the largest error of one rounding to nearest."""
    bits, smallest = FORMATS[dtype]
    _, exponent = np.frexp(x)  # x = m * 2^exponent with 0.5 <= |m| < 1
    return np.exp2(np.maximum(exponent - 1, smallest) - (bits - 1)) / 2


def merge_tolerance(snapshots: Sequence[Array], coefficients: Sequence[float], dtype: str) -> Array:
    """The largest error of a sum in float32 (float64 for float64 output) that is rounded once to `dtype`.

    Each of the N products and N sums adds at most one half unit of the accumulator at the sum of magnitudes.
    """
    accumulator = "float64" if dtype == "float64" else "float32"
    magnitudes = merged([np.abs(snapshot) for snapshot in snapshots], np.abs(coefficients))
    sums = 2 * len(snapshots) * half_unit(magnitudes, accumulator)
    rounding = half_unit(np.abs(merged(snapshots, coefficients)) + sums, dtype)
    return sums + rounding


def relative_spread(snapshots: Sequence[Array]) -> float:
    """Root of the mean squared distance of the snapshots from their mean, divided by the norm of the mean."""
    mean = np.mean(snapshots, axis=0)
    return float(np.sqrt(np.mean([np.sum((snapshot - mean) ** 2) for snapshot in snapshots]) / np.sum(mean**2)))
