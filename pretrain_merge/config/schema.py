"""Every key and its default: the one schema of Python arguments, YAML, LightningCLI and Hydra. It checks nothing."""

from dataclasses import dataclass, field
from typing import Any

AVERAGES = ("last", "block")
BATCH_NORMS = ("refuse", "live", "merge")
ON_ERROR = ("raise", "warn")
ON_MISSING = ("error", "refill")
STORES = ("auto", "device", "host", "disk")
SLOT_DTYPES = ("float32", "bfloat16", "float16")
MODES = ("min", "max")
AUTO = "auto"
EXTRAPOLATED = "extrapolated"
FORECAST_KINDS = ("forecast", "nowcast")
FORECAST_SHAPES = ("linear", "cosine", "1-sqrt")
# A plain mean was best over 8 to 13% of the steps so far at large learning rates, where half of that costs .1 to .2% of
# the loss; over 3% at small ones, where 12% was up to 1% above raw and 6% below it from a quarter of the run on. So a
# view begins between the two, where it is never far wrong, and what it measures moves it.
SPAN = 0.06
USUAL_SPAN = 0.1  # towards which `auto` leans: best over the steps so far, dense or sparse, at every ordinary rate
LONGEST_SPAN = 0.12  # beyond it no rate gained anything
EXTRAPOLATED_SPAN = 0.2  # two means one behind the other, each over the tenth that is best for one alone


@dataclass
class BreakConfig:
    """What ends the stretch of snapshots that may be merged with each other.

    Attributes:
        lr: A change of any parameter group's learning rate beyond `lr_tolerance`. Off for decay runs.
        spikes: A spike of the training loss.
        distrust: Steps before a spike whose snapshots are dropped; null: 100, or 5% of what the window spans where that
            is more.
    """

    lr: bool = True
    spikes: bool = True
    distrust: int | None = None


@dataclass
class ParametersConfig:
    """Which of the parameters that train are merged, by patterns (as in fnmatch) of their names.

    Attributes:
        include: Those that may be merged.
        exclude: Those that are not, although included: they stay raw in every evaluation. One name of a tied parameter
            is enough.
    """

    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)


@dataclass
class SaveConfig:
    """Which merged models are written to disk.

    Attributes:
        every: Save every view at the first merge point after each multiple; null: no periodic saves.
        keep: How many periodic saves of each view stay on disk.
        best: Metric whose best merged model, over all views, is kept; null: none.
        mode: Whether `best` means the smallest ("min") or the largest ("max") value.
        raw: Save the raw model, too, wherever `every` or `at_end` saves views.
        at_end: When training ends, save every view that the newest snapshots allow.
    """

    every: Any = None
    keep: int = 1
    best: str | None = None
    mode: str = "min"
    raw: bool = False
    at_end: bool = False


@dataclass
class ForecastConfig:
    """One forecast of an annealed metric.

    Attributes:
        steps: Length D of the anneal, in the unit of `every`; null: what the full window spans.
        shape: Of the anneal: "linear", "cosine" or "1-sqrt".
        kind: "forecast": the anneal starts now. "nowcast": it started D ago and ends now; the window must span it.
        metric: A loss that is measured at the merge points; null: the only one with "loss" in its name, or
            `val_loss`, also where it is spelt `val/loss`.
        coverage: Share of truths that the interval is to hold, 0.5 to 0.95.
        calibration: A file that `Calibration.save` wrote; null: the calibration that ships.
    """

    steps: Any = None
    shape: str = "linear"
    kind: str = "forecast"
    metric: str | None = None
    coverage: float = 0.9
    calibration: str | None = None


@dataclass
class WindowConfig:
    """Which snapshots are taken, kept and merged. All that `RollingMerger` needs.

    Attributes:
        window: How many snapshots are kept, oldest dropped first; 2 to 10000.
        every: Interval V between snapshots: 1000, "1000 steps", "8B tokens", "2e6 samples"; or a share of the run since
            its last break, which grows with it: "1%", "1% of tokens".
        start: No snapshot before this point.
        merge_every: Merge at the first snapshot at or after each multiple; null: at every snapshot.
        views: Named merges: a kind ("sma"), a kind with a number of newest snapshots ("sma4"), or a mapping with
            `name`, `kind`, optionally `last` or `span`, and the parameters of the kind.
        span: A view that names no number of snapshots takes the newest that span at most this share of the run since
            its last break: 0.06, "6%"; "auto": a share that follows what the run measures, 6% at first and 12% at most;
            null: all that are valid.
        average: "last": a snapshot is the model after the step that filled the interval; "block": the mean of the
            models in the interval.
        sample_every: With "block": steps between the models that enter the mean.
        lr_tolerance: Relative change of a learning rate that counts as a break.
        breaks: What counts as a break.
        parameters: Which parameters are merged, by name.
        merge_buffers: Patterns (as in fnmatch) of float buffers that are merged like parameters.
        batch_norm: Running statistics of BatchNorm: "refuse" such models, keep them "live", or "merge" them.
        store: Where snapshots lie: "device", "host", "disk", or "auto", which chooses by free memory.
        store_folder: Where a disk store writes; null: none (`ModelMerging`: `window/` in the run's folder).
        slot_dtype: Dtype of snapshots where smaller than the parameter's: "bfloat16", "float16"; null: the parameter's.
    """

    window: int = 10
    every: Any = "1000 steps"
    start: Any = 0
    merge_every: Any = None
    views: list[Any] = field(default_factory=lambda: ["sma"])
    span: Any = AUTO
    average: str = "last"
    sample_every: int = 1
    lr_tolerance: float = 1e-3
    breaks: BreakConfig = field(default_factory=BreakConfig)
    parameters: ParametersConfig = field(default_factory=ParametersConfig)
    merge_buffers: list[str] = field(default_factory=list)
    batch_norm: str = "refuse"
    store: str = "auto"
    store_folder: str | None = None
    slot_dtype: str | None = None


@dataclass
class MergeConfig(WindowConfig):
    """The whole configuration of `ModelMerging`.

    Attributes:
        tokens_per_batch: Tokens of one batch on one rank: a number, or the key of the batch whose elements are counted.
        save: Which merged models are written to disk.
        forecast: Forecasts by name, each with the keys of `ForecastConfig`; "auto": of an anneal that ends now, and of
            one that starts now, over what the longest mean spans; null: none.
        validate: Evaluate on the Trainer's validation loaders at merge points.
        stateful_data: Validation data that carry a position of their own: "refuse", or "iterate" them all the same.
        on_error: What a failing evaluation does: "raise", or "warn" and go on with what could be measured.
        window_folder: Where the snapshots that checkpoints need are kept; null: `window/` in the run's folder.
        keep_windows: Of how many checkpoints, the newest, the windows are kept; null: of all that exist.
        on_missing: When a resumed run's window cannot be restored: "error", or "refill", which starts an empty one.
        on_publish: A command that is run beside training for each saved model, with {folder}, {step} and {view};
            numbers that it prints as JSON are recorded and logged at that step. null: none.
        on_publish_timeout: Seconds that one such command may take, and that the end of a run waits for those left.
        verbose: Say one line at each merge, besides those at the start and the end of a run.
        name: Prefix of metrics and folders; two instances in one Trainer need two names.
    """

    tokens_per_batch: Any = "input_ids"
    save: SaveConfig = field(default_factory=SaveConfig)
    forecast: Any = AUTO
    validate: bool = True
    stateful_data: str = "refuse"
    on_error: str = "raise"
    window_folder: str | None = None
    keep_windows: int | None = None
    on_missing: str = "error"
    on_publish: str | None = None
    on_publish_timeout: float = 3600.0
    verbose: bool = False
    name: str = "merge"
