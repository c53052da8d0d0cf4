"""The forecasts that a run was asked for, at each of its merge points.

This module knows the key `forecast` of the configuration and keeps the run's records; how an annealed loss follows from
records is `pretrain_merge.forecast`'s business.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pretrain_merge.config import Forecast, Settings, View
from pretrain_merge.errors import ConfigError, ForecastError
from pretrain_merge.forecast import Calibration, forecast_anneal, spans
from pretrain_merge.records import FORECAST, Expected, MergeRecord
from pretrain_merge.runtime.log import Notices


class RunForecasts:
    """Forecasts of one run by name.

    Args:
        settings: Of the callback.
        notices: What the user was told already.

    Raises:
        CheckpointError: A calibration cannot be read.
        ConfigError: A view has the name of a mean that the forecasts need.
    """

    def __init__(self, settings: Settings, notices: Notices) -> None:
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
        self._history: list[MergeRecord] = []

    def __bool__(self) -> bool:
        """Whether there is anything to forecast."""
        return bool(self._settings.forecasts)

    @cached_property
    def views(self) -> tuple[View, ...]:
        """Views that only the forecasts need: nested spans of the window, measured and not saved."""
        config = self._settings.config
        measured = {view.last or config.window for view in self._settings.views if view.kind == "sma"}
        needed = {
            number
            for forecast in self._settings.forecasts.values()
            for number in spans(forecast.num_intervals, window=config.window, average=config.average)
        }
        return tuple(View(f"sma{number}", "sma", number) for number in sorted(needed - measured))

    def resume_from(self, records: Sequence[MergeRecord]) -> None:
        """The records of a resumed run so far."""
        self._history = list(records)

    def with_forecasts(self, record: MergeRecord) -> MergeRecord:
        """The record of this merge point with its forecasts; what is refused is said once, with the reason."""
        if not self:
            return record
        self._history.append(record)
        expected: dict[str, dict[str, Expected]] = {}
        refused: dict[str, str] = {}
        for name, forecast in self._settings.forecasts.items():
            try:
                expected[name] = {forecast.config.metric: self._expected(name, forecast)}
            except ForecastError as error:
                refused[f"{FORECAST}/{name}"] = str(error)
                self._notices.once(f"{name} since {record.since}", f"step {record.step}: forecast {name!r}: {error}")
        return replace(record, forecasts=expected, skipped={**record.skipped, **refused})

    def _expected(self, name: str, forecast: Forecast) -> Expected:
        config = forecast.config
        return forecast_anneal(
            self._history,
            steps=self._steps(forecast),
            shape=config.shape,
            kind=config.kind,
            metric=config.metric,
            coverage=config.coverage,
            calibration=self._calibrations[name],
        ).expected

    def _steps(self, forecast: Forecast) -> int:
        """Length of the anneal in steps, also where snapshots are counted in tokens or samples."""
        intervals, every = forecast.num_intervals, self._settings.cadence.every
        if every.unit == "steps":
            return round(intervals * every.amount)
        taken = max((recipe.steps for recipe in self._history[-1].recipes.values()), key=len, default=())
        if len(taken) < 2:
            raise ForecastError("no snapshots were merged, so that an interval's length in steps is not known.")
        return max(1, round(intervals * (taken[-1] - taken[0]) / (len(taken) - 1)))
