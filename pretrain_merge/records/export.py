"""Merge points from rows of metrics, as loggers were given them: the inverse of `MergeRecord.metrics`.

This module knows the names of our metrics. No logger is told which snapshots a merge used, and none is told learning
rates: which snapshots they were is worked out from spans and intervals, and a break is seen where the window shrank.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pretrain_merge.cadence import Interval, Quantity, Share
from pretrain_merge.errors import ConfigError
from pretrain_merge.records import AT_END, FORECAST, GAP_CLOSED, RAW, SPAN, Expected, MergeRecord, Recipe

_NESTED = re.compile(r"sma[0-9]*|further-.*")
_PLAIN = re.compile(rf"(?:{FORECAST}/)?sma(?P<number>[0-9]{{0,9}})")  # by its name a plain mean
_LARGEST_WINDOW = 10_000  # as in `config`; a file may claim any number of snapshots
_MOST_SNAPSHOTS = 100_000  # of all views of a merge together: ten over the largest window
_MOST_OF_ALL = 4_000_000  # of all merges together; each takes some 40 bytes
_LARGEST_STEP = 2**53  # beyond, floats skip integers
Row = Mapping[str, float]


@dataclass(frozen=True)
class Spacing:
    """How far apart the snapshots of a merge were taken, as the configuration of its run says.

    Attributes:
        every: The interval; a share is of the steps since the first, so the merge point says what it came to.
        step: The merge point.
        tokens: Counted up to there; 0: the run counts none.
    """

    every: Interval
    step: int
    tokens: int

    @property
    def _per_step(self) -> float:
        """Counts of the interval's unit in a step, on average of the run so far."""
        if self.every.unit == "steps":
            return 1.0
        if self.every.unit == "samples" or not self.tokens:
            raise ConfigError(
                f"every: {self.every} counts {self.every.unit}, of which the metrics say nothing. Name the steps of "
                f"one interval, as in 1000."
            )
        return self.tokens / self.step

    def reach(self, intervals: int) -> int:
        """Over how many steps the last so many intervals reach back."""
        if isinstance(self.every, Quantity):
            return round(self.every.amount * intervals / self._per_step)
        count = round(self.step * self._per_step)
        first = self.every.reached(max(0, self.every.index(count) - intervals))
        return round((count - first) / self._per_step)

    def intervals(self, span: int) -> int:
        """How many of the last intervals so many steps are."""
        if isinstance(self.every, Quantity):
            return round(span * self._per_step / self.every.amount)
        first, last = (round(step * self._per_step) for step in (self.step - span, self.step))
        return self.every.index(last) - self.every.index(first)


def merges(name: str, rows: Iterable[Row]) -> list[dict[str, float]]:
    """The rows of merge points, oldest first, each with all that was logged at its step.

    Raises:
        ValueError: A step is out of range.
    """
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if math.isfinite(row.get(f"{name}/step", math.nan)):
            # numbers of a published model come later, at the step of its merge
            known = found.setdefault(_counter(row, f"{name}/step", _LARGEST_STEP), {})
            # an export may fill the cells that were never written with NaN
            known.update({key: value for key, value in row.items() if key not in known or math.isfinite(value)})
    return [row for _, row in sorted(found.items()) if any(key.startswith(f"{name}/{RAW}/") for key in row)]


def records(name: str, rows: Iterable[Row], every: Interval | None, average: str) -> Iterator[MergeRecord]:
    """What merge points measured.

    Args:
        name: Of the callback.
        rows: As `merges` gives them.
        every: The interval; None: unknown, and recipes are those that spans and numbers of snapshots tell.
        average: What a snapshot is.

    Raises:
        ValueError: A counter is out of range, or more snapshots are claimed than any run has.
        ConfigError: The interval counts what the rows do not.
    """
    num_snapshots = 0
    before: MergeRecord | None = None
    for row in rows:
        record = _record(name, row, before, every, average)
        num_snapshots += sum(len(recipe.steps) for recipe in record.recipes.values())
        if num_snapshots > _MOST_OF_ALL:
            raise ValueError(f"its merges are of more than {_MOST_OF_ALL:,} snapshots together")
        yield record
        before = record


def _record(name: str, row: Row, before: MergeRecord | None, every: Interval | None, average: str) -> MergeRecord:
    measured: dict[str, dict[str, float]] = {}
    forecasts: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        prefix, _, rest = key.partition("/")
        model, _, metric = rest.partition("/")
        # a raw loss that is not finite is a run that diverged; of the others it may stand for a cell without a number
        if prefix != name or not metric or not (math.isfinite(value) or model == RAW):
            continue
        if metric.startswith(f"{GAP_CLOSED}/"):
            continue
        if model == FORECAST:
            forecast, _, metric = metric.partition("/")
            if _NESTED.fullmatch(forecast):  # a mean that forecasts read, beside the forecasts
                measured.setdefault(f"{FORECAST}/{forecast}", {})[metric] = value
            elif not metric.startswith(f"{AT_END}/"):  # of a forecast that was made before
                forecasts.setdefault(forecast, {})[metric] = value
        else:
            measured.setdefault(model, {})[metric] = value
    step = _counter(row, f"{name}/step", _LARGEST_STEP)
    window = _counter(row, f"{name}/window", _LARGEST_WINDOW)
    raw = measured.pop(RAW)
    spans = {view: _counter(values, SPAN, _LARGEST_STEP) for view, values in measured.items() if SPAN in values}
    for values in measured.values():
        for told_of_recipes in (SPAN, "best_span", "best_step", "regret"):
            values.pop(told_of_recipes, None)
    tokens = _counter(row, f"{name}/tokens", _LARGEST_STEP)
    spacing = Spacing(every, step, tokens) if every is not None and step else None
    means = _means(measured, window, spans, spacing, int(average == "last"))
    # a window only shrinks where it was begun anew
    is_new = before is not None and window < before.window
    return MergeRecord(
        name=name,
        step=step,
        samples=0,
        tokens=tokens,
        window=window,
        spread=row.get(f"{name}/spread", math.nan),
        raw=raw,
        views=measured,
        recipes=dict(_recipes(means, step, int(average == "last"))),
        forecasts={key: _expected(values, step) for key, values in forecasts.items()},
        since=0 if before is None else before.step if is_new else before.since,
        average=average,
    )


def _expected(values: Row, step: int) -> dict[str, Expected]:
    """A forecast by its metric; a run of an earlier version did not say where its anneal ends."""
    end = _counter({"step": step, **values}, "step", _LARGEST_STEP)
    return {
        metric: Expected(mean, values[f"{metric}/low"], values[f"{metric}/high"], end)
        for metric, mean in values.items()
        if {f"{metric}/low", f"{metric}/high"} <= values.keys()
    }


def _counter(row: Row, key: str, most: int) -> int:
    value = row.get(key, math.nan)
    if math.isnan(value):
        return 0
    if not 0 <= value <= most:
        raise ValueError(f"{key} is {value:g}, and may be 0 to {most}")
    return int(value)


def lacks_recipes(record: MergeRecord) -> bool:
    """Whether it has a plain mean, and of none is known which snapshots it merged."""
    return not record.recipes and any(map(_PLAIN.fullmatch, record.views))


def _means(
    views: Iterable[str], window: int, spans: Mapping[str, int], spacing: Spacing | None, more: int
) -> dict[str, tuple[int, int]]:
    """How many snapshots each plain mean holds and what it spans; coefficients of other kinds are not in an export.

    Args:
        views: Their names.
        window: Valid snapshots.
        spans: Steps that they span, where the run said so; an older one did not.
        spacing: How far apart the snapshots were; None: as far as those of a view with a number say.
        more: Snapshots beyond the number of intervals: blocks fill one each.
    """
    named = {view: int(match["number"] or 0) for view in views if (match := _PLAIN.fullmatch(view))}
    told = [spans[view] / (number - more) for view, number in named.items() if number > more and spans.get(view)]
    # a share is exact; a number of steps may be what one came to at the end
    is_told = bool(told) and not (spacing is not None and isinstance(spacing.every, Share))
    found: dict[str, tuple[int, int]] = {}
    for view, number in named.items():
        if view in spans:
            if not number and is_told:
                number = round(spans[view] / told[0]) + more
            elif not number and spacing is not None:
                number = spacing.intervals(spans[view]) + more
            found[view] = number, spans[view]
        elif spacing is not None:
            number = number or window
            found[view] = number, spacing.reach(number - more)
    return found


def _recipes(means: Mapping[str, tuple[int, int]], step: int, more: int) -> Iterator[tuple[str, Recipe]]:
    # one row of snapshots for all: means of one window share them, and intervals that grow are no multiples of one
    reaches = sorted({number - more: span for number, span in means.values() if number > more}.items())
    intervals, spans = [0, *(number for number, _ in reaches)], [0, *(span for _, span in reaches)]
    num_snapshots = 0
    for view, (number, _) in means.items():
        if number > _LARGEST_WINDOW:
            raise ValueError(f"view {view!r} merges {number} snapshots, and a window holds at most {_LARGEST_WINDOW}")
        num_snapshots += number
        if num_snapshots > _MOST_SNAPSHOTS:
            raise ValueError(f"the views at step {step} merge more than {_MOST_SNAPSHOTS:,} snapshots together")
        if number >= 2:
            back = np.interp(np.arange(number)[::-1], intervals, spans)
            yield view, Recipe(tuple(step - round(steps) for steps in back.tolist()), (1 / number,) * number)
