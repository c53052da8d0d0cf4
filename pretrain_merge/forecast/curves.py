"""Raw and merged loss of a run as functions of step and span, cleaned of noise as far as the records allow.

A plain mean of models over a span lies half a span back along the way of training, and it is closer to that way (the
"river" of the loss landscape) than the live model, whose iterates scatter around it. This module knows columns of
points and curves; what they say of an anneal is the law's business. Lengths are in steps, losses in the metric's own
unit. A run has thousands of points, so nothing here goes through them one by one.
"""

from functools import cached_property

import numpy as np

from pretrain_merge.forecast.history import History
from pretrain_merge.forecast.noise import MEMORY, Floats, added_by_sampling, left_by_mean

_TREND_FROM = 0.5  # of the steps so far: what lies before says little of the trend of the raw loss now
_FALL_FROM, _BEND_FROM = 0.75, 0.5
_EXPONENT = 0.5
_LEAST_ON_LINE = 4  # points of the last quarter
_UNKNOWN_BEND = 1 / 3  # of the fall, where the run is too short to tell: about what it is in the suite
HALVES_FROM = 0.7  # Jensen's gap moves slowly, its mean over these is less noisy
SPANS_UP_TO = 1.05  # times the longest that was measured
_SPANS_FROM = 0.45  # times the shortest


class Curves:
    """What is known of a run at its newest merge point.

    Args:
        history: At least one merge point; the newest one has a mean.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._newest = history.means_at(-1)
        self.step = int(history.steps[-1])
        self.spans = [mean.span for mean in self._newest]
        self._known: dict[float, tuple[Floats, Floats]] = {}

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
        above = [self.raw_at(self.step - mean.span / 2) - mean.loss for mean in self._newest]
        return max(0.0, float(np.median(above)))

    def merged(self, span: float, step: float) -> float:
        """Loss of the mean over a span that ends at a step, between what was measured; NaN where nothing is near.

        The noise that only few snapshots leave is taken out, as if every iterate had entered the mean.
        """
        return float(self._merged_at(span, np.array([step]))[0])

    def halves_above_whole(self, span: float, step: float) -> float:
        """The mean loss of the means of both halves of a span, above that of the whole: Jensen's gap.

        To second order it is the squared distance of the halves in the metric of the Hessian: large while the noise
        is remembered for longer than a half, near zero once it is averaged out.
        """
        return float(self._halves_above_whole(span, np.array([step]))[0])

    def late_halves_above_whole(self, span: float) -> float:
        """The mean of Jensen's gaps at the merge points of late, where they are known; NaN where none is."""
        steps = self._history.steps
        gaps = self._halves_above_whole(span, steps[np.searchsorted(steps, HALVES_FROM * self.step) :])
        known = gaps[np.isfinite(gaps)]
        return float(np.mean(known)) if len(known) else float("nan")

    def fall(self, span: float, *, to: float) -> tuple[float, float]:
        """How much lower the loss of the mean over a span gets on its way, and how far that is in doubt.

        The merged loss is nearly a line in t^-1/2, t the middle of the mean (Chinchilla's exponents are near 1/2, too).
        The line goes through the last quarter of training; the doubt is what the quarter before would say instead.
        Through all of the last half it errs by a third more 10% ahead, and by half more beyond.

        Args:
            span: Steps that the mean spans.
            to: The step on the way; behind the middle of the newest mean it is higher there.
        """
        newest = self.step - span / 2
        way = 1.0 - (to / newest) ** -_EXPONENT
        span = self._followed(span)
        steps, losses = self._along(span)
        if len(steps) < 2:
            alone = max(self._raw_slope, 0.0) / _EXPONENT * way
            return alone, abs(alone)
        places = ((steps - span / 2) / newest) ** -_EXPONENT
        first = min(int(np.searchsorted(steps, _FALL_FROM * self.step - 1e-9)), max(0, len(steps) - 3))
        fall = _steepness(places[first:], losses[first:]) * way
        from_ = int(np.searchsorted(steps, _BEND_FROM * self.step - 1e-9))
        if first + 1 - from_ < 2:
            return fall, abs(fall) * _UNKNOWN_BEND
        before = _steepness(places[from_ : first + 1], losses[from_ : first + 1]) * way
        return fall, abs(fall - before)

    def _followed(self, span: float) -> float:
        """This span, or the first of its halves whose means tell of a slope: enough of them lie in the last quarter.

        Every mean follows the same way, half its span behind; of one that was hardly measured the slope was read as 0.
        """
        for half in (span, span / 2, span / 4, span / 8):
            steps, _ = self._along(half)
            if np.count_nonzero(steps >= _FALL_FROM * self.step - 1e-9) >= _LEAST_ON_LINE:
                return half
        return span

    def sampling_noise(self, span: float) -> float:
        """The share of `noise` that a finite number of snapshots adds to a mean over this span."""
        added = [added_by_sampling(mean.span, mean.number, self._history.average) for mean in self._newest]
        return float(np.interp(np.log(span), np.log(self.spans), added))

    @cached_property
    def _recent_raw(self) -> tuple[Floats, Floats]:
        steps = self._history.steps
        first = int(np.searchsorted(steps, _TREND_FROM * self.step - 1e-9))
        first = max(0, min(first, len(steps) - 3))
        return np.log(steps[first:] / self.step), self._history.raw[first:]

    @cached_property
    def _trend(self) -> Floats:
        x, y = self._recent_raw
        return np.polyfit(x, y, 0 if len(x) < 2 else 1 if len(x) < 5 else 2)

    @property
    def _raw_slope(self) -> float:
        return -float(self._trend[-2]) if len(self._trend) > 1 else 0.0

    def _merged_at(self, span: float, at: Floats) -> Floats:
        steps, losses = self._along(span)
        if not len(steps):
            return np.full(len(at), np.nan)
        # on the way of training, where the loss is nearly straight: a chord of its curve in steps lies too high
        way = -(np.maximum(at - span / 2, 0.5) ** -_EXPONENT)
        return np.where(at < steps[0] - 1e-9, np.nan, np.interp(way, -((steps - span / 2) ** -_EXPONENT), losses))

    def _halves_above_whole(self, span: float, at: Floats) -> Floats:
        halves = self._merged_at(span / 2, at) + self._merged_at(span / 2, at - span / 2)
        return halves / 2 - self._merged_at(span, at)

    def _along(self, span: float) -> tuple[Floats, Floats]:
        """The merged loss over one span at every merge point that says something of it.

        Points are left out that lie farther back than anything is asked for; the newest of them stays, to interpolate
        from.
        """
        if span not in self._known:
            asked_from = min(HALVES_FROM * self.step - span, _BEND_FROM * self.step)
            first = max(0, int(np.searchsorted(self._history.steps, asked_from)) - 1)
            steps, losses = self._history.steps[first:], self._measured(span, first)
            is_known = np.isfinite(losses)
            self._known[span] = steps[is_known], losses[is_known]
        return self._known[span]

    def _measured(self, span: float, first: int) -> Floats:
        """The loss of the mean over one span at each point from one on; NaN where it was not measured about there.

        Without noise the loss is nearly linear in the span, as the mean lies half a span back on the way: it is
        interpolated between the two neighbouring means of a point once the noise that each keeps is taken out.
        """
        spans, _, losses, _, kept = self._history.means[:, :, first:]
        number = self._history.num_means[first:]
        if not len(spans):
            return np.full(len(number), np.nan)
        columns = np.arange(len(number))
        shorter = np.minimum((spans <= span).sum(axis=0), number) - 1
        low = np.maximum(shorter, 0)
        high = np.maximum(np.minimum(low + 1, number - 1), low)
        from_, to = spans[low, columns], spans[high, columns]
        way = losses[low, columns] - self.noise * kept[low, columns]
        way_to = losses[high, columns] - self.noise * kept[high, columns]
        with np.errstate(invalid="ignore", divide="ignore"):  # where both are one
            between = (way_to - way) / (to - from_) * (span - from_) + way
        noise = self.noise * left_by_mean(span / MEMORY)
        found = np.where(high > low, between, way) + noise
        below = way + noise - self._raw_slope / self.step * (from_ - span) / 2
        longest = spans[np.maximum(number - 1, 0), columns]
        is_near = (number > 0) & (_SPANS_FROM * spans[0] <= span) & (span <= SPANS_UP_TO * longest)
        return np.where(is_near, np.where(shorter < 0, below, found), np.nan)


def _steepness(places: Floats, losses: Floats) -> float:
    """Slope of the line of least squares."""
    around = places - places.mean()
    return float(around @ losses / (around @ around))
