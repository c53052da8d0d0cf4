"""Views that choose what they span, or how far they go beyond, by the losses of means at the merge point before.

There are three kinds. `auto` spans what nested means say is best. A view whose `span` is "auto", as it is by default,
has a limit that moves a little at each merge point: to longer where the mean over it was better than the mean over half
of it, to shorter where it was worse. One mean more tells which, and forecasts read that one anyway. An `extrapolated`
view moves its step in the same way, by one more model that is a little further out.

A choice is read off the last record and used at the next merge point. So the number that a view reports is not the
smallest of several that were tried at that very point, nothing is stored beside the records, and a resumed run, which
reads them, chooses as the run before would have. This module knows records; what follows from losses is `best_span`'s
business.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from pretrain_merge.cadence import Progress, Quantity, Share
from pretrain_merge.config import EXTRAPOLATED, LONGEST_SPAN, SPAN, USUAL_SPAN, Settings, View
from pretrain_merge.merging.best_span import NOTCH, best_span, followed, nested, stepped
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.merging.views import ALWAYS_ALLOWED
from pretrain_merge.records import FORECAST, Choice, MergeRecord, is_plain, metric_names, span_of
from pretrain_merge.runtime import ranks

HALF = f"{FORECAST}/sma"  # the view over half of what the leading one spans
# Steps of a stretch: in a younger one the first limit does not yet bound what is always allowed. So short a mean hardly
# differs from its half, and the run moves faster than a limit could follow.
_FOLLOWED_FROM = round(ALWAYS_ALLOWED / SPAN)
_LEAST_CHOICES = 5  # of fewer, the smallest and the largest say little
_TYPICAL = (0.1, 0.9)  # quantiles that "spans of 8% to 12%" stands for


def leading(settings: Settings) -> View | None:
    """The view whose losses move the limit of all that follow: the first plain mean of them; None: none moves."""
    return next((view for view in settings.views if view.follows and view.kind == "sma"), None)


def is_followed(settings: Settings, age: int) -> bool:
    """Whether a limit moves at so many steps since the last break."""
    return leading(settings) is not None and age >= _FOLLOWED_FROM


def spanning(settings: Settings) -> list[View]:
    """The views that choose their span by nested means."""
    return [view for view in settings.views if view.is_auto and view.kind != EXTRAPOLATED]


def stepping(settings: Settings) -> list[View]:
    """The views that choose how far they extrapolate."""
    return [view for view in settings.views if view.is_auto and view.kind == EXTRAPOLATED]


def further(view: View) -> View:
    """The model one notch beyond that of an `extrapolated` view, which tells whether to go there."""
    return replace(view, name=_further(view.name), params={"step": NOTCH})


class AutoSpans:
    """The choices of one run.

    Args:
        settings: Of the callback.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._views, self._stepping = spanning(settings), stepping(settings)
        self._leading = leading(settings)
        self._last: MergeRecord | None = None  # on rank 0, where a resumed run reads its records
        self._now: Mapping[str, float] = {}  # what views span, or their step, at this merge point, on all ranks
        self._shares: dict[str, list[float]] = {view.name: [] for view in self._views}

    def with_choices(self, record: MergeRecord) -> MergeRecord:
        """The record of this merge point with what it says of the next."""
        record = replace(record, choices=self._choices(record))
        self.append(record)
        return record

    def append(self, record: MergeRecord) -> None:
        """The next record of the run; a resumed run begins with those before, on rank 0."""
        self._last = record
        for name, choice in record.choices.items():
            if name in self._shares:
                self._shares[name].append(_share(choice, record))

    def tell(self, merger: RollingMerger) -> RollingMerger:
        """Let the views of a merger span what was chosen for them; returns it. Collective."""
        merger.span(self.shares(merger.window.since))
        return merger

    def shares(self, since: Progress) -> Mapping[str, float]:
        """The share of the steps since the last break that each view is to span now, or its step. Collective.

        The same on all ranks.

        Args:
            since: The last break. What was best before it says nothing of this stretch.
        """
        if self._views or self._stepping or self._leading is not None:
            self._now = ranks.gather(self._known(since.step))[0]
        return self._now

    def advice(self) -> str | None:
        """One line for the end of a run: which spans were best, and which window would reach them. Of rank 0."""
        for name, shares in self._shares.items():
            if len(shares) >= _LEAST_CHOICES and self._last is not None:
                return self._advice(name, sorted(shares), self._last.step - self._last.since)
        return None

    def _known(self, since: int) -> dict[str, float]:
        """What the last record says; nothing where it is of another stretch."""
        if self._last is None or self._last.since != since:
            return {}
        record = self._last
        known = {name: _share(choice, record) for name, choice in record.choices.items()}
        found = {name: known[name] for name in self._shares if name in known}
        if self._leading is not None and self._leading.name in known:
            limit = known[self._leading.name]
            found |= {view.name: limit for view in self._settings.views if view.follows}
            found[HALF] = limit / 2.0
        for view in self._stepping:
            step = record.choices[view.name].step if view.name in record.choices else None
            found |= {view.name: step, _further(view.name): step + NOTCH} if step is not None else {}
        return found

    def _choices(self, record: MergeRecord) -> dict[str, Choice]:
        """By view; one is not there where its metric was not measured on any mean."""
        if record.step <= record.since:
            return {}
        chosen = {view.name: self._best(view, record) for view in self._views}
        chosen |= {view.name: self._stepped(view, record) for view in self._stepping}
        if self._leading is not None and is_followed(self._settings, record.step - record.since):
            chosen[self._leading.name] = self._moved(self._leading, record)
        return {name: choice for name, choice in chosen.items() if choice is not None}

    def _best(self, view: View, record: MergeRecord) -> Choice | None:
        """The span that is best by nested means."""
        config = self._settings.config
        numbers = nested(config.window, config.average)
        # no other means: the choice before would be among them, and two that are close tell noise
        means = {
            name: span_of(recipe.steps, record.average)
            for name, recipe in record.recipes.items()
            if is_plain(recipe) and len(recipe.steps) in numbers
        }
        metric = _metric(view, record)
        losses = {span: record.views[name][metric] for name, span in means.items() if metric in record.views[name]}
        best = best_span(losses, usual=USUAL_SPAN * (record.step - record.since))
        if best is None:
            return None
        # a span that leans towards the usual one may be expected a little above the best that was read
        return Choice(best.span, max(0.0, losses[max(losses)] / best.loss - 1.0) if best.loss else 0.0)

    def _moved(self, view: View, record: MergeRecord) -> Choice | None:
        """The limit moved by whether the mean within it was better than the mean over half, or than raw."""
        recipe, half, metric = record.recipes.get(view.name), record.recipes.get(HALF), _metric(view, record)
        if recipe is None or half is None:
            return None
        # two snapshots have no half: the live model is the mean over none
        shorter = (record.views[HALF] if half != recipe else record.raw).get(metric, math.nan)
        loss = record.views[view.name].get(metric, math.nan)
        age = record.step - record.since
        used = span_of(recipe.steps, record.average) / age
        share = self._now.get(view.name, used)
        if not math.isfinite(loss - shorter):  # an evaluation that failed does not start the limit anew
            return Choice(share * age, 0.0) if view.name in self._now else None
        following = followed(share, used, is_better_longer=loss < shorter, at_most=LONGEST_SPAN)
        least = min(loss, shorter)
        return Choice(following * age, loss / least - 1.0 if least else 0.0)

    def _stepped(self, view: View, record: MergeRecord) -> Choice | None:
        """The step moved by whether the model one notch further was better."""
        if not {view.name, _further(view.name)} <= record.recipes.keys():
            return None
        metric, step = _metric(view, record), self._now.get(view.name, 0.0)
        loss, beyond = (record.views[name].get(metric, math.nan) for name in (view.name, _further(view.name)))
        used = span_of(record.recipes[view.name].steps, record.average)
        if not math.isfinite(loss - beyond):  # what was not measured speaks against going on
            return Choice(used, 0.0, 0.0)
        least = min(loss, beyond)
        return Choice(used, loss / least - 1.0 if least else 0.0, stepped(step, is_better_further=beyond < loss))

    def _advice(self, name: str, shares: list[float], num_steps: int) -> str:
        low, high = (shares[round(quantile * (len(shares) - 1))] for quantile in _TYPICAL)
        middle = shares[len(shares) // 2]
        config, every = self._settings.config, self._settings.cadence.every
        reach = config.window - (config.average == "last")
        fixed = f", or {max(1, round(middle * num_steps / reach))} steps by now" if isinstance(every, Quantity) else ""
        return (
            f"view {name!r}: spans of {low:.2g} to {high:.2g} of the steps since the last break were best here. "
            f'Window {config.window} at every: "{Share.spanning(middle, reach).percent:g}%"{fixed} reaches '
            f"them; it was {every}."
        )


def _metric(view: View, record: MergeRecord) -> str:
    """The loss that a view chooses by, as it is called in the record."""
    wanted = view.metric or metric_names.the_loss(record.raw) or ""
    return metric_names.found(wanted, record.raw) or wanted


def _further(name: str) -> str:
    return f"{FORECAST}/further-{name}"


def _share(choice: Choice, record: MergeRecord) -> float:
    return choice.span / (record.step - record.since)
