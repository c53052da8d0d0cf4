"""The configuration: every key, its default, and what is refused.

One schema stands behind four doors: Python arguments, an OmegaConf YAML file, LightningCLI and Hydra. This package
knows keys and values; it knows no tensors, no trainer and no files but the YAML it is asked to read.
"""

from pretrain_merge.config.build import build, merge_cadence, save_cadence, snapshot_cadence
from pretrain_merge.config.forecasts import num_intervals, parse_forecasts
from pretrain_merge.config.reading import did_you_mean
from pretrain_merge.config.schema import (
    FORECAST_KINDS,
    FORECAST_SHAPES,
    BreakConfig,
    ForecastConfig,
    MergeConfig,
    ParametersConfig,
    SaveConfig,
    WindowConfig,
)
from pretrain_merge.config.views import View, parse_views

__all__ = [
    "FORECAST_KINDS",
    "FORECAST_SHAPES",
    "BreakConfig",
    "ForecastConfig",
    "MergeConfig",
    "ParametersConfig",
    "SaveConfig",
    "View",
    "WindowConfig",
    "build",
    "did_you_mean",
    "merge_cadence",
    "num_intervals",
    "parse_forecasts",
    "parse_views",
    "save_cadence",
    "snapshot_cadence",
]
