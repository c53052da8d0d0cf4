"""The forecasts that a run was asked for, at each of its merge points.

This module knows the key `forecast` of the configuration and the run's history; how an annealed loss follows from it is
`pretrain_merge.forecast`'s business.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pretrain_merge.cadence import Quantity
from pretrain_merge.callbacks.auto_spans import HALF, further, is_followed, leading, spanning, stepping
from pretrain_merge.config import Forecast, MergeConfig, Settings, View, num_in_full_window
from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast import Calibration, RunHistory, forecast_of, spans
from pretrain_merge.forecast.metrics import which_loss
from pretrain_merge.merging.best_span import nested
from pretrain_merge.records import FORECAST, Expected, MergeRecord, metric_names
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce

_LONGEST = 0.3  # of the steps so far: the lengths that the law was measured up to


class RunForecasts:
    """Forecasts of one run by name.

    Args:
        settings: Of the callback.
        notices: What the user was told already.

    Raises:
        CheckpointError: A calibration cannot be read.
    """

    def __init__(self, settings: Settings, notices: WarnOnce) -> None:
        self._settings = settings
        self._calibrations = {
            name: Calibration.load(Path(forecast.config.calibration)) if forecast.config.calibration else None
            for name, forecast in settings.forecasts.items()
        }
        self._notices = notices
        self._histories: dict[str, RunHistory] = {}  # by metric, on rank 0

    def __bool__(self) -> bool:
        """Whether there is anything to forecast."""
        return bool(self._settings.forecasts)

    @cached_property
    def views(self) -> tuple[View, ...]:
        """Means that only forecasts and the choice of spans need, under the forecasts' name, not saved."""
        config, forecasts = self._settings.config, self._settings.forecasts.values()
        follows = leading(self._settings)
        own = [view for view in self._settings.views if view.kind == "sma"]
        own.sort(key=lambda view: view is not follows)  # one half serves its limit and the forecasts
        needed = {
            number
            for forecast in forecasts
            if forecast.num_intervals is not None
            for number in spans(forecast.num_intervals, window=config.window, average=config.average)
        }
        needed |= set(nested(config.window, config.average)) if self._chooses_spans else set()
        means = [View(f"{FORECAST}/sma{number}", "sma", number) for number in sorted(needed)]
        if follows or any(forecast.num_intervals is None for forecast in forecasts):
            means += [view for view in _halved(own, config) if view not in means]
        measured = {num_in_full_window(view, config) for view in own}
        means = [view for view in means if view.last is None or view.last not in measured]
        return (*means, *map(further, stepping(self._settings)))

    def reads(self, record: MergeRecord | None, age: int) -> bool:
        """Whether anything reads these means at a merge point.

        Args:
            record: Of the merge point before, which says what is measured; None: a run, or a resumed one, begins.
            age: Steps since the last break.
        """
        follows = is_followed(self._settings, age)
        chooses = self._chooses_spans or bool(stepping(self._settings))
        if chooses or record is None:
            return chooses or follows or bool(self)
        has_loss = metric_names.the_loss(record.raw) is not None
        return (follows and has_loss) or any(self._metric(item, record) for item in self._settings.forecasts.values())

    @property
    def _chooses_spans(self) -> bool:
        """Whether a view needs nested means, over more than the half that a limit follows."""
        return bool(spanning(self._settings))

    def of_a_run(self) -> "RunForecasts":
        """The same forecasts, of a run that has no records yet."""
        twin = copy.copy(self)
        twin._histories = {}
        return twin

    def append(self, record: MergeRecord) -> None:
        """The next record of the run, on rank 0; a resumed run begins with those before."""
        for metric in {self._metric(forecast, record) for forecast in self._settings.forecasts.values()} - {None}:
            self._histories.setdefault(str(metric), RunHistory(str(metric)))
        for history in self._histories.values():
            history.append(record)

    def with_forecasts(self, record: MergeRecord) -> MergeRecord:
        """The record of this merge point with its forecasts; what is refused is said once, with the reason. Collective.

        Rank 0 alone has read what a resumed run measured before, and all take what follows from it.
        """
        if not self:
            return record
        expected, refused = ranks.gather(self._asked(record) if ranks.rank() == 0 else ({}, {}))[0]
        for name, reason in refused.items():
            # of those that nobody asked for, the record and the end of the run tell
            if self._settings.forecasts[name].num_intervals is not None:
                self._notices.warn(f"{name} since {record.since}", f"step {record.step}: forecast {name!r}: {reason}")
        refusals = {f"{FORECAST}/{name}": reason for name, reason in refused.items()}
        return replace(record, forecasts=expected, skipped={**record.skipped, **refusals})

    def _asked(self, record: MergeRecord) -> tuple[dict[str, dict[str, Expected]], dict[str, str]]:
        """What is expected by name and metric, and what is refused, by name."""
        self.append(record)
        expected: dict[str, dict[str, Expected]] = {}
        refused: dict[str, str] = {}
        for name, forecast in self._settings.forecasts.items():
            try:
                metric = self._metric(forecast, record) or _refuse_no_loss(record)
                expected[name] = {metric: self._expected(name, forecast, metric, record)}
            except ForecastError as error:
                refused[name] = str(error)
        return expected, refused

    def _metric(self, forecast: Forecast, record: MergeRecord) -> str | None:
        """As it is called in the record; a name that is not there is the history's to refuse."""
        wanted = forecast.config.metric
        return metric_names.the_loss(record.raw) if wanted is None else metric_names.found(wanted, record.raw) or wanted

    def _expected(self, name: str, forecast: Forecast, metric: str, record: MergeRecord) -> Expected:
        config = forecast.config
        return forecast_of(
            self._histories[metric].now(),
            steps=self._steps(forecast, metric, record),
            shape=config.shape,
            kind=config.kind,
            metric=metric,
            coverage=config.coverage,
            calibration=self._calibrations[name],
        ).expected

    def _steps(self, forecast: Forecast, metric: str, record: MergeRecord) -> int:
        """Length of the anneal in steps, also where snapshots are counted in tokens, or their interval grows."""
        intervals, every = forecast.num_intervals, self._settings.cadence.every
        if intervals is None:
            spans = [mean.span for mean in self._histories[metric].now().means_at(-1)]
            # longer ones say less of the run than of how it began
            return round(
                max((span for span in spans if span <= _LONGEST * record.step), default=min(spans, default=1.0))
            )
        if isinstance(every, Quantity) and every.unit == "steps":
            return round(intervals * every.amount)
        taken = max((recipe.steps for recipe in record.recipes.values()), key=len, default=())
        if len(taken) < 2:
            raise ForecastError("no snapshots were merged, so that an interval's length in steps is not known.")
        return max(1, round(intervals * (taken[-1] - taken[0]) / (len(taken) - 1)))


def _halved(own: Sequence[View], config: MergeConfig) -> list[View]:
    """What a forecast that nobody asked for reads, and a limit follows: a mean over half of what the user's own spans.

    One more mean is one more evaluation at each merge point; a quarter would make the forecast hardly better.
    """
    if not own:  # whoever wants other kinds only pays for no mean unasked
        return []
    number = num_in_full_window(own[0], config)
    if number is None:  # its length follows the age of the run, and so must the half of it
        return [View(HALF, "sma", span=(own[0].span or 1.0) / 2)]
    more = int(config.average == "last")
    numbers = spans(number - more, window=config.window, average=config.average)[-2:]
    return [View(f"{FORECAST}/sma{number}", "sma", number) for number in numbers]


def _refuse_no_loss(record: MergeRecord) -> str:
    if not record.raw:
        raise ForecastError("nothing was measured at this merge point. Wait for the next.")
    why, candidates = which_loss(list(record.raw))
    named = f" Name one (forecast: {{now: {{kind: nowcast, metric: {candidates[0]}}}}})," if candidates else ""
    raise ForecastError(f"{why}{named} {'or ask' if named else 'Or ask'} for none (forecast: off).")
