"""What one merge and its evaluation produced: one dataclass, the names of its metrics, and its line of JSON.

This module is the border between what measures (evaluation) and what shows (loggers, plots, forecasts): those read
records and nothing else. It knows no tensors, no trainer and no logger.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from pretrain_merge.files import untrusted

if TYPE_CHECKING:
    import msgspec

RAW = "raw"
FORECAST = "forecast"
GAP_CLOSED = "gap_closed"
EVALUATION = "evaluation"
SPAN = "span"
AT_END = "at_end"
_END = "step"  # of a forecast: where its anneal ends
# what may hold numbers that JSON has no word for; elsewhere "NaN" is a text
_WITH_FLOATS = {"spread", "raw", "views", "forecasts", "choices", "lr", "timing"}
_EVEN = 1e-9  # coefficients of a plain mean differ by rounding only
_LARGEST = 2**63  # of a counter; Python would read any number of digits
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


def span_of(steps: Sequence[int], average: str) -> float:
    """Steps between the oldest and the newest snapshot; block means reach one interval further back.

    >>> span_of((100, 200, 300), "last"), span_of((100, 200, 300), "block")
    (200.0, 300.0)
    """
    between = float(steps[-1] - steps[0])
    return between * len(steps) / (len(steps) - 1) if average == "block" and len(steps) > 1 else between


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


def is_plain(recipe: Recipe) -> bool:
    """Whether it is a plain mean of two snapshots or more."""
    even = 1.0 / len(recipe.steps) if recipe.steps else 0.0
    return len(recipe.steps) >= 2 and all(abs(coefficient - even) < _EVEN for coefficient in recipe.coefficients)


@dataclass(frozen=True)
class Choice:
    """What nested means say of the span, for a view that chooses its own at the next merge point; or of the step.

    Attributes:
        span: Over which a plain mean is best, in steps; of an `extrapolated` view, what it spanned.
        regret: By how much of the loss the mean over the whole window is above the best one, or what was merged above
            the model a little further.
        step: How far an `extrapolated` view goes, in distances between its two means; None: of other views.
    """

    span: float
    regret: float
    step: float | None = None


@dataclass(frozen=True)
class MergeRecord:
    """Everything that is known of one merge point.

    Attributes:
        name: Name of the `ModelMerging` instance; prefix of its metrics.
        step: Step of the merge point; `samples` and `tokens` are the counters at that step, over all ranks.
        window: Valid snapshots at the merge point.
        spread: Relative RMS distance of the valid snapshots from their mean, dimensionless.
        raw: Metrics of the live model.
        views: Metrics of each merged view, on the same batches as `raw`; means that only forecasts read are among them
            as `forecast/sma<number>`.
        recipes: How each view was made.
        skipped: Views that were not made at this point, forecasts (`forecast/<name>`), and evaluations that failed
            (`evaluation/<view>`, or `evaluation/<view>/<evaluator>`), with the reason.
        forecasts: What forecasts expect, by their name and the metric.
        choices: For each view that chooses its span, what this merge point says of it.
        lr: Learning rate that the last step used, per parameter group.
        phase: Name given to the last `mark_phase`, or empty.
        refused: Non-finite snapshots refused since the start of the run.
        spikes: Spikes of the training loss since the start of the run.
        since: Step of the last break; 0: none. Records before it say nothing of this stretch.
        why_since: What that break was, or empty.
        withdrawn: By the names of their folders, why saved merges were taken back: by the last spike that took any, and
            earlier ones that are on disk yet.
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
    choices: Mapping[str, Choice] = field(default_factory=dict)
    lr: tuple[float, ...] = ()
    phase: str = ""
    refused: int = 0
    spikes: int = 0
    since: int = 0
    why_since: str = ""
    withdrawn: Mapping[str, str] = field(default_factory=dict)
    average: str = "last"
    slot_dtype: str = ""
    timing: Mapping[str, float] = field(default_factory=dict)

    @property
    def shown(self) -> dict[str, Metrics]:
        """Metrics of the views that the user asked for: without the means that only forecasts read."""
        return {view: metrics for view, metrics in self.views.items() if not view.startswith(f"{FORECAST}/")}

    @property
    def num_failed(self) -> int:
        """Evaluations that failed at this merge point."""
        return sum(key.startswith(f"{EVALUATION}/") for key in self.skipped)

    def metrics(self) -> dict[str, float]:
        """The record as flat metrics: `merge/raw/val_loss`, `merge/sma/val_loss`, `merge/step`, …"""
        counters = {"step": self.step, "window": self.window, "spread": self.spread}
        counters |= {"tokens": self.tokens} if self.tokens else {}  # 0: the run does not count them
        counters |= {"failed": self.num_failed} if self.num_failed else {}
        counters |= {"spikes": self.spikes} if self.spikes else {}
        named = {f"{self.name}/{key}": float(value) for key, value in counters.items()}
        for model, values in {RAW: self.raw, **self.views}.items():
            named |= {metric_name(self.name, model, metric): float(value) for metric, value in values.items()}
        for view, recipe in self.recipes.items():
            named[metric_name(self.name, view, SPAN)] = span_of(recipe.steps, self.average)
        for view, choice in self.choices.items():
            best = ("best_span", choice.span) if choice.step is None else ("best_step", choice.step)
            named |= {metric_name(self.name, view, key): value for key, value in (best, ("regret", choice.regret))}
        for forecast, expected in self.forecasts.items():
            for metric, value in expected.items():
                key = metric_name(self.name, f"{FORECAST}/{forecast}", metric)
                named |= {key: value.mean, f"{key}/low": value.low, f"{key}/high": value.high}
                named[metric_name(self.name, f"{FORECAST}/{forecast}", _END)] = float(value.step)
        for view, shares in gaps_closed(self).items():
            named |= {metric_name(self.name, view, f"{GAP_CLOSED}/{name}"): share for name, share in shares.items()}
        return named

    def metrics_to_come(self) -> dict[int, dict[str, float]]:
        """What is expected of anneals that end later, by the step where they do: `merge/forecast/<name>/at_end/…`.

        There a forecast lies beside what the run came to, and can be held against it.
        """
        ahead: dict[int, dict[str, float]] = {}
        for forecast, expected in self.forecasts.items():
            for metric, value in expected.items():
                if value.step > self.step:
                    key = metric_name(self.name, f"{FORECAST}/{forecast}/{AT_END}", metric)
                    named = {key: value.mean, f"{key}/low": value.low, f"{key}/high": value.high}
                    ahead.setdefault(value.step, {f"{self.name}/step": float(value.step)}).update(named)
        return ahead

    def to_json(self) -> str:
        """One line of JSON. Non-finite numbers become the strings "NaN", "Infinity" and "-Infinity"."""
        return json.dumps(_spell_out_non_finite(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> "MergeRecord":
        """The inverse of `to_json`.

        Raises:
            ValueError: The line is not JSON, or not one of our records: a value is missing, of another type than its
                annotation names, or a counter that no run reaches.
        """
        line = line.encode() if isinstance(line, str) else line
        record = _decoded(line)
        if not _has_counters(record):
            raise ValueError("a counter is out of range")
        return record


def _decoded(line: bytes) -> MergeRecord:
    # imported here: a machine that only merges reads no records
    import msgspec

    try:
        # a resumed run reads 100,000 lines, and hardly one of them holds such a number
        if b'"NaN"' not in line and b'Infinity"' not in line:
            return _decoder().decode(untrusted.of_few_values(line))
        values = untrusted.parse_json(line)
        if isinstance(values, dict):
            values |= {key: _read_non_finite(values[key]) for key in _WITH_FLOATS & values.keys()}
        return msgspec.convert(values, MergeRecord)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"{error}: {line[:80]!r}") from error


@cache
def _decoder() -> "msgspec.json.Decoder[MergeRecord]":
    import msgspec

    return msgspec.json.Decoder(MergeRecord)


def gaps_closed(record: MergeRecord) -> dict[str, dict[str, float]]:
    """How much of the way from raw to a forecast each view has gone: `(raw - view) / (raw - forecast)`, of one metric.

    0 is no better than raw, 1 as good as the anneal that is expected, below 0 worse than raw. A share is given only
    where the forecast's whole interval is below raw: else the way itself is not known to be one, and its length, by
    which the share is divided, may be anything down to 0.

    Returns:
        By view and forecast. A forecast is of one metric, a loss.
    """
    shares: dict[str, dict[str, float]] = {}
    for name, expected in record.forecasts.items():
        for metric, value in expected.items():
            raw = record.raw.get(metric, math.nan)
            if not (value.high < raw and value.mean < raw and math.isfinite(raw - value.mean)):
                continue
            for view, measured in record.shown.items():
                if metric in measured:
                    shares.setdefault(view, {})[name] = (raw - measured[metric]) / (raw - value.mean)
    return shares


def metric_name(name: str, model: str, metric: str) -> str:
    """The name under which every logger gets a metric.

    >>> metric_name("merge", "sma", "val_loss")
    'merge/sma/val_loss'
    """
    return f"{name}/{model}/{metric}"


def _has_counters(record: MergeRecord) -> bool:
    counters = [record.step, record.samples, record.tokens, record.window, record.refused, record.since, record.spikes]
    for metrics in record.forecasts.values():
        counters += [expected.step for expected in metrics.values()]
    for recipe in record.recipes.values():
        counters += recipe.steps
    return min(counters) >= 0 and max(counters) < _LARGEST


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
