"""The merge points of one stretch of a run as columns, thinned evenly, so that their number has a bound.

This module knows rows and columns. Which points may be read together is the business of `history`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pretrain_merge.forecast.noise import Floats

# The means of a forecast reach over 0.5% of a run at least: some ten points, and noise is averaged over hundreds.
MOST = 2048
assert MOST % 2 == 0  # so that the newest stays when every other one goes


class Mean(NamedTuple):
    """The loss of a plain mean of snapshots at one merge point.

    Attributes:
        span: Steps that it spans.
        start: The step where it begins; every mean ends at the merge point.
        loss: Of the mean model.
        number: Snapshots in it.
        kept: Share of an iterate's noise that is left in it.
    """

    span: float
    start: float
    loss: float
    number: int
    kept: float


# Stands where a point has fewer means than another: longer than any, begun before any, with a loss like any.
_NONE = np.array(Mean(np.inf, -np.inf, 1.0, 0, 0.0))


class _Newest(NamedTuple):
    """A point that the next one replaces unless it is an n-th; its means are not known yet."""

    step: int
    raw: float
    lr: Sequence[float]
    means: Callable[[], Sequence[Mean]]


class Points:
    """At most `MOST` points and the newest one: every n-th, where n doubles whenever there are too many.

    Args:
        num_rates: Learning rates of each point.
    """

    def __init__(self, num_rates: int) -> None:
        self._every = 1
        self._num_seen = 0
        self._num = 0
        self._newest: _Newest | None = None  # where it is in no column yet
        self._rows = np.empty((2 + num_rates, MOST + 2))  # step, raw loss, learning rates
        self._means = np.empty((len(_NONE), 0, MOST + 2))  # by field, by mean (shortest first), by point

    def append(self, step: int, raw: float, lr: Sequence[float], means: Callable[[], Sequence[Mean]]) -> None:
        """One more point, with a function that gives its means, shortest first: a resumed run needs few of them."""
        if self._num_seen and (self._num_seen - 1) % self._every:
            self._num -= 1  # the one before is the newest no more, and not an n-th
        else:
            self._write_newest()
        self._newest = _Newest(step, raw, lr, means)
        self._num += 1
        self._num_seen += 1
        if self._num > MOST and (self._num_seen - 1) % self._every == 0:
            self._thin()

    def columns(self, first: int = 0) -> tuple[Floats, Floats, Floats]:
        """Steps, raw losses and means of the points from one on; the means by field, by mean and by point."""
        self._write_newest()
        kept = slice(first, self._num)
        return self._rows[0, kept].copy(), self._rows[1, kept].copy(), self._means[:, :, kept].copy()

    @property
    def lr(self) -> Floats:
        """Learning rates by group and point."""
        self._write_newest()
        return self._rows[2:, : self._num]

    def _write_newest(self) -> None:
        newest, self._newest = self._newest, None
        if newest is None:
            return
        means, last = newest.means(), self._num - 1
        if len(means) > self._means.shape[1]:
            more = np.repeat(_NONE[:, None], (len(means) - self._means.shape[1]) * self._means.shape[2], axis=1)
            self._means = np.concatenate([self._means, more.reshape(len(_NONE), -1, self._means.shape[2])], axis=1)
        self._rows[:, last] = newest.step, newest.raw, *newest.lr
        self._means[:, :, last] = _NONE[:, None]
        if means:
            self._means[:, : len(means), last] = np.array(means).T

    def _thin(self) -> None:
        self._write_newest()
        left = range(0, self._num, 2)  # MOST is even, so the newest is among them
        for columns in (self._rows, self._means):
            columns[..., : len(left)] = columns[..., left]
        self._num, self._every = len(left), 2 * self._every
