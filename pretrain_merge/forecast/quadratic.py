"""What an anneal leaves and gains by its shape, from one quadratic direction whose noise has a memory.

In a direction of curvature h a step at rate factor a forgets a / tau of the noise and adds 2 a^2 / tau of it, with tau
the memory at full rate, in steps. For an anneal over D steps and x = D / tau, with I(v) the integral of the factor over
the last share v of it, the variance that is left, in units of that at full rate, is

    anneal    exp(-2 x I(1)) + 2 x * integral of a(v)^2 exp(-2 x I(v)) dv
    mean      2/x * (1 - (1 - exp(-x)) / x)                of all iterates over D steps at full rate

x itself is read off the means: Jensen's gap of the halves, as a share of what the mean lost, falls from 1/2 to 0 as x
grows. This module is a set of formulas; it knows no records and no losses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from pretrain_merge.forecast.noise import MEMORY, Floats, left_by_mean
from pretrain_merge.lr_schedules import SHAPES

_PLACES = (np.arange(2000) + 0.5) / 2000
_LENGTHS = np.geomspace(0.02, 2e4, 400)  # in memories; beyond, ratios are 1/2 and 0 but for a ten thousandth
_LEFT_BY_MEAN = np.array([left_by_mean(float(length)) for length in _LENGTHS])
_RATIOS = (np.array([left_by_mean(float(length) / 2) for length in _LENGTHS]) - _LEFT_BY_MEAN) / (1 - _LEFT_BY_MEAN)


@dataclass(frozen=True)
class Decay:
    """A shape of anneal.

    Attributes:
        progress: Integral of its learning-rate factor a: how far it gets, in steps at full rate for each of its own.
        gain: Integral of a (1 - a)^2 over that of a linear anneal: how much way it makes where its noise is gone
            already. Chosen on the suite: it gives cosine 0.75 and 1-sqrt 1.2, and fits there gave 0.72 and 1.2.
    """

    progress: float
    gain: float
    _left: Floats

    def left(self, ratio: float) -> float:
        """The noise that it leaves above what the mean leaves, as a share of what the mean took away.

        Args:
            ratio: Jensen's gap of the mean over that same share; outside of what a memory can give it is the nearest.
        """
        return float(np.interp(ratio, _RATIOS[::-1], self._left[::-1]))


@cache
def decay(shape: str) -> Decay:
    """What follows from a shape, a key of `lr_schedules.SHAPES`; a table is made once for each."""
    curve: Callable[[float], float] = SHAPES[shape]
    factor = np.array([curve(1.0 - place) for place in _PLACES])  # by the share that remains
    reached = (np.cumsum(factor) - factor / 2) / len(factor)
    progress = float(factor.mean())
    forgotten = np.exp(-2.0 * _LENGTHS[:, None] * reached)
    anneal = np.exp(-2.0 * _LENGTHS * progress) + 2.0 * _LENGTHS * (factor**2 * forgotten).mean(axis=1)
    gain = 12.0 * float((factor * (1.0 - factor) ** 2).mean())  # 1/12 for a linear one
    return Decay(progress, gain, (anneal - _LEFT_BY_MEAN) / (1 - _LEFT_BY_MEAN))


def typical_ratio(span: float) -> float:
    """Jensen's gap over what the mean took away, where the noise's memory is the usual one of `noise.MEMORY` steps.

    The suite's medians imply 6 to 13 steps for spans of 40 to 400.
    """
    return float(np.interp(span / MEMORY, _LENGTHS, _RATIOS))
