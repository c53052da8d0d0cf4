"""The forecasts that a run was asked for, at each of its merge points.

This module knows the key `forecast` of the configuration and the run's history; how an annealed loss follows from it is
`pretrain_merge.forecast`'s business.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pretrain_merge.cadence import Quantity
from pretrain_merge.config import ForecastConfig, MergeConfig, num_intervals, parse_forecasts, parse_views
from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast import Calibration, RunHistory, forecast_of, spans
from pretrain_merge.records import FORECAST, Expected, MergeRecord
from pretrain_merge.runtime import ranks
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
        self._histories = {
            forecast.metric: RunHistory(forecast.metric) for forecast in self._forecasts.values()
        }  # on rank 0

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

    def append(self, record: MergeRecord) -> None:
        """The next record of the run, on rank 0; a resumed run begins with those before."""
        for history in self._histories.values():
            history.append(record)

    def added_to(self, record: MergeRecord) -> MergeRecord:
        """The record of this merge point with its forecasts; what is refused is said once, with the reason. Collective.

        Rank 0 alone has read what a resumed run measured before, and all take what follows from it.
        """
        if not self._forecasts:
            return record
        expected, refused = ranks.gather(self._asked(record) if ranks.rank() == 0 else ({}, {}))[0]
        for name, reason in refused.items():
            self._notices.once(f"{name} since {record.since}", f"step {record.step}: forecast {name!r}: {reason}")
        refusals = {f"{FORECAST}/{name}": reason for name, reason in refused.items()}
        return replace(record, forecasts=expected, skipped={**record.skipped, **refusals})

    def _asked(self, record: MergeRecord) -> tuple[dict[str, dict[str, Expected]], dict[str, str]]:
        """What is expected by name and metric, and what is refused, by name."""
        self.append(record)
        expected: dict[str, dict[str, Expected]] = {}
        refused: dict[str, str] = {}
        for name, forecast in self._forecasts.items():
            try:
                expected[name] = {forecast.metric: self._expected(name, forecast, record)}
            except ForecastError as error:
                refused[name] = str(error)
        return expected, refused

    def _expected(self, name: str, forecast: ForecastConfig, record: MergeRecord) -> Expected:
        return forecast_of(
            self._histories[forecast.metric].now(),
            steps=self._steps(forecast, record),
            shape=forecast.shape,
            kind=forecast.kind,
            metric=forecast.metric,
            coverage=forecast.coverage,
            calibration=self._calibrations[name],
        ).expected

    def _steps(self, forecast: ForecastConfig, record: MergeRecord) -> int:
        """Length of the anneal in steps, also where snapshots are counted in tokens or samples."""
        intervals = num_intervals(self._config, forecast)
        every = Quantity.parse(self._config.every)
        if every.unit == "steps":
            return round(intervals * every.amount)
        taken = max((recipe.steps for recipe in record.recipes.values()), key=len, default=())
        if len(taken) < 2:
            raise ForecastError("no snapshots were merged, so that an interval's length in steps is not known.")
        return max(1, round(intervals * (taken[-1] - taken[0]) / (len(taken) - 1)))
