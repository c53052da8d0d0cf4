"""Which merge of a sweep is best, and by how much more than chance.

This module knows records and averages. Every view is compared with raw, and with the best view, at the same merge
points; neighbouring points share snapshots, so their differences count as fewer than there are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pretrain_merge.errors import ConfigError
from pretrain_merge.records import MergeRecord

_LEAST = 3  # points, below which a standard error says nothing


@dataclass(frozen=True)
class Difference:
    """A mean difference over merge points.

    Attributes:
        mean: In the unit of the metric; positive: better.
        standard_error: Of the mean; NaN: too few points.
        num_points: Merge points.
    """

    mean: float
    standard_error: float
    num_points: int

    @property
    def in_errors(self) -> float:
        """The mean in standard errors; NaN where there is none."""
        return self.mean / self.standard_error if self.standard_error > 0 else math.nan

    @property
    def absolute(self) -> "Difference":
        """Its size, for a sentence that says in which direction."""
        return replace(self, mean=abs(self.mean))

    def to_plain(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN."""
        numbers = {"mean": self.mean, "standard_error": self.standard_error}
        return {key: value if math.isfinite(value) else None for key, value in numbers.items()} | {
            "points": self.num_points
        }

    def __str__(self) -> str:
        return f"{self.mean:.3g}" + ("" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2g}")


@dataclass(frozen=True)
class Comparison:
    """The views of a sweep by one metric.

    Attributes:
        metric: Its name.
        best: The view that is best on average.
        gains: By view, the best first, how much better than raw.
        next: The second best view; empty: there is only one.
        margin: How much better the best is than the next.
        left_out: Views that were made at so few points that with them hardly a point was left to compare at.
    """

    metric: str
    best: str
    gains: dict[str, Difference]
    next: str
    margin: Difference
    left_out: tuple[str, ...] = ()

    @property
    def is_clear(self) -> bool:
        """Whether the margin is above two standard errors."""
        return self.margin.in_errors > 2.0


def compare(records: Sequence[MergeRecord], metric: str, *, larger_is_better: bool) -> Comparison:
    """Compare the views at those points at which all that were made at last were made.

    Where these are fewer than a standard error takes, the views that are made at the fewest points are left out.

    Args:
        records: Of a sweep, oldest first.
        metric: A metric that they hold.
        larger_is_better: Its sense.

    Raises:
        ConfigError: No record holds it for a view.
    """
    sign = 1.0 if larger_is_better else -1.0
    measured = [record for record in records if metric in record.raw]
    views = next((list(found) for record in reversed(measured) if (found := _holding(record, metric))), [])
    if not views:
        known = sorted({name for record in records for name in record.raw})
        raise ConfigError(f"metric: {metric!r} was not measured of a merge. Measured: {', '.join(known) or 'nothing'}.")
    # a view that is ready late would else be judged on later, lower losses
    points, left_out = _common(measured, metric, views)
    views = [view for view in views if view not in left_out]
    gains = {
        view: difference([sign * (record.views[view][metric] - record.raw[metric]) for record in points])
        for view in views
    }
    # NaN is never the best
    ranked = sorted(gains, key=lambda view: -gains[view].mean if not math.isnan(gains[view].mean) else math.inf)
    # a plain mean over the whole window may be the very same merge as another view, and is no rival of it
    rivals = [view for view in ranked[1:] if any(_differ(record, ranked[0], view) for record in points)]
    margin = (
        difference([sign * (record.views[ranked[0]][metric] - record.views[rivals[0]][metric]) for record in points])
        if rivals
        else Difference(math.nan, math.nan, 0)
    )
    return Comparison(
        metric, ranked[0], {view: gains[view] for view in ranked}, rivals[0] if rivals else "", margin, left_out
    )


def difference(values: Sequence[float]) -> Difference:
    """The mean and its standard error, as of a series of the lag-one autocorrelation r.

    Such a series of n values tells as much as `n (1 - r) / (1 + r)` independent ones.

    >>> difference([1.0, 2.0, 1.0, 2.0]).mean
    1.5
    """
    number = len(values)
    mean = math.fsum(values) / number
    left = [value - mean for value in values]
    squares = math.fsum(value * value for value in left)
    if number < _LEAST or not squares > 0.0:
        return Difference(mean, math.nan, number)
    products = math.fsum(first * second for first, second in pairwise(left))
    seen = products / squares
    # a short series shows less of it than there is (Kendall, Biometrika 41, 1954)
    correlation = min(max(0.0, seen + (1.0 + 3.0 * seen) / number), 1.0 - 1.0 / number)
    independent = number * (1.0 - correlation) / (1.0 + correlation)
    return Difference(mean, math.sqrt(squares / (number - 1) / independent), number)


def _common(
    measured: Sequence[MergeRecord], metric: str, views: Sequence[str]
) -> tuple[list[MergeRecord], tuple[str, ...]]:
    """The points that views have in common, and the views that were left out so that there are enough of these."""
    held = [set(_holding(record, metric)) for record in measured]
    made = {view: sum(view in found for found in held) for view in views}
    left_out: list[str] = []
    while True:
        points = [record for record, found in zip(measured, held, strict=True) if made.keys() <= found]
        fewest = min(made.values())
        # to leave out a view helps only where others were made more often
        if len(points) >= _LEAST or fewest == max(made.values()):
            return points, tuple(left_out)
        rare = [view for view, number in made.items() if number == fewest]
        left_out += rare
        made = {view: number for view, number in made.items() if view not in rare}


def _holding(record: MergeRecord, metric: str) -> list[str]:
    return [view for view, metrics in record.views.items() if metric in metrics]


def _differ(record: MergeRecord, view: str, other: str) -> bool:
    return record.recipes.get(view) != record.recipes.get(other)
