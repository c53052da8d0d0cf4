"""Forecast the loss that an anneal would reach, with an interval, from what a run's merges have measured.

The parts, in the order of the data: `history` (which records may be read, kept as `points`), `curves` (raw and merged
loss by step and span, with what `noise` each mean keeps), `quadratic` (what a shape of anneal leaves and gains), `law`
(what they say of an anneal), `calibration` (what that counts, and how wrong it is), `fitting` (where a calibration
comes from), `own_anneals` (one of your own) and `decision` (anneal now or later). This package reads records: it knows
no tensors, no trainer and no logger.
"""

from pretrain_merge.forecast.anneal import Forecast, forecast_anneal, forecast_of, spans
from pretrain_merge.forecast.calibration import Calibration
from pretrain_merge.forecast.decision import Decision, decide
from pretrain_merge.forecast.history import RunHistory, read_history
from pretrain_merge.forecast.metrics import find_metric
from pretrain_merge.forecast.own_anneals import Annealed, calibrate

__all__ = [
    "Annealed",
    "Calibration",
    "Decision",
    "Forecast",
    "RunHistory",
    "calibrate",
    "decide",
    "find_metric",
    "forecast_anneal",
    "forecast_of",
    "read_history",
    "spans",
]
