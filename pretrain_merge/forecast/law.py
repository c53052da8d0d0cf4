"""The law: what an anneal ends at, as the merged loss and seven terms that are read off the records.

    annealed = M - kappa * slope * log(x_anneal / x_merge)
                 + G * (c0 + cJ * r + cJJ * r^2 + c1 * D / end + c_cos [cosine] + c_sqrt [1-sqrt]),      r = J / G

    M       loss of the mean over the last D steps
    G       trend of the raw loss at the middle of that mean, minus M: how far the raw model lies above the river
    J       Jensen's gap of the halves of the mean: how much noise is left in it
    slope   how fast M falls per unit of log step, and log(x_anneal / x_merge): how much further along the anneal gets,
            x_anneal being its start plus the integral of its learning-rate factor, x_merge the middle of the mean

The identity of WSM (arXiv 2507.17634) says that M is a linear decay replayed on recorded updates. A real decay differs:
its gradients are taken where the noise is smaller, so that it gains about G * D / end more (c1 near -1), and it leaves
more of the noise than the mean does where D is short against the noise's memory (the terms in r). Everything is
relative to M, so the law does not change with the unit of the loss or of the step. This module reads terms; what they
count is the calibration's business.
"""

from dataclasses import dataclass

import numpy as np

from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast.curves import Curves
from pretrain_merge.forecast.noise import Floats

KINDS = ("nowcast", "forecast")
PROGRESS = {"linear": 1 / 2, "cosine": 1 / 2, "1-sqrt": 1 / 3}  # integral of the learning-rate factor
TERMS = ("c0", "c1", "c_cos", "c_sqrt", "cJ", "cJJ", "kappa")
DOUBTS = ("base", "noise times share", "extrapolation", "sampling", "raw", "halves")
_RATIO = (-0.3, 0.5)  # of J to G: beyond, one of them is noise
_LEAST_GAP = 1e-5  # of the loss


@dataclass(frozen=True)
class Reading:
    """What the records say of one anneal.

    Attributes:
        base: M, the merged loss that the forecast starts from.
        terms: One number for each of `TERMS`, relative to the base.
        doubts: One for each of `DOUBTS`: what the error is expected to grow with, relative to the base.
        gap: G, relative to the base.
        share: D as a share of the steps so far.
        steps: D.
    """

    base: float
    terms: Floats
    doubts: Floats
    gap: float
    share: float
    steps: float


def read(curves: Curves, steps: float, shape: str, kind: str) -> Reading:
    """Read the terms of the law.

    Args:
        curves: The run up to now.
        steps: D, the length of the anneal.
        shape: How the learning rate falls: a key of `PROGRESS`.
        kind: Whether the anneal ends now ("nowcast") or starts now ("forecast").

    Raises:
        ForecastError: The merges do not reach over the anneal's length, or over one length only.
    """
    shortest, longest = curves.spans[0], curves.spans[-1]
    span = min(max(steps, shortest), longest)
    base = curves.merged(span, curves.step)
    gap = curves.raw_at(curves.step - span / 2) - base
    halves, moved = _halves(curves, span)
    start = curves.step - steps if kind == "nowcast" else curves.step
    end = start + steps
    further = float(np.log((start + steps * PROGRESS[shape]) / (curves.step - span / 2)))
    along = curves.slope(span) * further
    ratio = float(np.clip(halves / max(gap, _LEAST_GAP * base), *_RATIO))
    noise = max(gap, 0.0)
    terms = [
        gap,
        gap * steps / end,
        gap * (shape == "cosine"),
        gap * (shape == "1-sqrt"),
        halves,
        gap * ratio**2,
        -along,
    ]
    doubts = [
        base,
        noise * steps / end,
        abs(along),
        curves.noise * max(0.0, curves.sampling_noise(span / 2)),
        curves.raw_noise,
        moved,
    ]
    return Reading(base, np.array(terms) / base, np.array(doubts) / base, noise / base, steps / curves.step, steps)


def _halves(curves: Curves, span: float) -> tuple[float, float]:
    """Jensen's gap now, averaged with its mean of late, and how far the two are apart."""
    now = curves.halves_above_whole(span, curves.step)
    if not np.isfinite(now):
        raise ForecastError(
            f"the merges at step {curves.step} say nothing of both halves of {span:g} steps. Merges over about "
            f"{span / 2:g} steps are needed now and {span / 2:g} steps ago: name the forecast in the run's "
            f"configuration, which measures them, or add a view over half the snapshots; merge at least as often."
        )
    mean = curves.late_halves_above_whole(span)
    return (now + mean) / 2, abs(now - mean)
