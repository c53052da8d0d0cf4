"""The forecasts that a run was asked for, at each of its merge points.

This module knows the key `forecast` of the configuration and keeps the run's records; how an annealed loss follows from
records is `pretrain_merge.forecast`'s business.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pretrain_merge.cadence import Quantity
from pretrain_merge.config import ForecastConfig, MergeConfig, num_intervals, parse_forecasts, parse_views
from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast import Calibration, forecast_anneal, spans
from pretrain_merge.records import FORECAST, Expected, MergeRecord
from pretrain_merge.runtime.log import Notices


class RunForecasts:
    """Forecasts of one run by name.

    Args:
        config: The whole configuration.
        notices: What the user was told already.
    """

    def __init__(self, config: MergeConfig, notices: Notices) -> None:
        self._forecasts = parse_forecasts(config)
        self._calibrations = {
            name: Calibration.load(Path(forecast.calibration)) if forecast.calibration else None
            for name, forecast in self._forecasts.items()
        }
        self._config = config
        self._notices = notices
        self._history: list[MergeRecord] = []

    def __bool__(self) -> bool:
        """Whether there is anything to forecast."""
        return bool(self._forecasts)

    @cached_property
    def views(self) -> list[str]:
        """Views that only the forecasts need: nested spans of the window, measured and not saved."""
        config = self._config
        measured = {view.last or config.window for view in parse_views(config) if view.kind == "sma"}
        needed = {
            number
            for forecast in self._forecasts.values()
            for number in spans(num_intervals(config, forecast), window=config.window, average=config.average)
        }
        return [f"sma{number}" for number in sorted(needed - measured)]

    def go_on_from(self, records: Sequence[MergeRecord]) -> None:
        """The records of a resumed run so far."""
        self._history = list(records)

    def added_to(self, record: MergeRecord) -> MergeRecord:
        """The record of this merge point with its forecasts; what is refused is said once, with the reason."""
        if not self._forecasts:
            return record
        self._history.append(record)
        expected: dict[str, dict[str, Expected]] = {}
        refused: dict[str, str] = {}
        for name, forecast in self._forecasts.items():
            try:
                expected[name] = {forecast.metric: self._expected(name, forecast)}
            except ForecastError as error:
                refused[f"{FORECAST}/{name}"] = str(error)
                self._notices.once(f"{name} since {record.since}", f"step {record.step}: forecast {name!r}: {error}")
        return replace(record, forecasts=expected, skipped={**record.skipped, **refused})

    def _expected(self, name: str, forecast: ForecastConfig) -> Expected:
        return forecast_anneal(
            self._history,
            steps=self._steps(forecast),
            shape=forecast.shape,
            kind=forecast.kind,
            metric=forecast.metric,
            coverage=forecast.coverage,
            calibration=self._calibrations[name],
        ).expected

    def _steps(self, forecast: ForecastConfig) -> int:
        """Length of the anneal in steps, also where snapshots are counted in tokens or samples."""
        intervals = num_intervals(self._config, forecast)
        every = Quantity.parse(self._config.every)
        if every.unit == "steps":
            return round(intervals * every.amount)
        taken = max((recipe.steps for recipe in self._history[-1].recipes.values()), key=len, default=())
        if len(taken) < 2:
            raise ForecastError("no snapshots were merged, so that an interval's length in steps is not known.")
        return max(1, round(intervals * (taken[-1] - taken[0]) / (len(taken) - 1)))
