"""The configuration: every key, its default, and what is refused.

One schema stands behind four doors: Python arguments, an OmegaConf YAML file, LightningCLI and Hydra. This package
knows keys and values; it knows no tensors, no trainer and no files but the YAML it is asked to read.
"""

from pretrain_merge.config.build import (
    build,
    merge_cadence,
    parse_settings,
    parse_window_settings,
    save_cadence,
    snapshot_cadence,
)
from pretrain_merge.config.forecasts import num_intervals, parse_forecasts
from pretrain_merge.config.reading import did_you_mean, read, refuse_misfits
from pretrain_merge.config.schema import (
    AUTO,
    EXTRAPOLATED,
    EXTRAPOLATED_SPAN,
    FORECAST_KINDS,
    FORECAST_SHAPES,
    LONGEST_SPAN,
    SPAN,
    USUAL_SPAN,
    BreakConfig,
    ForecastConfig,
    MergeConfig,
    ParametersConfig,
    SaveConfig,
    WindowConfig,
)
from pretrain_merge.config.settings import Forecast, Settings, WindowSettings
from pretrain_merge.config.views import View, num_in_full_window, parse_views

__all__ = [
    "AUTO",
    "EXTRAPOLATED",
    "EXTRAPOLATED_SPAN",
    "FORECAST_KINDS",
    "FORECAST_SHAPES",
    "LONGEST_SPAN",
    "SPAN",
    "USUAL_SPAN",
    "BreakConfig",
    "Forecast",
    "ForecastConfig",
    "MergeConfig",
    "ParametersConfig",
    "SaveConfig",
    "Settings",
    "View",
    "WindowConfig",
    "WindowSettings",
    "build",
    "did_you_mean",
    "merge_cadence",
    "num_in_full_window",
    "num_intervals",
    "parse_forecasts",
    "parse_settings",
    "parse_views",
    "parse_window_settings",
    "read",
    "refuse_misfits",
    "save_cadence",
    "snapshot_cadence",
]
