"""Anneal now, or go on and anneal later: two forecasts of one run and what lies between them."""

import math
from dataclasses import dataclass

import numpy as np

from pretrain_merge.forecast.anneal import Forecast, forecast_of, reading_of
from pretrain_merge.forecast.calibration import Calibration, shipped
from pretrain_merge.forecast.history import History
from pretrain_merge.forecast.law import DOUBTS

_SHARED = ("base", "sampling", "raw", "halves", "below")  # doubts that two anneals of one run have in common


@dataclass(frozen=True)
class Decision:
    """Two anneals of the same length, and what the later one is better by.

    Attributes:
        now: The anneal that starts now.
        later: The one that starts after as many steps more at constant rate as it is long.
        better: By how much the later one is expected to end lower.
        low: Lower end of that difference's interval.
        high: Upper end of it.
    """

    now: Forecast
    later: Forecast
    better: float
    low: float
    high: float

    @property
    def cost(self) -> int:
        """Steps that the later one takes more."""
        return self.later.expected.step - self.now.expected.step

    @property
    def is_told(self) -> bool:
        """Whether the interval of the difference leaves no doubt which ends lower."""
        return self.low > 0 or self.high < 0

    def sentence(self) -> str:
        """The advice, with what it rests on."""
        now, later = self.now, self.later
        advice = "Go on" if self.low > 0 else "Anneal now" if self.high < 0 else "Either"
        # as sizes: where the later one ends higher both are negative
        ends = sorted((abs(self.low), abs(self.high)))
        told = (
            f"{abs(self.better):.4f} ({ends[0]:.4f} to {ends[1]:.4f}) {'lower' if self.low > 0 else 'higher'}"
            if self.is_told
            else f"{self.better:.4f} ({self.low:.4f} to {self.high:.4f}) lower, which may be nothing,"
        )
        return (
            f"{advice}: annealed from now over {now.steps} steps, {now.metric} ends at {_spelled(now)}, at step "
            f"{now.expected.step}; after {later.after} steps more at constant rate and the same anneal, at "
            f"{_spelled(later)}, at step {later.expected.step}: {told} for {self.cost} steps more."
        )


def decide(
    history: History,
    *,
    steps: int,
    shape: str,
    metric: str,
    coverage: float,
    calibration: Calibration | None,
) -> Decision:
    """Compare an anneal from now with one of the same length that begins when the first would end.

    Args:
        history: The run up to now.
        steps: Length of both.
        shape: How the learning rate falls.
        metric: The loss that the history is of.
        coverage: Share of true values in the intervals.
        calibration: What the law's terms count; None: the one that ships.

    Raises:
        ForecastError: The history does not allow a forecast.
    """
    calibration = calibration or shipped()
    now, later = (
        forecast_of(
            history,
            steps=steps,
            shape=shape,
            kind="forecast",
            metric=metric,
            coverage=coverage,
            calibration=calibration,
            after=after,
        )
        for after in (0, steps)
    )
    soon, late = (reading_of(history, steps, shape, "forecast", after=after) for after in (0, steps))
    # what both have in common cannot make one better than the other
    parts = np.array([0.0 if doubt in _SHARED else 1.0 for doubt in DOUBTS]) * np.abs(late.doubts - soon.doubts)
    error = float(parts @ np.array(calibration.errors)) * calibration.quantile(coverage)
    drift = abs(calibration.drift(late, coverage) - calibration.drift(soon, coverage))
    # relative to the merged loss; how far the law is off and how far it drifts are independent
    half = soon.base * math.hypot(error, drift)
    better = now.mean - later.mean
    return Decision(now, later, better, better - half, better + half)


def _spelled(item: Forecast) -> str:
    return f"{item.mean:.4f} ({item.low:.4f} to {item.high:.4f})"
