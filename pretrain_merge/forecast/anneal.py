"""The two questions: where would an anneal end that starts now, and where would one be that ends now."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain_merge.errors import ForecastError, nearest
from pretrain_merge.forecast.calibration import Calibration, shipped
from pretrain_merge.forecast.curves import SPANS_UP_TO, Curves
from pretrain_merge.forecast.fitting import Example, updated
from pretrain_merge.forecast.history import History, read_history
from pretrain_merge.forecast.law import KINDS, PROGRESS, Reading, read
from pretrain_merge.records import Expected, MergeRecord

_LEAST_MERGES = 3


@dataclass(frozen=True)
class Forecast:
    """What is expected of an anneal.

    Attributes:
        mean: The annealed loss.
        low: Lower end of the interval.
        high: Upper end of the interval.
        basis: What it rests on, and where the interval was widened, in words.
        step: Step of the newest merge that was read.
        steps: Length of the anneal.
        shape: How its learning rate falls.
        kind: "forecast": it starts at `step`. "nowcast": it ends there.
        metric: The loss.
        coverage: Share of true losses that the interval is to hold.
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

    @property
    def expected(self) -> Expected:
        """The numbers alone, with the step at which the anneal ends."""
        end = self.step + self.steps if self.kind == "forecast" else self.step
        return Expected(self.mean, self.low, self.high, end)


@dataclass(frozen=True)
class Annealed:
    """A real anneal of a run.

    Attributes:
        start: Step at which it left the run.
        steps: Its length.
        loss: What it ended at, measured as the merges were.
        shape: How its learning rate fell.
    """

    start: int
    steps: int
    loss: float
    shape: str = "linear"


def forecast_anneal(
    records: Sequence[MergeRecord],
    *,
    steps: int,
    shape: str = "linear",
    kind: str = "forecast",
    metric: str = "val_loss",
    coverage: float = 0.9,
    calibration: Calibration | None = None,
) -> Forecast:
    """The loss after annealing the learning rate to zero, without annealing it.

    Args:
        records: Merge points of one run, oldest first; the newest one is now.
        steps: Length D of the anneal.
        shape: "linear", "cosine" or "1-sqrt".
        kind: "forecast": the anneal starts now. "nowcast": it started D steps ago, saw the run's own batches, ends now.
        metric: A loss that the records hold.
        coverage: Share of true losses that the interval is to hold, 0.5 to 0.95.
        calibration: What the law's terms count; None: the one that ships.

    Raises:
        ForecastError: The records do not allow it; says why, and what to do.

    Source: the law is described in `forecast.law`, and the page on forecasts has its errors.
    """
    return forecast_of(
        read_history(records, metric),
        steps=steps,
        shape=shape,
        kind=kind,
        metric=metric,
        coverage=coverage,
        calibration=calibration,
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

    Raises:
        ForecastError: The history does not allow it.
    """
    calibration = calibration or shipped()
    reading = reading_of(history, steps, shape, kind)
    half = calibration.half_width(reading, coverage)
    mean = calibration.expected(reading)
    return Forecast(
        mean=mean,
        low=mean - half,
        high=mean + half,
        basis=_basis(history, reading, calibration),
        step=int(history.steps[-1]),
        steps=steps,
        shape=shape,
        kind=kind,
        metric=metric,
        coverage=coverage,
    )


def calibrate(
    records: Sequence[MergeRecord],
    anneals: Sequence[Annealed],
    *,
    metric: str = "val_loss",
    prior: Calibration | None = None,
) -> Calibration:
    """A calibration for runs like this one, from anneals of its own; the shipped one is the prior.

    Args:
        records: Merge points of the run, oldest first.
        anneals: Real anneals that left it; each must start or end at a merge point.
        metric: The loss.
        prior: The calibration to begin with; None: the one that ships.

    Raises:
        ForecastError: No anneal is given, or the records do not allow a forecast of one.
    """
    prior = prior or shipped()
    if not anneals:
        raise ForecastError("no anneals: calibrating takes at least one real anneal of the run.")
    examples = []
    for item in anneals:
        for kind, step in (("nowcast", item.start + item.steps), ("forecast", item.start)):
            known = [record for record in records if record.step <= step]
            if known and known[-1].step == step:
                reading = reading_of(read_history(known, metric), item.steps, item.shape, kind)
                examples.append(Example(reading, item.loss, run=""))
                break
        else:
            raise ForecastError(
                f"the anneal of {item.steps} steps from step {item.start} neither starts nor ends at a merge point. "
                f"Give anneals between steps that the run merged at."
            )
    return updated(prior, examples, source=f"{len(examples)} anneals of one run, on top of: {prior.source}")


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


def reading_of(history: History, steps: int, shape: str, kind: str) -> Reading:
    """What the law reads of one anneal, or why it does not.

    Args:
        history: The run up to now.
        steps: Length of the anneal.
        shape: As in `forecast_anneal`.
        kind: As in `forecast_anneal`.

    Raises:
        ForecastError: The history does not allow it.
    """
    if shape not in PROGRESS:
        meant = nearest(shape, PROGRESS)
        raise ForecastError(
            f"shape {shape!r} was not calibrated on. Allowed: {', '.join(PROGRESS)}"
            f"{f'; did you mean {meant!r}?' if meant else '.'}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ForecastError(f"steps {steps!r}: an anneal takes a whole number of steps, at least 1.")
    if kind not in KINDS:
        raise ForecastError(f"kind {kind!r} is unknown. Allowed: {' or '.join(map(repr, KINDS))}.")
    newest = int(history.steps[-1])
    if history.num_merges < _LEAST_MERGES or not history.num_means[-1]:
        since = f", since {history.why_short}" if history.why_short else ""
        raise ForecastError(
            f"a forecast reads at least {_LEAST_MERGES} merge points at one learning rate, the newest with a mean "
            f"('sma'); at step {newest} there are {history.num_merges}{since}. Wait for more."
        )
    curves = Curves(history)
    shortest, longest = curves.spans[0], curves.spans[-1]
    if not shortest <= steps <= SPANS_UP_TO * longest and not (kind == "forecast" and steps > longest):
        raise ForecastError(
            f"an anneal of {steps} steps is not spanned by the means measured at step {curves.step}, which reach over "
            f"{shortest:g} to {longest:g} steps. Ask for a length within, measure a mean over it (a view such as "
            f"'sma4'), or change `window` or `every`."
        )
    if len(curves.spans) < 2:
        # tried on the suite: errors double, and the intervals hold 76% instead of 90%
        raise ForecastError(
            f"only means over {longest:g} steps were measured at step {curves.step}. How much noise they keep shows in "
            f"means over half of it: name the forecast in the run's configuration, which measures them, or add a view "
            f"over about half the snapshots (such as 'sma4')."
        )
    return read(curves, steps, shape, kind)


def _basis(history: History, reading: Reading, calibration: Calibration) -> str:
    widened = calibration.widening(reading)
    wider = f"; interval widened {widened:.1f} times, being outside of the lengths calibrated on" if widened > 1 else ""
    longer = (
        f"; interval widened, since no anneal of more than {calibration.longest:g} steps was calibrated on"
        if reading.steps > calibration.longest
        else ""
    )
    return (
        f"from {history.num_merges} merges up to step {history.steps[-1]:.0f}, merged loss {reading.base:.6g}; "
        f"calibrated on {calibration.source}{wider}{longer}"
    )
