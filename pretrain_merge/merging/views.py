"""From a named view to a merge: which snapshots of the window, and how much of each, or why not now.

This module knows names, counts and coefficients. It knows no tensors and no stores.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pretrain_merge import coefficients
from pretrain_merge.cadence import Cadence, Progress
from pretrain_merge.config import EXTRAPOLATED, SPAN, View, did_you_mean
from pretrain_merge.errors import CoefficientError, ConfigError, WindowNotReadyError
from pretrain_merge.records import FORECAST, Recipe, span_of
from pretrain_merge.window.window import Snapshot, Window

_SMALLEST = 2  # snapshots of a view that takes all there are
# Steps, what the default share allows at step 250; it was measured from 200 on. Younger stretches are judged by
# nobody, and a limit of fewer steps would merge models that hardly differ.
ALWAYS_ALLOWED = 15


class Merge(NamedTuple):
    """What is merged.

    Attributes:
        snapshots: Oldest first.
        recipe: Their steps, and how much of each.
    """

    snapshots: tuple[Snapshot, ...]
    recipe: Recipe


class Views:
    """The views of a configuration. Each is resolved once per state of the window, however often it is asked for.

    Args:
        views: As configured.
        cadence: When snapshots are due; coefficients that depend on time see the counter of its unit.
        average: What a snapshot is: "last" or "block".
    """

    def __init__(self, views: Iterable[View], cadence: Cadence, average: str = "last") -> None:
        self._views = {view.name: view for view in views}
        self._cadence = cadence
        self._average = average
        self._chosen: Mapping[str, float] = {}  # shares of views that choose their span, steps of those that go on
        self._resolved: dict[str, Merge | str] = {}
        self._state: tuple[object, ...] = ()  # of the window and the counters that `_resolved` is of

    @property
    def names(self) -> tuple[str, ...]:
        """Of all views, as they were configured."""
        return tuple(self._views)

    def choose(self, chosen: Mapping[str, float]) -> None:
        """From now on `auto` views span these shares of the steps since the last break; `extrapolated` ones go so far.

        One that is not named does what it begins with.
        """
        if chosen != self._chosen:
            self._chosen, self._state = dict(chosen), ()

    def resolve(self, name: str, window: Window, now: Progress, *, num_lost: int = 0) -> Merge:
        """The merge that a view is now.

        Args:
            name: Of the view.
            window: The snapshots.
            now: Counters of the last step, from which on further snapshots will come.
            num_lost: Intervals from now on that will give no snapshot, since they were not seen from their start.

        Raises:
            WindowNotReadyError: It cannot be merged now; says why, since when, and when it will be ready.
            ConfigError: No view of this name is configured.
        """
        if name not in self._views:
            known = ", ".join(self._views)
            raise ConfigError(f"view {name!r} is not configured{did_you_mean(name, self._views)} Configured: {known}.")
        state = (window.segment, window.newest, window.num_valid, now, num_lost)
        if state != self._state:
            self._resolved, self._state = {}, state
        if name not in self._resolved:
            self._resolved[name] = self._resolve(name, window.valid, now, window, num_lost)
        found = self._resolved[name]
        if isinstance(found, str):
            raise WindowNotReadyError(found)
        return found

    def _resolve(
        self, name: str, valid: tuple[Snapshot, ...], now: Progress, window: Window, num_lost: int
    ) -> Merge | str:
        view = self._views[name]
        if len(valid) < self._num_needed(name):
            return self._why_too_few(name, valid, now, window, num_lost)
        chosen = self._within(view, valid[-(view.last or window.size) :], window.since)
        # counted from the last break, of which some kinds take a share
        unit = self._cadence.every.unit
        times = [item.progress.count(unit) - window.since.count(unit) for item in chosen]
        params = dict(view.params)
        if view.kind == EXTRAPOLATED and name in self._chosen:
            params["step"] = self._chosen[name]
        try:
            weights = coefficients.compute(view.kind, len(chosen), times=times, **params)
        except CoefficientError as error:  # a kind that asks for even spacing, say
            return f"view {name!r}: {error}"
        return Merge(chosen, Recipe(tuple(item.progress.step for item in chosen), weights))

    def _within(self, view: View, valid: tuple[Snapshot, ...], since: Progress) -> tuple[Snapshot, ...]:
        """The newest snapshots that span at most a share of the steps since the last break, two at least.

        A function of steps alone, so that a resumed run chooses as the run before would have.
        """
        if view.span is None:
            return valid
        steps = [item.progress.step for item in valid]
        age = steps[-1] - since.step
        chosen = None if view.kind == EXTRAPOLATED else self._chosen.get(view.name)
        # a mean over half of another's share is half as long from the start
        least = ALWAYS_ALLOWED * min(1.0, view.span / SPAN)
        at_most = max(view.span * age, least) if chosen is None else chosen * age

        def spanned(index: int) -> float:
            return span_of(steps[index:], self._average)

        first = bisect_left(range(len(steps) - _SMALLEST), True, key=lambda index: spanned(index) <= at_most)
        # a limit is kept; what was chosen as the best is met as nearly as snapshots allow, the losses being alike
        if chosen is not None and first and spanned(first - 1) * spanned(first) < at_most**2:
            first -= 1
        return valid[first:]

    def _why_too_few(self, name: str, valid: tuple[Snapshot, ...], now: Progress, window: Window, num_lost: int) -> str:
        needed = self._num_needed(name)
        steps = f" (steps {valid[0].progress.step} to {valid[-1].progress.step})" if valid else ""
        since = (
            f" since the break at step {window.last_break.step} ({window.last_break.reason})"
            if window.last_break
            else ""
        )
        due = self._cadence.due_after(now, times=needed - len(valid) + num_lost, since=window.since)
        ready = f"step {due.amount}" if due.unit == "steps" else str(due)
        asked_for = [other for other in self._views if not other.startswith(f"{FORECAST}/")]
        others = [repr(other) for other in asked_for if len(valid) >= self._num_needed(other)]
        ready_now = f"; {', '.join(others)} {'is' if len(others) == 1 else 'are'} ready now" if others else ""
        return (
            f"view {name!r} needs {needed} snapshots and the window holds {len(valid)}{steps}{since}. "
            f"It will be ready at {ready}{ready_now}."
        )

    def _num_needed(self, name: str) -> int:
        return self._views[name].last or _SMALLEST
