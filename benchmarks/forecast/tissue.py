"""A published law alone, of one run itself: its decay term is identified from merges as if they were anneals.

Tissue, Wang and Wang (arXiv 2408.11029), eq. 1: L = L0 + A * S1^-alpha - C * S2, where S1 is the sum of learning rates
and S2 the sum of their decrements with momentum lambda, both in units of the constant rate. A mean over the last d
steps is taken as a linear decay over them, as the identity of WSM (arXiv 2507.17634) suggests. This module knows points
and sums of rates, and nothing of our law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.annealing.records import METRIC
from benchmarks.annealing.setups import Anneal
from pretrain_merge.lr_schedules import shape as lr_shape
from pretrain_merge.records import MergeRecord, span_of

_MOMENTA = (0.9, 0.95, 0.97, 0.99, 0.995, 0.998, 0.999)
_EXPONENTS = (0.1, 0.25, 0.5, 0.75, 1.0)
_FROM = 0.3  # of the steps so far: no power law holds before
_LONGEST = 0.5  # of the steps so far: a longer mean is no anneal
_LEAST_POINTS = 5  # merge points; with fewer all are fitted to


@dataclass(frozen=True)
class Tissue:
    """The law with its five numbers; `now` is the unit of S1."""

    now: float
    momentum: float
    exponent: float
    constants: NDArray[np.float64]

    def expected(self, anneal: Anneal) -> float:
        """Loss at the end of an anneal that leaves the run at its start."""
        area = anneal.start + anneal.steps * _mean_rate(anneal.shape)
        power = (area / self.now) ** -self.exponent
        decay = _decay_sum(anneal.steps, self.momentum, anneal.shape)
        return float(self.constants @ np.array([1.0, power, -decay]))


def identify(known: Sequence[MergeRecord]) -> Tissue:
    """The law of one run: least squares on raw and merged losses, late ones counting more, over a grid of exponents."""
    now = known[-1].step
    late = [record for record in known if record.step >= _FROM * now] if len(known) > _LEAST_POINTS else known
    points = [(record.step, 0, record.raw[METRIC]) for record in late]
    for record in late:
        for view, metrics in record.views.items():
            span = round(span_of(record.recipes[view].steps, record.average))
            if span <= _LONGEST * record.step:
                points.append((record.step, span, metrics[METRIC]))
    steps, spans, losses = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    weights = steps / now
    best = None
    for momentum in _MOMENTA:
        decay = np.array([_decay_sum(int(span), momentum, "linear") for span in spans])
        for exponent in _EXPONENTS:
            power = ((steps - spans / 2) / now) ** -exponent
            design = np.stack([np.ones(len(steps)), power, -decay], axis=1) * weights[:, None]
            constants = np.linalg.lstsq(design, losses * weights, rcond=None)[0]
            error = float(np.sum((design @ constants - losses * weights) ** 2))
            if best is None or error < best[0]:
                best = error, Tissue(now, momentum, exponent, constants)
    assert best is not None
    return best[1]


def _mean_rate(shape: str) -> float:
    curve = lr_shape(shape)
    return float(np.mean([curve((index + 0.5) / 1000) for index in range(1000)]))


@cache
def _decay_sum(steps: int, momentum: float, shape: str) -> float:
    """S2: each decrement of the rate counts sum_{i=k..n} momentum^(i-k)."""
    if steps == 0:
        return 0.0
    curve = lr_shape(shape)
    decrements = -np.diff([curve(step / steps) for step in range(steps + 1)])
    counts = (1 - momentum ** np.arange(steps, 0, -1)) / (1 - momentum)
    return float(decrements @ counts)
