"""The two questions: where would an anneal end that starts now, and where would one be that ends now."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain_merge.errors import ForecastError, nearest
from pretrain_merge.forecast.calibration import Calibration, shipped
from pretrain_merge.forecast.curves import SPANS_UP_TO, Curves
from pretrain_merge.forecast.history import History, read_history
from pretrain_merge.forecast.law import CALIBRATED_SHAPES, KINDS, Reading, read
from pretrain_merge.forecast.metrics import find_metric
from pretrain_merge.lr_schedules import SHAPES
from pretrain_merge.records import Expected, MergeRecord

_LEAST_MERGES = 3
_FEWEST = 2  # snapshots in a mean
_ALARMS = ("below", "bend")
_BENT = 1.5  # times wider
_WIDER = 1.05  # times: less is no reason that a reader would see


@dataclass(frozen=True)
class Forecast:
    """What is expected of an anneal.

    Attributes:
        mean: The annealed loss.
        low: Lower end of the interval.
        high: Upper end of the interval.
        basis: What it rests on, in words, and why the interval is wider than usual.
        step: Step of the newest merge that was read.
        steps: Length of the anneal.
        shape: How its learning rate falls.
        kind: "forecast": it starts at `step`. "nowcast": it ends there.
        metric: The loss.
        coverage: Share of true losses that the interval is to hold.
        after: Steps at constant rate between `step` and the anneal.
    """

    mean: float
    low: float
    high: float
    basis: str
    step: int
    steps: int
    shape: str
    kind: str
    metric: str
    coverage: float
    after: int = 0

    @property
    def widened(self) -> list[str]:
        """Why the interval is wider than that of another run."""
        return [part for part in self.basis.split("; ") if part.startswith("interval widened")]

    @property
    def expected(self) -> Expected:
        """The numbers alone, with the step at which the anneal ends."""
        end = self.step + self.after + self.steps if self.kind == "forecast" else self.step
        return Expected(self.mean, self.low, self.high, end)


def forecast_anneal(
    records: Sequence[MergeRecord],
    *,
    steps: int,
    shape: str = "linear",
    kind: str = "forecast",
    metric: str | None = None,
    coverage: float = 0.9,
    calibration: Calibration | None = None,
    after: int = 0,
) -> Forecast:
    """The loss after annealing the learning rate to zero, without annealing it.

    Args:
        records: Merge points of one run, oldest first; the newest one is now.
        steps: Length D of the anneal.
        shape: "linear", "cosine", "1-sqrt", or "1-square", which widens the interval: no real one was measured.
        kind: "forecast": the anneal starts now. "nowcast": it started D steps ago, saw the run's own batches, ends now.
        metric: A loss that the records hold; None: the only one named a loss, or the usual one among several.
        coverage: Share of true losses that the interval is to hold, 0.5 to 0.95.
        calibration: What the law's terms count; None: the one that ships.
        after: Steps at constant rate until the anneal of a forecast starts.

    Raises:
        ForecastError: The records do not allow it; says why, and what to do.

    Source: the law is described in `forecast.law`, and the page on forecasts has its errors.
    """
    metric = find_metric(records, metric)
    return forecast_of(
        read_history(records, metric),
        steps=steps,
        shape=shape,
        kind=kind,
        metric=metric,
        coverage=coverage,
        calibration=calibration,
        after=after,
    )


def forecast_of(
    history: History,
    *,
    steps: int,
    shape: str,
    kind: str,
    metric: str,
    coverage: float,
    calibration: Calibration | None,
    after: int = 0,
) -> Forecast:
    """`forecast_anneal` of a history that was read before, or that grows with its run.

    Args:
        history: The run up to now.
        steps: As in `forecast_anneal`; so are all others.
        shape: How the learning rate falls.
        kind: Whether the anneal starts or ends now.
        metric: The loss that the history is of.
        coverage: Share of true losses in the interval.
        calibration: What the law's terms count.
        after: Steps at constant rate until the anneal starts.

    Raises:
        ForecastError: The history does not allow it.
    """
    calibration = calibration or shipped()
    reading = reading_of(history, steps, shape, kind, after=after)
    low, high = calibration.interval(reading, coverage)
    return Forecast(
        mean=calibration.expected(reading),
        low=low,
        high=high,
        basis=_basis(history, reading, calibration, shape),
        step=int(history.steps[-1]),
        steps=steps,
        shape=shape,
        kind=kind,
        metric=metric,
        coverage=coverage,
        after=after,
    )


def spans(intervals: float, *, window: int, average: str) -> list[int]:
    """How many snapshots the means must hold that a forecast reads: over the anneal's length, a half and a quarter.

    Args:
        intervals: Length of the anneal, in intervals between snapshots.
        window: Snapshots that are kept; a longer anneal is read from the whole window.
        average: "last" or "block".
    """
    more = int(average == "last")  # n snapshots span n - 1 intervals, n block means span n
    reach = min(intervals, window - more)
    numbers = {round(reach * share) + more for share in (0.25, 0.5)} | {math.ceil(reach) + more}
    return sorted(number for number in numbers if 2 <= number <= window)


def reading_of(history: History, steps: int, shape: str, kind: str, *, after: int = 0) -> Reading:
    """What the law reads of one anneal, or why it does not.

    Args:
        history: The run up to now.
        steps: Length of the anneal.
        shape: As in `forecast_anneal`.
        kind: As in `forecast_anneal`.
        after: As in `forecast_anneal`.

    Raises:
        ForecastError: The history does not allow it.
    """
    if shape not in SHAPES:
        meant = nearest(shape, SHAPES)
        raise ForecastError(
            f"shape {shape!r} is not a decay that the law knows. Allowed: {', '.join(SHAPES)}"
            f"{f'; did you mean {meant!r}?' if meant else '.'}"
        )
    # True is an int
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ForecastError(f"steps {steps!r}: an anneal takes a whole number of steps, at least 1.")
    if kind not in KINDS:
        raise ForecastError(f"kind {kind!r} is unknown. Allowed: {' or '.join(map(repr, KINDS))}.")
    newest = int(history.steps[-1])
    # before the count of merges: to be told to wait helps nobody whose rate never stands still
    if history.num_merges < _LEAST_MERGES and history.is_drifting:
        raise ForecastError(
            f"{history.why_short}, and changed before that, too: the law is measured at constant rates, where a mean "
            f"of snapshots reads an anneal. Under a slow decay (1/sqrt t, a power) a part of the anneal has happened, "
            f"and how much of it a mean repeats was not measured. Ask during a stretch at one rate."
        )
    if history.num_merges < _LEAST_MERGES or not history.num_means[-1]:
        since = f", since {history.why_short}" if history.why_short else ""
        raise ForecastError(
            f"a forecast reads at least {_LEAST_MERGES} merge points at one learning rate, the newest with a mean "
            f"('sma'); at step {newest} there are {history.num_merges}{since}. Wait for more."
        )
    curves = Curves(history)
    shortest, longest = curves.spans[0], curves.spans[-1]
    # a longer anneal to come is read from the longest mean; one that ends now is the mean over itself
    if not shortest <= steps <= SPANS_UP_TO * longest and not (kind == "forecast" and steps > longest):
        spans = f"{shortest:g} steps" if shortest == longest else f"{shortest:g} to {longest:g} steps"
        raise ForecastError(
            f"an anneal of {steps} steps is not spanned by the means measured at step {curves.step}, which reach over "
            f"{spans}. Ask for a length within, or {_remedy(history, steps)}."
        )
    return read(curves, steps, shape, kind, after=after)


def _remedy(history: History, steps: int) -> str:
    """What makes the means reach an anneal that none of them spans."""
    means, more = history.means_at(-1), int(history.average == "last")
    is_longer = steps > means[0].span
    mean = means[-1] if is_longer else means[0]
    interval = mean.span / (mean.number - more)
    if is_longer:
        # snapshots whose distance grows with the run lie closer the farther back, so it is not told to one of them
        number = math.ceil(steps / interval) + more
        return (
            f"raise `window` or `every`: as the snapshots lie now, a mean over it takes about {number} of them, which "
            f"the view's `span` must allow, too"
        )
    number = int(steps / interval) + more
    if number < _FEWEST:
        return "lower `every`: two snapshots lie farther apart than it is long"
    return f"measure a mean of fewer snapshots, about {number} of them as they lie now"


def _basis(history: History, reading: Reading, calibration: Calibration, shape: str) -> str:
    read_from = f"from {history.num_merges} merges up to step {history.steps[-1]:.0f}, merged loss {reading.base:.6g}"
    return "; ".join([read_from, f"calibrated on {calibration.source}", *_widened(reading, calibration, shape)])


def _widened(reading: Reading, calibration: Calibration, shape: str) -> list[str]:
    """Why the interval is wider than that of another run, and how many times where that is one number."""
    outside, below, bend = (calibration.widening(reading), *(calibration.widened_by(reading, x) for x in _ALARMS))
    reasons = {
        f"widened {outside:.1f} times, being outside of the lengths calibrated on": outside > _WIDER,
        f"widened {below:.1f} times: halves of the mean lie below the whole, as no noise would have them": below
        > _WIDER,
        f"widened {bend:.1f} times: the merged loss of late is on no line, as after a sudden drop": bend > _BENT,
        "widened, since no means over half the length were measured (a view of fewer snapshots), which say how much "
        "noise the whole keeps": reading.is_reduced,
        f"widened, since no anneal calibrated on ended after step {calibration.latest:g}": (
            reading.end > calibration.latest
        ),
        f"widened, since no {shape} anneal was calibrated on": shape not in CALIBRATED_SHAPES,
    }
    return [f"interval {reason}" for reason, holds in reasons.items() if holds]
