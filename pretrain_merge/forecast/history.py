"""What the records say of one loss at constant learning rate: raw, and means over nested spans, by step.

This module knows which records may be read together, and refuses those that would give a wrong forecast. It knows no
law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast.metrics import refuse_what_is_not_a_loss
from pretrain_merge.forecast.noise import MEMORY, Floats, added_by_sampling, left_by_mean
from pretrain_merge.forecast.points import Mean, Points
from pretrain_merge.records import MergeRecord, is_plain, span_of

_LR_TOLERANCE = 1e-3  # the callback's default for a break


@dataclass(frozen=True)
class History:
    """Merge points that may be read together, oldest first, in columns; at least one.

    Attributes:
        steps: Where they lie.
        raw: Losses of the live model.
        means: By field of `points.Mean`, by mean (shortest first) and by point.
        num_means: How many of each point's means may be read.
        num_merges: How many merge points these stand for, since long stretches are thinned.
        average: What a snapshot is: "last" or "block".
        why_short: Why no older point belongs to them; empty: there is none.
        is_drifting: Whether the rate had changed at the merge point before, too: a slow decay, not a step of it.
    """

    steps: Floats
    raw: Floats
    means: Floats
    num_means: NDArray[np.intp]
    num_merges: int
    average: str
    why_short: str = ""
    is_drifting: bool = False

    def means_at(self, index: int) -> list[Mean]:
        """The means of one point, shortest first."""
        return [Mean(*mean) for mean in self.means[:, : self.num_means[index], index].T.tolist()]


class RunHistory:
    """The merge points of one run as they come. What it keeps, and what a forecast reads of it, has a bound.

    Args:
        metric: The loss.
    """

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._newest: MergeRecord | None = None
        self._names: set[str] = set()
        self._is_ordered = True
        self._points = Points(0)
        self._num_merges = 0
        self._constant_from = 0  # a step from which on phase and rate were surely those of now
        self._why_short = ""
        self._num_changes = 0  # merge points one after another at which the rate was another than before

    def append(self, record: MergeRecord) -> None:
        """The next merge point."""
        before, self._newest = self._newest, record
        self._names.add(record.name)
        self._is_ordered &= before is None or before.step < record.step
        is_changed = before is not None and before.phase == record.phase and not _has_same_rate(before, record)
        self._num_changes = self._num_changes + 1 if is_changed else 0
        if before is None or not _belongs(before, record):
            self._points, self._num_merges = Points(len(record.lr)), 0
            # where the change was told not to be a break, it lies somewhere between the two
            is_unseen = before is not None and before.step > record.since
            self._constant_from = record.step if is_unseen else record.since
            self._why_short = "" if before is None else _why_short(before.phase, before.step, before.lr, record)
        if self._metric in record.raw:
            self._points.append(record.step, record.raw[self._metric], record.lr, partial(_means, record, self._metric))
            self._num_merges += 1

    def now(self) -> History:
        """The merge points that belong to the newest one: at its learning rate, since its last break.

        Raises:
            ForecastError: No record, several runs, a metric that nobody measured, or one that is not a loss.
        """
        newest = self._newest
        if newest is None:
            raise ForecastError("there are no merges yet. A forecast reads the records of a run's merge points.")
        if len(self._names) > 1 or not self._is_ordered:
            raise ForecastError(
                f"the records are of {sorted(self._names)}, or not in the order of their steps. Give those of one run."
            )
        if self._metric not in newest.raw:
            known = ", ".join(sorted(newest.raw)) or "nothing"
            raise ForecastError(f"metric {self._metric!r} was not measured at step {newest.step}. Measured: {known}.")
        history = self._at_one_rate(newest)
        refuse_what_is_not_a_loss(history, self._metric)
        return history

    def _at_one_rate(self, newest: MergeRecord) -> History:
        """Each rate is within the tolerance of the one before; over many a slow decay leaves it all the same."""
        steps, raw, means = self._points.columns()
        other = np.flatnonzero(~_is_same_rate(self._points.lr, np.array(newest.lr)[:, None]).all(axis=0))
        first = int(other[-1]) + 1 if len(other) else 0
        constant_from, why_short, num_merges = self._constant_from, self._why_short, self._num_merges
        if first:
            constant_from, num_merges = int(steps[first]), len(steps) - first
            lr = tuple(self._points.lr[:, first - 1].tolist())
            why_short = _why_short(newest.phase, int(steps[first - 1]), lr, newest)
        # a longer mean begins earlier: those that begin in time are the first few
        num_means = np.count_nonzero(means[_START, :, first:] >= constant_from, axis=0)
        return History(
            steps[first:],
            raw[first:],
            means[:, :, first:],
            num_means,
            num_merges,
            newest.average,
            why_short,
            is_drifting=self._num_changes > 1,
        )


_START = Mean._fields.index("start")


def read_history(records: Sequence[MergeRecord], metric: str) -> History:
    """The merge points that belong to the newest one: at its learning rate, since its last break.

    Args:
        records: Merge points of one run, oldest first.
        metric: The loss.

    Raises:
        ForecastError: No record, several runs, a metric that nobody measured, or one that is not a loss.
    """
    history = RunHistory(metric)
    for record in records:
        history.append(record)
    return history.now()


def _belongs(record: MergeRecord, newest: MergeRecord) -> bool:
    same_kind = (record.phase, record.average, len(record.lr)) == (newest.phase, newest.average, len(newest.lr))
    if not same_kind or record.step <= newest.since:
        return False
    return _has_same_rate(record, newest)


def _has_same_rate(record: MergeRecord, other: MergeRecord) -> bool:
    if record.lr == other.lr:  # at nearly all merge points
        return True
    return len(record.lr) == len(other.lr) and bool(_is_same_rate(np.array(record.lr), np.array(other.lr)).all())


def _is_same_rate(rates: Floats, others: Floats) -> NDArray[np.bool_]:
    largest = np.maximum(np.abs(rates), np.abs(others))
    same: NDArray[np.bool_] = np.abs(rates - others) <= _LR_TOLERANCE * largest
    return same


def _why_short(phase: str, step: int, lr: Sequence[float], newest: MergeRecord) -> str:
    """Why an older record, of this phase, step and rate, does not belong to the newest one."""
    if phase != newest.phase:
        return f"a new phase, {newest.phase!r}, began after step {step}"
    if step <= newest.since:
        return f"there was a break at step {newest.since}"
    return f"the learning rate was {_listed(lr)} at step {step} and is {_listed(newest.lr)} now"


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))


def _means(record: MergeRecord, metric: str) -> list[Mean]:
    plain = {view: recipe for view, recipe in record.recipes.items() if is_plain(recipe)}
    before = max((recipe.steps[-2] for recipe in plain.values()), default=0)
    found: dict[float, Mean] = {}
    for view, recipe in plain.items():
        # a sweep also merges every second checkpoint: over the same span such a mean has more noise, and would take the
        # place of the run's own; a mean of longer blocks has not
        is_sparser = record.average == "last" and recipe.steps[-2] != before
        if metric in record.views.get(view, {}) and not is_sparser:
            span, number = span_of(recipe.steps, record.average), len(recipe.steps)
            kept = left_by_mean(span / MEMORY) + added_by_sampling(span, number, record.average)
            found[span] = Mean(span, recipe.steps[-1] - span, record.views[view][metric], number, kept)
    return sorted(found.values())
