"""The configuration schema: every key, its default, and what is refused.

One schema stands behind four doors: Python arguments, an OmegaConf YAML file, LightningCLI and Hydra. This module knows
keys and values; it knows no tensors, no trainer and no files but the YAML it is asked to read. OmegaConf checks names
and types; what it finds is said again in our words: the key's path, what was given, what is allowed.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain_merge import coefficients
from pretrain_merge.cadence import Cadence, Quantity
from pretrain_merge.errors import CoefficientError, ConfigError, nearest
from pretrain_merge.records import FORECAST, RAW

AVERAGES = ("last", "block")
BATCH_NORMS = ("refuse", "live", "merge")
ON_MISSING = ("error", "refill")
STORES = ("auto", "device", "host", "disk")
SLOT_DTYPES = ("float32", "bfloat16", "float16")
MODES = ("min", "max")
FORECAST_KINDS = ("forecast", "nowcast")
FORECAST_SHAPES = ("linear", "cosine", "1-sqrt")
_SHORTHANDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ema": ("ema", {"alpha": 0.2}),  # the better of PMA's two values, early and late
    "wsm": ("decay", {"shape": "1-sqrt"}),  # the shape that WSM (arXiv 2507.17634) found best
}
_RESERVED = (RAW, FORECAST)
_MOST_DIGITS = 9  # of a view's number; Python refuses to read thousands
_LARGEST_WINDOW = 10_000  # beyond what memory holds; trying a view's coefficients takes seconds there
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_ConfigT = TypeVar("_ConfigT")


@dataclass
class BreakConfig:
    """What ends the stretch of snapshots that may be merged with each other.

    Attributes:
        lr: A change of any parameter group's learning rate beyond `lr_tolerance`. Off for decay runs.
    """

    lr: bool = True


@dataclass
class SaveConfig:
    """Which merged models are written to disk.

    Attributes:
        every: Save every view at the first merge point after each multiple; null: no periodic saves.
        keep: How many periodic saves of each view stay on disk.
        best: Metric whose best merged model, over all views, is kept; null: none.
        mode: Whether `best` means the smallest ("min") or the largest ("max") value.
        at_end: When training ends, save every view that the newest snapshots allow.
    """

    every: Any = None
    keep: int = 1
    best: str | None = None
    mode: str = "min"
    at_end: bool = False


@dataclass
class ForecastConfig:
    """One forecast of an annealed metric.

    Attributes:
        steps: Length D of the anneal, in the unit of `every`; null: what the full window spans.
        shape: Of the anneal: "linear", "cosine" or "1-sqrt".
        kind: "forecast": the anneal starts now. "nowcast": it started D ago and ends now; the window must span it.
        metric: A loss that is measured at the merge points.
        coverage: Share of truths that the interval is to hold, 0.5 to 0.95.
    """

    steps: Any = None
    shape: str = "linear"
    kind: str = "forecast"
    metric: str = "val_loss"
    coverage: float = 0.9


@dataclass
class WindowConfig:
    """Which snapshots are taken, kept and merged. All that `RollingMerger` needs.

    Attributes:
        window: How many snapshots are kept, oldest dropped first; 2 to 10000.
        every: Interval V between snapshots: 1000, "1000 steps", "8B tokens", "2e6 samples".
        start: No snapshot before this point.
        merge_every: Merge at the first snapshot at or after each multiple; null: at every snapshot.
        views: Named merges: a kind ("sma"), a kind with a number of newest snapshots ("sma4"), or a mapping with
            `name`, `kind`, optionally `last`, and the parameters of the kind.
        average: "last": a snapshot is the model after the step that filled the interval; "block": the mean of the
            models in the interval.
        sample_every: With "block": steps between the models that enter the mean.
        lr_tolerance: Relative change of a learning rate that counts as a break.
        breaks: What counts as a break.
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
    average: str = "last"
    sample_every: int = 1
    lr_tolerance: float = 1e-3
    breaks: BreakConfig = field(default_factory=BreakConfig)
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
        forecast: Forecasts by name, each with the keys of `ForecastConfig`.
        validate: Evaluate on the Trainer's validation loaders at merge points.
        stateful_data: Validation data that carry a position of their own: "refuse", or "iterate" them all the same.
        window_folder: Where the snapshots that checkpoints need are kept; null: `window/` in the run's folder.
        on_missing: When a resumed run's window cannot be restored: "error", or "refill", which starts an empty one.
        name: Prefix of metrics and folders; two instances in one Trainer need two names.
    """

    tokens_per_batch: Any = "input_ids"
    save: SaveConfig = field(default_factory=SaveConfig)
    forecast: dict[str, Any] = field(default_factory=dict)
    validate: bool = True
    stateful_data: str = "refuse"
    window_folder: str | None = None
    on_missing: str = "error"
    name: str = "merge"


@dataclass(frozen=True)
class View:
    """A named merge: which kind of coefficients, over how many of the newest valid snapshots.

    Attributes:
        name: Name in metrics and folders.
        kind: A kind of `pretrain_merge.coefficients`.
        last: Exactly this many of the newest valid snapshots; None: all that are valid, from 2 up.
        params: Parameters of the kind.
    """

    name: str
    kind: str
    last: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


def build(schema: type[_ConfigT], values: object, *, at: str = "") -> _ConfigT:
    """Check values against a schema and fill in its defaults.

    Args:
        schema: `WindowConfig` or `MergeConfig`.
        values: A mapping, an OmegaConf config, or the path of a YAML file.
        at: Path of the values inside a larger configuration, for messages.

    Raises:
        ConfigError: Unknown key, wrong type or impossible value; the message names the key's path.
    """
    checked = _typed(schema, _read(values), at)
    _refuse_impossible_values(checked)  # type: ignore[arg-type]
    return checked


def snapshot_cadence(config: WindowConfig) -> Cadence:
    """When snapshots are due."""
    return Cadence(
        Quantity.parse(config.every, key="every"), start=Quantity.parse(config.start, key="start", minimum=0)
    )


def merge_cadence(config: WindowConfig) -> Cadence | None:
    """When merges are due; None: at every snapshot once two are held."""
    return None if config.merge_every is None else Cadence(Quantity.parse(config.merge_every, key="merge_every"))


def save_cadence(config: SaveConfig) -> Cadence | None:
    """When merged models are saved periodically; None: never."""
    return None if config.every is None else Cadence(Quantity.parse(config.every, key="save.every"))


def parse_views(config: WindowConfig) -> tuple[View, ...]:
    """The views of a configuration, with shorthands spelled out.

    Raises:
        ConfigError: An unknown kind or parameter, two views of one name, or more snapshots than the window holds.
    """
    views = tuple(_parse_view(value, f"views[{index}]") for index, value in enumerate(config.views))
    names = [view.name for view in views]
    if not views or len(set(names)) < len(names):
        raise ConfigError(f"views: {names} must be at least one view, each with a name of its own; set `name`.")
    for index, view in enumerate(views):
        _try_coefficients(view, config.window, f"views[{index}]")
    return views


def parse_forecasts(config: MergeConfig) -> dict[str, ForecastConfig]:
    """The forecasts of a configuration by name, with defaults filled in.

    Raises:
        ConfigError: A name, key or value that is not allowed, or a nowcast longer than the window.
    """
    return {name: _parse_forecast(config, name, value) for name, value in config.forecast.items()}


def num_intervals(config: MergeConfig, forecast: ForecastConfig) -> float:
    """Length of a forecast's anneal as a number of intervals between snapshots."""
    if forecast.steps is None:
        return float(config.window - (config.average == "last"))
    return Quantity.parse(forecast.steps).amount / Quantity.parse(config.every).amount


def _typed(schema: type[_ConfigT], given: Any, at: str) -> _ConfigT:
    _refuse_misfits(schema, given, at)
    try:
        # objects: the shape of a `decay` view may be a function where the configuration is Python
        overrides = OmegaConf.create(given, flags={"allow_objects": True})
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), overrides))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        path = getattr(error, "full_key", None) or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{at}{path}: {reason}. See the configuration page for the type of each key.") from error
    except RecursionError as error:
        raise ConfigError(_endless(at or "configuration")) from error


def _parse_forecast(config: MergeConfig, name: object, value: object) -> ForecastConfig:
    key = f"forecast.{name}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{key}: {name!r} is no name. Allowed: letters, digits, '_', '.', '-', a letter first.")
    if not isinstance(value, Mapping):
        allowed = ", ".join(item.name for item in fields(ForecastConfig))
        raise ConfigError(f"{key}: {value!r} is no mapping. Allowed: a mapping with keys of {allowed}.")
    forecast = _typed(ForecastConfig, value, f"{key}.")
    _require(forecast, "kind", lambda kind: kind in FORECAST_KINDS, " or ".join(FORECAST_KINDS), at=f"{key}.")
    _require(forecast, "coverage", lambda share: 0.5 <= share <= 0.95, "0.5 to 0.95", at=f"{key}.")
    shapes = " or ".join(FORECAST_SHAPES)
    _require(forecast, "shape", lambda shape: shape in FORECAST_SHAPES, shapes, at=f"{key}.")
    every = Quantity.parse(config.every, key="every")
    steps = every if forecast.steps is None else Quantity.parse(forecast.steps, key=f"{key}.steps")
    if steps.unit != every.unit:
        raise ConfigError(f"{key}.steps: {steps}, and snapshots are counted in {every.unit}. Give the length in these.")
    most = num_intervals(config, ForecastConfig())
    if forecast.kind == "nowcast" and not 1 <= num_intervals(config, forecast) <= most:
        raise ConfigError(
            f"{key}.steps: {steps}, and a window of {config.window} snapshots every {every} spans from {every} to "
            f"{Quantity(round(most) * every.amount, every.unit)}. Allowed for a nowcast: what the window spans; change "
            f"`window` or `every`."
        )
    return forecast


def _parse_view(value: object, key: str) -> View:
    if isinstance(value, str):
        return _parse_shorthand(value, key)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not _NAME.fullmatch(value["name"]):
        raise ConfigError(
            f"{key}: {value!r} is no view. Allowed: a kind ('sma'), a kind and a number of snapshots ('sma4'), or a "
            f"mapping with a `name` of letters, digits, '_', '.', '-', a `kind`, and optionally `last` and parameters."
        )
    params = {str(name): item for name, item in value.items() if name not in ("name", "kind", "last")}
    kind, last = value.get("kind", value["name"]), value.get("last")
    if last is None and kind == "custom" and isinstance(params.get("weights"), list):
        last = len(params["weights"])
    return View(value["name"], str(kind), last, params)


def _parse_shorthand(text: str, key: str) -> View:
    letters = text.rstrip("0123456789")
    digits = text[len(letters) :]
    if len(digits) > _MOST_DIGITS:
        raise ConfigError(f"{key}: {text!r} is no view; no window holds so many snapshots.")
    last = int(digits) if digits else None
    kind, params = _SHORTHANDS.get(letters, (letters, {}))
    known = list(dict.fromkeys([*coefficients.KINDS, *_SHORTHANDS]))
    if kind not in coefficients.KINDS:
        raise ConfigError(f"{key}: {text!r} is no view{did_you_mean(letters, known)} Known kinds: {', '.join(known)}.")
    return View(text, kind, last, params)


def _try_coefficients(view: View, window: int, key: str) -> None:
    if view.name in _RESERVED:
        raise ConfigError(f"{key}: the name {view.name!r} is taken by other metrics; choose another.")
    if view.last is not None and (isinstance(view.last, bool) or not isinstance(view.last, int)):
        raise ConfigError(f"{key}.last: {view.last!r} is no number of snapshots. Allowed: 2 to {window}.")
    if view.last is not None and not 2 <= view.last <= window:
        raise ConfigError(
            f"{key}: view {view.name!r} needs {view.last} snapshots and the window holds {window}. "
            f"Allowed: 2 to {window}; raise `window` or lower the view's number."
        )
    if "times" in view.params:
        raise ConfigError(f"{key}.times: the times of a view are those of its snapshots. Remove the key.")
    try:
        for num_snapshots in {view.last or 2, view.last or window}:  # a shape may fail at some sizes only
            coefficients.compute(view.kind, num_snapshots, times=range(num_snapshots), **view.params)
    except CoefficientError as error:
        raise ConfigError(f"{key}: {error}") from error


def _read(values: object) -> Any:
    try:
        if isinstance(values, str | Path):
            values = OmegaConf.load(values)
        container = (
            OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else values  # P12
        )
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"{values}: cannot read a configuration ({error}). Give a YAML file of keys.") from error
    except RecursionError as error:  # an alias inside of what it names
        raise ConfigError(_endless(values)) from error
    except Exception as error:  # PyYAML's own errors have no common built-in base
        if not type(error).__module__.startswith("yaml"):
            raise
        raise ConfigError(f"{values}: not YAML ({' '.join(str(error).split())}). Give a YAML file of keys.") from error
    if not isinstance(container, Mapping):
        raise ConfigError(f"configuration: {container!r} is no mapping of keys to values.")
    return container


def _endless(where: object) -> str:
    return f"{where}: a value contains itself, or is nested too deep to read. Write it out."


def _refuse_misfits(schema: Any, values: Mapping[Any, Any], at: str) -> None:
    """Unknown keys, and what OmegaConf refuses without saying what it was given, or takes for the default."""
    defaults = schema()
    known = {item.name: getattr(defaults, item.name) for item in fields(schema)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{at}{key}: unknown key{did_you_mean(str(key), known)} Known keys: {', '.join(known)}.")
        default = known[key]
        if isinstance(value, str) and value == MISSING:
            raise ConfigError(f"{at}{key}: {value!r} stands for a value that must be given. Give one, or drop the key.")
        if isinstance(default, list) and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise ConfigError(f"{at}{key}: {value!r} is no list. Allowed: a list, such as {default or ['*.bias']}.")
        if is_dataclass(default):
            if not isinstance(value, Mapping):
                allowed = ", ".join(item.name for item in fields(default))
                raise ConfigError(f"{at}{key}: {value!r} is no mapping. Allowed: a mapping with keys of {allowed}.")
            _refuse_misfits(type(default), value, f"{at}{key}.")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`"; did you mean 'window'?"`, or `"."` where nothing known is near."""
    meant = nearest(given, known)
    return f"; did you mean {meant!r}?" if meant else "."


def _refuse_impossible_values(config: WindowConfig) -> None:
    _require(config, "window", lambda value: 2 <= value <= _LARGEST_WINDOW, f"an integer from 2 to {_LARGEST_WINDOW}")
    _require(config, "sample_every", lambda value: value >= 1, "an integer of at least 1")
    _require(config, "lr_tolerance", lambda value: 0.0 <= value < 1.0, "a number from 0 to 1")
    _require(config, "average", lambda value: value in AVERAGES, " or ".join(AVERAGES))
    _require(config, "batch_norm", lambda value: value in BATCH_NORMS, " or ".join(BATCH_NORMS))
    _require(config, "store", lambda value: value in STORES, " or ".join(STORES))
    _require(config, "slot_dtype", lambda value: value in (None, *SLOT_DTYPES), f"null or {' or '.join(SLOT_DTYPES)}")
    if config.store == "disk" and not config.store_folder and not isinstance(config, MergeConfig):
        raise ConfigError("store_folder: null, and store 'disk' needs a folder. Name one on local storage.")
    snapshot_cadence(config), merge_cadence(config), parse_views(config)
    every = Quantity.parse(config.every)
    if config.average == "block" and every.unit == "steps" and config.sample_every > every.amount:
        raise ConfigError(
            f"sample_every: {config.sample_every} steps, and a block has {every.amount} (`every`), so most would "
            f"be empty. Allowed: 1 to {every.amount}."
        )
    if isinstance(config, MergeConfig):
        _refuse_impossible_trainer_values(config)


def _refuse_impossible_trainer_values(config: MergeConfig) -> None:
    tokens = config.tokens_per_batch
    if isinstance(tokens, bool) or not (isinstance(tokens, str) or (isinstance(tokens, int) and tokens >= 1)):
        raise ConfigError(
            f"tokens_per_batch: {tokens!r} is neither a number of at least 1 nor a key of the batch. In Python a "
            f"callable from a batch to its number of tokens works too."
        )
    _require(config, "name", _NAME.fullmatch, "letters, digits, '_', '.' and '-', a letter first")
    _require(config, "stateful_data", lambda value: value in ("refuse", "iterate"), "refuse or iterate")
    _require(config, "on_missing", lambda value: value in ON_MISSING, " or ".join(ON_MISSING))
    save_cadence(config.save)
    parse_forecasts(config)
    _require(config.save, "keep", lambda value: value >= 1, "an integer of at least 1", at="save.")
    _require(config.save, "mode", lambda value: value in MODES, " or ".join(MODES), at="save.")


def _require(config: object, key: str, holds: Callable[[Any], object], allowed: str, *, at: str = "") -> None:
    value = getattr(config, key)
    if not holds(value):
        raise ConfigError(f"{at}{key}: {value!r} is out of range. Allowed: {allowed}.")
