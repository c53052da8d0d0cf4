"""Views that choose their span: by which nested mean was best at the merge point before.

A choice is read off the last record and used at the next merge point. So the number that a view reports is not the
smallest of several that were tried at that very point, nothing is stored beside the records, and a resumed run, which
reads them, chooses as the run before would have. This module knows records; the parabola is `best_span`'s business.
"""

from collections.abc import Mapping
from dataclasses import replace

from pretrain_merge.cadence import Progress, Quantity, Share
from pretrain_merge.config import Settings
from pretrain_merge.merging.best_span import best_span, nested
from pretrain_merge.records import Choice, MergeRecord, is_plain, metric_names, span_of
from pretrain_merge.runtime import ranks

_LEAST_CHOICES = 5  # of fewer, the smallest and the largest say little
_TYPICAL = (0.1, 0.9)  # quantiles that "spans of 8% to 12%" stands for


class AutoSpans:
    """The choices of one run.

    Args:
        settings: Of the callback.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._views = [view for view in settings.views if view.is_auto]
        self._last: MergeRecord | None = None  # on rank 0, where a resumed run reads its records
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
                self._shares[name].append(choice.span / (record.step - record.since))

    def shares(self, since: Progress) -> Mapping[str, float]:
        """The share of the steps since the last break that each view is to span now, the same on all ranks. Collective.

        Args:
            since: The last break. What was best before it says nothing of this stretch.
        """
        if not self._views:
            return {}
        is_known = self._last is not None and self._last.since == since.step
        return ranks.gather({name: found[-1] for name, found in self._shares.items() if found and is_known})[0]

    def advice(self) -> str | None:
        """One line for the end of a run: which spans were best, and which window would reach them. Of rank 0."""
        for name, shares in self._shares.items():
            if len(shares) >= _LEAST_CHOICES and self._last is not None:
                return self._advice(name, sorted(shares), self._last.step - self._last.since)
        return None

    def _choices(self, record: MergeRecord) -> dict[str, Choice]:
        """By view; one is not there where its metric was not measured on any mean."""
        config = self._settings.config
        numbers = nested(config.window, config.average)
        # no other means: the choice before would be among them, and two that are close tell noise
        means = {
            name: span_of(recipe.steps, record.average)
            for name, recipe in record.recipes.items()
            if is_plain(recipe) and len(recipe.steps) in numbers
        }
        found: dict[str, Choice] = {}
        for view in self._views:
            wanted = view.metric or metric_names.the_loss(record.raw) or ""
            metric = metric_names.found(wanted, record.raw) or wanted
            losses = {span: record.views[name][metric] for name, span in means.items() if metric in record.views[name]}
            best = best_span(losses)
            if best is not None and record.step > record.since:
                found[view.name] = Choice(best.span, losses[max(losses)] / best.loss - 1.0 if best.loss else 0.0)
        return found

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
