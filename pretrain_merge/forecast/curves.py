"""Raw and merged loss of a run as functions of step and span, cleaned of noise as far as the records allow.

A plain mean of models over a span lies half a span back along the way of training, and it is closer to that way (the
"river" of the loss landscape) than the live model, whose iterates scatter around it. This module knows points and
curves; what they say of an anneal is the law's business. Lengths are in steps, losses in the metric's own unit.
"""

from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from pretrain_merge.forecast.history import History, Mean, Point

Floats = NDArray[np.float64]

MEMORY = 8.0  # steps after which an iterate's noise is forgotten; matters only where snapshots are closer than a few
_TREND_FROM = 0.5  # of the steps so far: what lies before says little of the trend of the raw loss now
_SLOPE_FROM = 0.75
SPANS_UP_TO = 1.05  # times the longest that was measured
_SPANS_FROM = 0.45  # times the shortest


class Curves:
    """What is known of a run at its newest merge point.

    Args:
        history: At least one merge point; the newest one has a mean.
    """

    def __init__(self, history: History) -> None:
        self._points = history.points
        self._is_block = history.average == "block"
        self.step = self._points[-1].step
        self.spans = list(self._points[-1].means)
        self._known: dict[float, tuple[Floats, Floats]] = {}

    @property
    def steps(self) -> list[int]:
        """Steps of all merge points."""
        return [point.step for point in self._points]

    @cached_property
    def raw_noise(self) -> float:
        """Standard deviation of the raw loss around its trend."""
        x, y = self._recent_raw
        degree = len(self._trend) - 1
        left = y - np.polyval(self._trend, x)
        return float(np.std(left) * np.sqrt(len(x) / max(1, len(x) - degree - 1)))

    def raw_at(self, step: float) -> float:
        """The trend of the raw loss: a polynomial of degree 2 at most in log step, over the last half of training."""
        return float(np.polyval(self._trend, np.log(step / self.step)))

    @cached_property
    def noise(self) -> float:
        """How far the raw model lies above its means, each at its middle; the median over spans.

        The means keep some of the noise, so the river lies lower still. Dividing by the share that they lost was tried:
        it takes too much out of means of few snapshots, and errors grew by a tenth.
        """
        means = self._points[-1].means.items()
        return max(0.0, float(np.median([self.raw_at(self.step - span / 2) - mean.loss for span, mean in means])))

    def merged(self, span: float, step: float) -> float:
        """Loss of the mean over a span that ends at a step, between what was measured; NaN where nothing is near.

        The noise that only few snapshots leave is taken out, as if every iterate had entered the mean.
        """
        steps, losses = self._along(span)
        if not len(steps) or step < steps[0] - 1e-9:
            return float("nan")
        return float(np.interp(np.log(step), np.log(steps), losses))

    def halves_above_whole(self, span: float, step: float) -> float:
        """The mean loss of the means of both halves of a span, above that of the whole: Jensen's gap.

        To second order it is the squared distance of the halves in the metric of the Hessian: large while the noise
        is remembered for longer than a half, near zero once it is averaged out.
        """
        halves = self.merged(span / 2, step), self.merged(span / 2, step - span / 2)
        return sum(halves) / 2 - self.merged(span, step)

    def slope(self, span: float) -> float:
        """How fast the merged loss falls over the last quarter of training, per unit of log step."""
        steps, losses = self._along(span)
        if len(steps) < 2:
            return max(self._raw_slope, 0.0)
        middles = np.log((steps - span / 2) / self.step)
        first = min(int(np.argmin(np.abs(steps - _SLOPE_FROM * self.step))), len(steps) - 2)
        return float((losses[first] - losses[-1]) / (middles[-1] - middles[first]))

    def sampling_noise(self, span: float) -> float:
        """The share of `noise` that a finite number of snapshots adds to a mean over this span."""
        added = [self._added_by_sampling(length, mean) for length, mean in self._points[-1].means.items()]
        return float(np.interp(np.log(span), np.log(self.spans), added))

    @cached_property
    def _recent_raw(self) -> tuple[Floats, Floats]:
        recent = [point for point in self._points if point.step >= _TREND_FROM * self.step - 1e-9]
        recent = recent if len(recent) >= 3 else list(self._points[-3:])
        steps = np.array([point.step for point in recent], dtype=np.float64)
        return np.log(steps / self.step), np.array([point.raw for point in recent])

    @cached_property
    def _trend(self) -> Floats:
        x, y = self._recent_raw
        return np.polyfit(x, y, 0 if len(x) < 2 else 1 if len(x) < 5 else 2)

    @property
    def _raw_slope(self) -> float:
        return -float(self._trend[-2]) if len(self._trend) > 1 else 0.0

    def _along(self, span: float) -> tuple[Floats, Floats]:
        """The merged loss over one span at every merge point that says something of it."""
        if span not in self._known:  # asked for at many steps; a long run has thousands of merge points
            self._known[span] = self._measured_along(span)
        return self._known[span]

    def _measured_along(self, span: float) -> tuple[Floats, Floats]:
        known = [(point.step, loss) for point in self._points if np.isfinite(loss := self._at(point, span))]
        steps, losses = zip(*known, strict=True) if known else ((), ())
        return np.array(steps, dtype=np.float64), np.array(losses)

    def _at(self, point: Point, span: float) -> float:
        spans = list(point.means)
        if not spans or not _SPANS_FROM * spans[0] <= span <= SPANS_UP_TO * spans[-1]:
            return float("nan")
        # without noise the loss is nearly linear in the span: the mean lies half a span back on the way
        noise_left = [
            _left_by_mean(length / MEMORY) + self._added_by_sampling(length, mean)
            for length, mean in point.means.items()
        ]
        way = np.array([mean.loss for mean in point.means.values()]) - self.noise * np.array(noise_left)
        noise = self.noise * _left_by_mean(span / MEMORY)
        if span < spans[0]:
            return float(way[0] + noise - self._raw_slope / self.step * (spans[0] - span) / 2)
        return float(np.interp(span, spans, way) + noise)

    def _added_by_sampling(self, span: float, mean: Mean) -> float:
        if self._is_block:  # every iterate is in the mean, or enough of them
            return 0.0
        return _left_by_samples(mean.number, span / (mean.number - 1) / MEMORY) - _left_by_mean(span / MEMORY)


@cache
def _left_by_samples(number: int, gap: float) -> float:
    """Variance of a mean of equally spaced samples of a process that forgets as exp(-time), as a share of one's."""
    lags = np.arange(1, number)
    return 1 / number + 2 / number**2 * float(np.sum((number - lags) * np.exp(-gap * lags)))


def _left_by_mean(length: float) -> float:
    """The same of the mean over a continuous stretch."""
    return 1 - length / 3 if length < 1e-3 else 2 / length * (1 - (1 - np.exp(-length)) / length)
