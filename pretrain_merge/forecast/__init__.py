"""Forecast the loss that an anneal would reach, with an interval, from what a run's merges have measured.

The parts, in the order of the data: `history` (which records may be read), `curves` (raw and merged loss by step and
span), `law` (what they say of an anneal), `calibration` (what that counts, and how wrong it is) and `fitting` (where a
calibration comes from). This package reads records: it knows no tensors, no trainer and no logger.
"""

from pretrain_merge.forecast.anneal import Annealed, Forecast, calibrate, forecast_anneal, spans
from pretrain_merge.forecast.calibration import Calibration

__all__ = ["Annealed", "Calibration", "Forecast", "calibrate", "forecast_anneal", "spans"]
