"""Forecasts of the configuration: which anneal each of them asks about."""

import re
from collections.abc import Mapping
from dataclasses import fields

from pretrain_merge.cadence import Quantity, Share, parse_interval
from pretrain_merge.config.reading import require, typed
from pretrain_merge.config.schema import AUTO, FORECAST_KINDS, FORECAST_SHAPES, ForecastConfig, MergeConfig
from pretrain_merge.config.settings import Forecast
from pretrain_merge.config.views import NAME
from pretrain_merge.errors import ConfigError

_NESTED = re.compile(r"sma[0-9]*")
_OFF = ("off", "null", "none")  # as a command line hands them over; YAML reads them as false and null
# the two questions that the same means answer: what would be here now, and what is to be had from here
_AUTOMATIC = {"now": ForecastConfig(kind="nowcast"), "ahead": ForecastConfig(kind="forecast")}


def parse_forecasts(config: MergeConfig) -> dict[str, Forecast]:
    """The forecasts of a configuration by name, with defaults filled in.

    Raises:
        ConfigError: A name, key or value that is not allowed, or a nowcast longer than the window.
    """
    # `forecast: auto` and `forecast: true` are one word; so are its opposites
    given = config.forecast
    if given is True or given == AUTO:
        return {name: Forecast(forecast, None) for name, forecast in _AUTOMATIC.items()}
    if given is None or given is False or str(given).lower() in _OFF:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"forecast: {given!r} is not a choice of forecasts. Allowed: {AUTO!r}, null or off for none, or a mapping "
            f"from names to their keys, such as {{soon: {{steps: 2000}}}}."
        )
    asked = {name: _parse_forecast(config, name, value) for name, value in given.items()}
    return {name: Forecast(forecast, num_intervals(config, forecast)) for name, forecast in asked.items()}


def num_intervals(config: MergeConfig, forecast: ForecastConfig) -> float:
    """Length of a forecast's anneal as a number of intervals between snapshots; of a growing one, the whole window."""
    every = parse_interval(config.every)
    if forecast.steps is None or isinstance(every, Share):
        # fence posts: N snapshots have N - 1 intervals between, N block means cover N
        return float(config.window - (config.average == "last"))
    return Quantity.parse(forecast.steps).amount / every.amount


def _parse_forecast(config: MergeConfig, name: object, value: object) -> ForecastConfig:
    key = f"forecast.{name}"
    if not isinstance(name, str) or not NAME.fullmatch(name) or _NESTED.fullmatch(name):
        raise ConfigError(
            f"{key}: {name!r} is not a name. Allowed: letters, digits, '_', '.', '-', a letter first, 100 at most; not "
            f"'sma' and a number, under which the means are logged that forecasts read."
        )
    if not isinstance(value, Mapping):
        allowed = ", ".join(item.name for item in fields(ForecastConfig))
        raise ConfigError(f"{key}: {value!r} is not a mapping. Allowed: a mapping with keys of {allowed}.")
    forecast = typed(ForecastConfig, value, at=f"{key}.")
    require(forecast, "kind", lambda kind: kind in FORECAST_KINDS, " or ".join(FORECAST_KINDS), at=f"{key}.")
    require(forecast, "coverage", lambda share: 0.5 <= share <= 0.95, "0.5 to 0.95", at=f"{key}.")
    shapes = " or ".join(FORECAST_SHAPES)
    require(forecast, "shape", lambda shape: shape in FORECAST_SHAPES, shapes, at=f"{key}.")
    every = parse_interval(config.every)
    if isinstance(every, Share):
        if forecast.steps is not None:
            raise ConfigError(
                f"{key}.steps: {forecast.steps!r}, and snapshots are taken every {every}, so that what the window "
                f"spans grows. Leave `steps` out: the anneal is as long as the window spans at each merge."
            )
        return forecast
    steps = every if forecast.steps is None else Quantity.parse(forecast.steps, key=f"{key}.steps")
    if steps.unit != every.unit:
        raise ConfigError(f"{key}.steps: {steps}, and snapshots are counted in {every.unit}. Give the length in these.")
    # a nowcast replays an anneal from snapshots, so it can be no longer than they reach
    most = num_intervals(config, ForecastConfig())
    if forecast.kind == "nowcast" and not 1 <= num_intervals(config, forecast) <= most:
        raise ConfigError(
            f"{key}.steps: {steps}, and a window of {config.window} snapshots every {every} spans from {every} to "
            f"{Quantity(round(most) * every.amount, every.unit)}. Allowed for a nowcast: what the window spans; change "
            f"`window` or `every`."
        )
    return forecast
