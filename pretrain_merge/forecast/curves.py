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

_LATE = 0.5  # of the steps so far: what lies before says little of now
_EXPONENT = 0.5
_RECENCY = 10  # a point a tenth of the steps ago counts a third of the newest one; by 8 and 12 errors are as large
_UNKNOWN_DOUBT = 1 / 3  # of the fall, where the run is too short to tell: about what it is in the suite
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

    def halves_above_whole(self, span: float) -> tuple[float, float]:
        """The mean loss of the means of both halves of a span, above that of the whole: Jensen's gap.

        To second order it is the squared distance of the halves in the metric of the Hessian: large while the noise
        is remembered for longer than a half, near zero once it is averaged out. It moves slowly and is noisy, so it is
        averaged over the points of late. NaN where the newest means do not tell it.

        Returns:
            The gap, and how far the newest one is from it.
        """
        steps = self._history.steps[np.searchsorted(self._history.steps, _LATE * self.step) :]
        halves = self._merged_at(span / 2, steps) + self._merged_at(span / 2, steps - span / 2)
        gaps = halves / 2 - self._merged_at(span, steps)
        known = np.isfinite(gaps)
        if not known[-1]:
            return float("nan"), float("nan")
        mean = float(np.average(gaps[known], weights=self._recency(steps[known])))
        return mean, abs(float(gaps[-1]) - mean)

    def fall(self, span: float, *, to: float) -> tuple[float, float]:
        """How much lower the loss of the mean over a span gets on its way, and how far that is in doubt.

        The merged loss is nearly a line in t^-1/2, t the middle of the mean (Chinchilla's exponents are near 1/2, too).
        Means over a half and a quarter of the span follow the same way and see more of what was lately: one slope goes
        through all of them, each at its own level. The doubt is how far a point lies off its line as a rule, carried
        as far as the fall is: a run that bends, as after a sudden drop, is on no line.

        Args:
            span: Steps that the mean spans.
            to: The step on the way; behind the middle of the newest mean it is higher there.
        """
        newest = self.step - span / 2
        way = 1.0 - (to / newest) ** -_EXPONENT
        lines = [line for part in (span, span / 2, span / 4) if (line := self._line(part, newest))]
        if not lines:
            alone = max(self._raw_slope, 0.0) / _EXPONENT * way
            return alone, abs(alone)
        spread = sum(float(weights @ places**2) for weights, places, _ in lines)
        slope = sum(float(weights @ (places * losses)) for weights, places, losses in lines) / spread
        fall = slope * way
        left = sum(float(weights @ (losses - slope * places) ** 2) for weights, places, losses in lines)
        doubt = abs(way) * float(np.sqrt(left / spread))
        num_points = sum(1.0 / float(weights @ weights) for weights, _, _ in lines)
        is_told = num_points > len(lines) + 1  # a line goes through two points whatever they are
        return fall, doubt if is_told else max(doubt, _UNKNOWN_DOUBT * abs(fall))

    def _line(self, span: float, newest: float) -> tuple[Floats, Floats, Floats] | None:
        """Weights, places and losses of a mean's points, around their averages; None where there are no two."""
        steps, losses = self._along(span)
        if len(steps) < 2:
            return None
        weights = self._recency(steps)
        weights = weights / weights.sum()
        places = ((steps - span / 2) / newest) ** -_EXPONENT
        return weights, places - weights @ places, losses - weights @ losses

    def sampling_noise(self, span: float) -> float:
        """The share of `noise` that a finite number of snapshots adds to a mean over this span."""
        added = [added_by_sampling(mean.span, mean.number, self._history.average) for mean in self._newest]
        return float(np.interp(np.log(span), np.log(self.spans), added))

    @cached_property
    def _recent_raw(self) -> tuple[Floats, Floats]:
        steps = self._history.steps
        first = int(np.searchsorted(steps, _LATE * self.step - 1e-9))
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

    def _recency(self, steps: Floats) -> Floats:
        """What a point counts beside the newest one."""
        return (steps / self.step) ** _RECENCY

    def _along(self, span: float) -> tuple[Floats, Floats]:
        """The merged loss over one span at every merge point that says something of it.

        Points are left out that lie farther back than anything is asked for; the newest of them stays, to interpolate
        from.
        """
        if span not in self._known:
            asked_from = _LATE * self.step - span
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
