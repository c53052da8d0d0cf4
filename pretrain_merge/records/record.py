"""What one merge and its evaluation produced: one dataclass, the names of its metrics, and its line of JSON.

This module is the border between what measures (evaluation) and what shows (loggers, plots, forecasts): those read
records and nothing else. It knows no tensors, no trainer and no logger.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

RAW = "raw"
FORECAST = "forecast"
_TYPES = {"name": str, "step": int, "raw": dict, "views": dict}  # what a line must have to be read as a record
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """Which snapshots a merge used, and how much of each.

    Attributes:
        steps: Steps at which the snapshots were taken, oldest first.
        coefficients: Their coefficients, oldest first, float64, summing to 1.
    """

    steps: tuple[int, ...]
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Expected:
    """A forecast of one metric: what is expected, and between which values it lies with the coverage asked for.

    Attributes:
        mean: The metric after the anneal.
        low: Lower end of the interval.
        high: Upper end of the interval.
        step: Where the anneal ends.
    """

    mean: float
    low: float
    high: float
    step: int


@dataclass(frozen=True)
class MergeRecord:
    """Everything that is known of one merge point.

    Attributes:
        name: Name of the `ModelMerging` instance; prefix of its metrics.
        step: Step of the merge point; `samples` and `tokens` are the counters at that step, over all ranks.
        window: Valid snapshots at the merge point.
        spread: Relative RMS distance of the valid snapshots from their mean, dimensionless.
        raw: Metrics of the live model.
        views: Metrics of each merged view, on the same batches as `raw`.
        recipes: How each view was made.
        skipped: Views that were not made at this point, and forecasts (`forecast/<name>`), with the reason.
        forecasts: What forecasts expect, by their name and the metric.
        lr: Learning rate that the last step used, per parameter group.
        phase: Name given to the last `mark_phase`, or empty.
        refused: Non-finite snapshots refused since the start of the run.
        since: Step of the last break; 0: none. Records before it say nothing of this stretch.
        average: What a snapshot is: "last", the model after a step, or "block", the mean of the models since the
            snapshot before.
        slot_dtype: Dtype of the snapshots where it is smaller than the parameters', or empty.
        timing: Wall-clock seconds of the parts. The only field that differs between two equal runs.
    """

    name: str
    step: int
    samples: int
    tokens: int
    window: int
    spread: float
    raw: Metrics
    views: Mapping[str, Metrics]
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    forecasts: Mapping[str, Mapping[str, Expected]] = field(default_factory=dict)
    lr: tuple[float, ...] = ()
    phase: str = ""
    refused: int = 0
    since: int = 0
    average: str = "last"
    slot_dtype: str = ""
    timing: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The record as flat metrics: `merge/raw/val_loss`, `merge/sma/val_loss`, `merge/step`, …"""
        counters = {"step": self.step, "window": self.window, "spread": self.spread}
        counters |= {"tokens": self.tokens} if self.tokens else {}  # 0: the run does not count them
        named = {f"{self.name}/{key}": float(value) for key, value in counters.items()}
        for model, values in {RAW: self.raw, **self.views}.items():
            named |= {metric_name(self.name, model, metric): float(value) for metric, value in values.items()}
        for forecast, expected in self.forecasts.items():
            for metric, value in expected.items():
                key = metric_name(self.name, f"{FORECAST}/{forecast}", metric)
                named |= {key: value.mean, f"{key}/low": value.low, f"{key}/high": value.high}
        return named

    def to_json(self) -> str:
        """One line of JSON. Non-finite numbers become the strings "NaN", "Infinity" and "-Infinity"."""
        return json.dumps(_spell_out_non_finite(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "MergeRecord":
        """The inverse of `to_json`.

        Raises:
            ValueError: The line is not JSON, or not one of our records.
        """
        values = json.loads(line)
        has_our_keys = isinstance(values, dict) and values.keys() <= _known_fields()
        if not has_our_keys or not all(isinstance(values.get(key), type_) for key, type_ in _TYPES.items()):
            raise ValueError(f"not a merge record: {line[:80]!r}")
        # a resumed run reads 100,000 lines, and hardly one of them holds such a number
        read: Callable[[Any], Any] = _read_non_finite if '"NaN"' in line or 'Infinity"' in line else lambda value: value
        recipes = {
            view: Recipe(tuple(recipe["steps"]), tuple(recipe["coefficients"]))
            for view, recipe in values.pop("recipes", {}).items()
        }
        forecasts = {
            name: {metric: Expected(**read(value)) for metric, value in expected.items()}
            for name, expected in values.pop("forecasts", {}).items()
        }
        numbers = read({key: values.pop(key) for key in ("spread", "raw", "views", "lr") if key in values})
        return cls(
            **values | numbers | {"recipes": recipes, "forecasts": forecasts, "lr": tuple(numbers.get("lr", ()))}
        )


@cache
def _known_fields() -> frozenset[str]:
    return frozenset(item.name for item in fields(MergeRecord))


def metric_name(name: str, model: str, metric: str) -> str:
    """The name under which every logger gets a metric.

    >>> metric_name("merge", "sma", "val_loss")
    'merge/sma/val_loss'
    """
    return f"{name}/{model}/{metric}"


def _spell_out_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _spell_out_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_out_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _read_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _read_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_non_finite(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
