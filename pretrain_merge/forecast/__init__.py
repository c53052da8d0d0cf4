"""Forecast the loss that an anneal would reach, with an interval, from what a run's merges have measured.

The parts, in the order of the data: `history` (which records may be read, kept as `points`), `curves` (raw and merged
loss by step and span, with what `noise` each mean keeps), `law` (what they say of an anneal), `calibration` (what that
counts, and how wrong it is) and `fitting` (where a calibration comes from). This package reads records: it knows no
tensors, no trainer and no logger.
"""

from pretrain_merge.forecast.anneal import Annealed, Forecast, calibrate, forecast_anneal, forecast_of, spans
from pretrain_merge.forecast.calibration import Calibration
from pretrain_merge.forecast.history import RunHistory

__all__ = ["Annealed", "Calibration", "Forecast", "RunHistory", "calibrate", "forecast_anneal", "forecast_of", "spans"]
