"""The forecasts that a run was asked for, at each of its merge points.

This module knows the key `forecast` of the configuration and the run's history; how an annealed loss follows from it is
`pretrain_merge.forecast`'s business.
"""

import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pretrain_merge.cadence import Quantity
from pretrain_merge.config import Forecast, Settings, View, num_in_full_window
from pretrain_merge.errors import ConfigError, ForecastError
from pretrain_merge.forecast import Calibration, RunHistory, forecast_of, spans
from pretrain_merge.records import FORECAST, Expected, MergeRecord
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce


class RunForecasts:
    """Forecasts of one run by name.

    Args:
        settings: Of the callback.
        notices: What the user was told already.

    Raises:
        CheckpointError: A calibration cannot be read.
        ConfigError: A view has the name of a mean that the forecasts need.
    """

    def __init__(self, settings: Settings, notices: WarnOnce) -> None:
        self._settings = settings
        self._calibrations = {
            name: Calibration.load(Path(forecast.config.calibration)) if forecast.config.calibration else None
            for name, forecast in settings.forecasts.items()
        }
        taken = {view.name for view in settings.views} & {view.name for view in self.views}
        if taken:
            raise ConfigError(
                f"views: {', '.join(sorted(taken))} names another mean than the forecasts need under that name. "
                f"Choose another name for the view."
            )
        self._notices = notices
        self._histories = self._empty()  # on rank 0

    def __bool__(self) -> bool:
        """Whether there is anything to forecast."""
        return bool(self._settings.forecasts)

    @cached_property
    def views(self) -> tuple[View, ...]:
        """Views that only the forecasts need: nested spans of the window, measured and not saved."""
        config = self._settings.config
        measured = {num_in_full_window(view, config) for view in self._settings.views if view.kind == "sma"}
        needed = {
            number
            for forecast in self._settings.forecasts.values()
            for number in spans(forecast.num_intervals, window=config.window, average=config.average)
        }
        return tuple(View(f"sma{number}", "sma", number) for number in sorted(needed - measured))

    def of_a_run(self) -> "RunForecasts":
        """The same forecasts, of a run that has no records yet."""
        twin = copy.copy(self)
        twin._histories = self._empty()
        return twin

    def append(self, record: MergeRecord) -> None:
        """The next record of the run, on rank 0; a resumed run begins with those before."""
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
            self._notices.warn(f"{name} since {record.since}", f"step {record.step}: forecast {name!r}: {reason}")
        refusals = {f"{FORECAST}/{name}": reason for name, reason in refused.items()}
        return replace(record, forecasts=expected, skipped={**record.skipped, **refusals})

    def _empty(self) -> dict[str, RunHistory]:
        metrics = {forecast.config.metric for forecast in self._settings.forecasts.values()}
        return {metric: RunHistory(metric) for metric in metrics}

    def _asked(self, record: MergeRecord) -> tuple[dict[str, dict[str, Expected]], dict[str, str]]:
        """What is expected by name and metric, and what is refused, by name."""
        self.append(record)
        expected: dict[str, dict[str, Expected]] = {}
        refused: dict[str, str] = {}
        for name, forecast in self._settings.forecasts.items():
            try:
                expected[name] = {forecast.config.metric: self._expected(name, forecast, record)}
            except ForecastError as error:
                refused[name] = str(error)
        return expected, refused

    def _expected(self, name: str, forecast: Forecast, record: MergeRecord) -> Expected:
        config = forecast.config
        return forecast_of(
            self._histories[config.metric].now(),
            steps=self._steps(forecast, record),
            shape=config.shape,
            kind=config.kind,
            metric=config.metric,
            coverage=config.coverage,
            calibration=self._calibrations[name],
        ).expected

    def _steps(self, forecast: Forecast, record: MergeRecord) -> int:
        """Length of the anneal in steps, also where snapshots are counted in tokens, or their interval grows."""
        intervals, every = forecast.num_intervals, self._settings.cadence.every
        if isinstance(every, Quantity) and every.unit == "steps":
            return round(intervals * every.amount)
        taken = max((recipe.steps for recipe in record.recipes.values()), key=len, default=())
        if len(taken) < 2:
            raise ForecastError("no snapshots were merged, so that an interval's length in steps is not known.")
        return max(1, round(intervals * (taken[-1] - taken[0]) / (len(taken) - 1)))
