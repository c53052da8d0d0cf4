"""Faults of forecasts."""

from tests.mutations.catalogue.fault import Fault

_HISTORY = "tests/forecast/test_history.py"
_FORECAST = "tests/forecast"

FAULTS = (
    Fault(
        "a resumed run computes the means of every record",
        "forecast/points.py",
        "        else:\n            self._write_newest()\n",
        "        self._write_newest()\n",
        _HISTORY,
    ),
    Fault(
        "a forecast does not follow the merged curve",
        "forecast/law.py",
        "terms = [halves, by_shape, -gain, -fall]",
        "terms = [halves, by_shape, -gain, 0.0 * fall]",
        _FORECAST,
    ),
    Fault(
        "an anneal that starts now is read as one that ends now",
        "forecast/law.py",
        'curves.step - steps if kind == "nowcast" else curves.step',
        "curves.step - steps",
        _FORECAST,
    ),
    Fault(
        "records of another learning rate are read",
        "forecast/history.py",
        "_LR_TOLERANCE = 1e-3",
        "_LR_TOLERANCE = 1e3",
        _FORECAST,
    ),
    Fault(
        "records before a break are read",
        "forecast/history.py",
        "if not same_kind or record.step <= newest.since:",
        "if not same_kind:",
        _FORECAST,
    ),
    Fault(
        "the noise that few snapshots leave stays in their mean",
        "forecast/curves.py",
        "way = losses[low, columns] - self.noise",
        "way = losses[low, columns] - 0.0",
        _FORECAST,
    ),
    Fault(
        "a mean between two merge points is read half a span late",
        "forecast/curves.py",
        "way = -(np.maximum(at - span / 2, 0.5) ** -_EXPONENT)",
        "way = -(np.maximum(at, 0.5) ** -_EXPONENT)",
        "tests/forecast/test_curves.py",
    ),
    Fault(
        "a span that was measured at one point alone falls on no more",
        "forecast/curves.py",
        "span = self._followed(span)",
        "span = 1.0 * span",
        "tests/forecast/test_curves.py",
    ),
    Fault(
        "a long run is not thinned, so a forecast costs more at each merge",
        "forecast/points.py",
        "if self._num > MOST and",
        "if self._num > MOST + 10**6 and",
        _HISTORY,
    ),
    Fault(
        "the newest merge of a thinned run is kept as if it were one of every n-th",
        "forecast/points.py",
        "(self._num_seen - 1) % self._every:",
        "False:",
        _HISTORY,
    ),
    Fault(
        "an interval is no wider outside of what was calibrated",
        "forecast/calibration.py",
        "factor = max(1.0, shortest / reading.share, (reading.share / longest) ** 2)",
        "factor = 1.0",
        _FORECAST,
    ),
    Fault(
        "the run to come is taken to be one of those that a calibration knows",
        "forecast/fitting.py",
        "(len(counts) + 1)",
        "len(counts)",
        "tests/system/test_forecast_benchmark.py",
    ),
    Fault(
        "an interval reaches below 0",
        "forecast/calibration.py",
        "return mean * math.exp(-half / mean), mean + half",
        "return mean - half, mean + half",
        _FORECAST,
    ),
    Fault(
        "a sudden drop of the loss is not noticed",
        "forecast/curves.py",
        "return fall, abs(fall - before)",
        "return fall, 0.0 * before",
        _FORECAST,
    ),
    Fault(
        "noise that no means over halves tell of is taken to be none",
        "forecast/law.py",
        "halves = moved = noise * typical_ratio(span)",
        "halves = moved = 0.0",
        _FORECAST,
    ),
    Fault(
        "a slow decay of the rate is told to wait",
        "forecast/history.py",
        "is_drifting=self._num_changes > 1",
        "is_drifting=False",
        _FORECAST,
    ),
    Fault(
        "anneals beyond the lengths of the suite are as sure as within",
        "forecast/calibration.py",
        "return normal * _GAIN * beyond",
        "return 0.0 * normal * _GAIN * beyond",
        _FORECAST,
    ),
    Fault(
        "what an anneal now and one later share blurs which is better",
        "forecast/decision.py",
        "np.abs(late.doubts - soon.doubts)",
        "(late.doubts + soon.doubts)",
        _FORECAST,
    ),
    Fault(
        "one's own anneals count for nothing",
        "forecast/fitting.py",
        "after = before + gain @ (target - terms @ before)",
        "after = before",
        _FORECAST,
    ),
    Fault(
        "means of sparser checkpoints take the place of the run's own",
        "forecast/history.py",
        'record.average == "last" and recipe.steps[-2] != before',
        "False",
        "tests/offline/test_sweep.py",
    ),
)
