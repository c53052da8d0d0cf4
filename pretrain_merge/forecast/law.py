"""The law: what an anneal ends at, as the merged loss and four terms that are read off the records.

    annealed = M + aJ * J * s / (s + .01) + aS * G * (left(shape, r) - left(linear, r)) - c1 * G * gain(shape) * s
                 - kappa * F

    M       loss of the mean over the last D steps
    G       trend of the raw loss at the middle of that mean, minus M: how far the raw model lies above the river
    J       Jensen's gap of the halves of the mean: how much noise is left in it; r = J / G
    F       how much further the merged loss falls until the anneal's end, by lines in t^-1/2 through its means of late
    s       share of training that the anneal is at its end, D / end
    left, gain    what a shape leaves and gains beside a linear anneal, by `quadratic`

The identity of WSM (arXiv 2507.17634) says that M is a linear decay replayed on recorded updates. A real decay differs:
it leaves the noise of a shorter mean, and its gradients are taken where the noise is smaller, so that it gains about
G * D / end more. In theory all four coefficients are 1, and fitted they are within a tenth of it. No theory says yet
why J counts less where the anneal is a small share of training; it was found on the random suite, whose runs are long.
Everything is relative to M, so the law does not change with the unit of the loss or of the step. This module reads
terms; what they count is the calibration's business.
"""

import math
from dataclasses import dataclass

import numpy as np

from pretrain_merge.forecast.curves import Curves
from pretrain_merge.forecast.noise import Floats
from pretrain_merge.forecast.quadratic import decay, typical_ratio

KINDS = ("nowcast", "forecast")
CALIBRATED_SHAPES = ("linear", "cosine", "1-sqrt")  # the suite has anneals of these
TERMS = ("aJ", "aS", "c1", "kappa")
DOUBTS = ("base", "noise times share", "fall", "sampling", "raw", "halves", "bend", "below")
_RATIO = (-0.3, 0.5)  # of J to G: beyond, one of them is noise
_LEAST_GAP = 1e-5  # of the loss
_SMALL = 0.01  # of the steps until its end: an anneal of this share keeps half of J


@dataclass(frozen=True)
class Reading:
    """What the records say of one anneal. Losses are relative to the base.

    Attributes:
        base: M, the merged loss that the forecast starts from.
        terms: One number for each of `TERMS`.
        doubts: One for each of `DOUBTS`: what the error is expected to grow with.
        gap: G, at least 0.
        ratio: J / G.
        share: D as a share of the steps so far.
        steps: D.
        end: Step at which the anneal ends.
        unlike: How much of the forecast rests on a shape that no anneal of the suite had.
        is_reduced: Whether J is the usual one, since no means over half the length were measured.
    """

    base: float
    terms: Floats
    doubts: Floats
    gap: float
    ratio: float
    share: float
    steps: float
    end: float
    unlike: float = 0.0
    is_reduced: bool = False


def read(curves: Curves, steps: float, shape: str, kind: str, *, after: float = 0.0) -> Reading:
    """Read the terms of the law.

    Args:
        curves: The run up to now.
        steps: D, the length of the anneal.
        shape: How the learning rate falls: a key of `lr_schedules.SHAPES`.
        kind: Whether the anneal ends now ("nowcast") or starts now ("forecast").
        after: Steps at constant rate until a forecast's anneal starts.
    """
    shortest, longest = curves.spans[0], curves.spans[-1]
    span = min(max(steps, shortest), longest)
    base = curves.merged(span, curves.step)
    gap = curves.raw_at(curves.step - span / 2) - base
    noise = max(gap, 0.0)
    # of one mean alone a half would be made up from the whole
    halves, moved = curves.halves_above_whole(span) if len(curves.spans) > 1 else (math.nan, math.nan)
    is_reduced = not math.isfinite(halves)
    if is_reduced:  # the noise's memory may as well be twice as long as usual, or none
        halves = moved = noise * typical_ratio(span)
    ratio = float(np.clip(halves / max(gap, _LEAST_GAP * base), *_RATIO))
    start = curves.step - steps if kind == "nowcast" else curves.step + after
    end, form, linear = start + steps, decay(shape), decay("linear")
    fall, bend = curves.fall(span, to=start + steps * form.progress)
    by_shape = gap * (form.left(ratio) - linear.left(ratio))
    share = steps / end
    gain = gap * form.gain * share
    terms = [halves * share / (share + _SMALL), by_shape, -gain, -fall]
    doubts = [
        base,
        noise * share,
        abs(fall),
        curves.noise * max(0.0, curves.sampling_noise(span / 2)),
        curves.raw_noise,
        moved,
        bend,
        base if halves < 0 else 0.0,  # by how much says less than that it is so
    ]
    unlike = abs(by_shape) + abs(gain) * abs(1 - 1 / form.gain) if shape not in CALIBRATED_SHAPES else 0.0
    return Reading(
        base=base,
        terms=np.array(terms) / base,
        doubts=np.array(doubts) / base,
        gap=noise / base,
        ratio=ratio,
        share=steps / curves.step,
        steps=steps,
        end=end,
        unlike=unlike / base,
        is_reduced=is_reduced,
    )
