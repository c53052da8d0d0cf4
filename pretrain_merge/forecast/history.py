"""What the records say of one loss at constant learning rate: raw, and means over nested spans, by step.

This module knows which records may be read together, and refuses those that would give a wrong forecast. It knows no
law.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pretrain_merge.errors import ForecastError
from pretrain_merge.records import MergeRecord, Recipe

_LR_TOLERANCE = 1e-3
_RISE = 0.002  # of a loss over the whole stretch: more is no noise of a merged model
_NO_LOSS = re.compile(
    r"(^|[^a-z])(acc|accuracy|f1|auc|auroc|bleu|rouge|ppl|perplexity|score|em)([^a-z]|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class Mean:
    """The loss of a plain mean of snapshots.

    Attributes:
        loss: Of the mean model.
        number: Snapshots in it.
    """

    loss: float
    number: int


@dataclass(frozen=True)
class Point:
    """One merge point.

    Attributes:
        step: Where it lies.
        raw: Loss of the live model.
        means: Means by the steps that they span, shortest first.
    """

    step: int
    raw: float
    means: Mapping[float, Mean]


@dataclass(frozen=True)
class History:
    """Merge points that may be read together, oldest first.

    Attributes:
        points: At least one.
        average: What a snapshot is: "last" or "block".
        why_short: Why no older point belongs to them; empty: there is none.
    """

    points: tuple[Point, ...]
    average: str
    why_short: str = ""


def read_history(records: Sequence[MergeRecord], metric: str) -> History:
    """The merge points that belong to the newest one: at its learning rate, since its last break.

    Args:
        records: Merge points of one run, oldest first.
        metric: The loss.

    Raises:
        ForecastError: No record, several runs, a metric that nobody measured, or one that is no loss.
    """
    if not records:
        raise ForecastError("there are no merges yet. A forecast reads the records of a run's merge points.")
    names = sorted({record.name for record in records})
    if len(names) > 1 or any(a.step >= b.step for a, b in pairwise(records)):
        raise ForecastError(f"the records are of {names}, or not in the order of their steps. Give those of one run.")
    if metric not in records[-1].raw:
        known = ", ".join(sorted(records[-1].raw)) or "nothing"
        raise ForecastError(f"metric {metric!r} was not measured at step {records[-1].step}. Measured: {known}.")
    stretch, constant_from = _newest_stretch(records)
    points = tuple(
        Point(record.step, record.raw[metric], _means(record, metric, constant_from))
        for record in stretch
        if metric in record.raw
    )
    _refuse_what_is_no_loss(points, metric)
    older = records[len(records) - len(stretch) - 1] if len(stretch) < len(records) else None
    return History(points, records[-1].average, _why_short(older, records[-1]) if older else "")


def span_of(recipe: Recipe, average: str) -> float:
    """Steps between the oldest and the newest snapshot; block means reach one interval further back."""
    between = recipe.steps[-1] - recipe.steps[0]
    return between * len(recipe.steps) / (len(recipe.steps) - 1) if average == "block" else float(between)


def _newest_stretch(records: Sequence[MergeRecord]) -> tuple[Sequence[MergeRecord], int]:
    """The records of the newest one's rate, phase and segment, and a step from which on the rate was surely theirs."""
    newest = records[-1]
    first = len(records) - 1
    while first > 0 and _belongs(records[first - 1], newest):
        first -= 1
    unseen = first > 0 and records[first - 1].step > newest.since  # a change that was told not to be a break
    return records[first:], records[first].step if unseen else newest.since


def _belongs(record: MergeRecord, newest: MergeRecord) -> bool:
    same_kind = (record.phase, record.average, len(record.lr)) == (newest.phase, newest.average, len(newest.lr))
    rates = zip(record.lr, newest.lr, strict=True) if same_kind else ()
    same_rate = all(abs(a - b) <= _LR_TOLERANCE * max(abs(a), abs(b)) for a, b in rates)
    return same_kind and same_rate and record.step > newest.since


def _why_short(older: MergeRecord, newest: MergeRecord) -> str:
    if older.phase != newest.phase:
        return f"a new phase, {newest.phase!r}, began after step {older.step}"
    if older.step <= newest.since:
        return f"there was a break at step {newest.since}"
    return f"the learning rate was {_listed(older.lr)} at step {older.step} and is {_listed(newest.lr)} now"


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))


def _means(record: MergeRecord, metric: str, constant_from: int) -> dict[float, Mean]:
    found = {
        span_of(recipe, record.average): Mean(record.views[view][metric], len(recipe.steps))
        for view, recipe in record.recipes.items()
        if metric in record.views.get(view, {})
        and _is_plain(recipe)
        and _start(recipe, record.average) >= constant_from
    }
    return dict(sorted(found.items()))


def _is_plain(recipe: Recipe) -> bool:
    even = 1.0 / len(recipe.steps)
    return len(recipe.steps) >= 2 and all(abs(value - even) < 1e-9 for value in recipe.coefficients)


def _start(recipe: Recipe, average: str) -> float:
    return recipe.steps[-1] - span_of(recipe, average)


def _refuse_what_is_no_loss(points: Sequence[Point], metric: str) -> None:
    if _NO_LOSS.search(metric):
        raise ForecastError(
            f"metric {metric!r} is no loss by its name. The law holds for a loss such as cross entropy: smaller is "
            f"better, and above 0. Measure and name one (of a perplexity, its logarithm)."
        )
    values = [value for point in points for value in (point.raw, *(mean.loss for mean in point.means.values()))]
    bad = next((value for value in values if not (math.isfinite(value) and value > 0.0)), None)
    if bad is not None:
        raise ForecastError(f"metric {metric!r} was {bad!r}, and a loss is above 0 and finite. Name another metric.")
    merged = [min(mean.loss for mean in point.means.values()) for point in points if point.means]
    if len(merged) > 2 and not merged[-1] <= merged[0] * (1.0 + _RISE):
        raise ForecastError(
            f"metric {metric!r} of the merged model rose from {merged[0]:.6g} to {merged[-1]:.6g} between steps "
            f"{points[0].step} and {points[-1].step}: no loss, or a run that diverges. Name a metric that falls."
        )
