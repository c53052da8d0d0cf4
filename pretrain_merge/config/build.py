"""Values against their schema: defaults are filled in, the impossible is refused, each message begins with its key."""

import math
from dataclasses import replace
from typing import TypeVar

from pretrain_merge.cadence import Cadence, Quantity, Share, parse_interval
from pretrain_merge.config.forecasts import parse_forecasts
from pretrain_merge.config.reading import read, require, typed
from pretrain_merge.config.schema import (
    AVERAGES,
    BATCH_NORMS,
    MODES,
    ON_ERROR,
    ON_MISSING,
    SLOT_DTYPES,
    STORES,
    MergeConfig,
    SaveConfig,
    WindowConfig,
)
from pretrain_merge.config.settings import Settings, WindowSettings
from pretrain_merge.config.views import NAME, parse_views
from pretrain_merge.errors import ConfigError
from pretrain_merge.runtime.errands import refuse_command

_FILES_OF_A_RUN = ("merged", "merges", "window")  # a second callback's folder lies beside the first one's
_LARGEST_WINDOW = 10_000  # beyond what memory holds; trying a view's coefficients takes seconds there
_ConfigT = TypeVar("_ConfigT", bound=WindowConfig)


def build(schema: type[_ConfigT], values: object) -> _ConfigT:
    """Check values against a schema and fill in its defaults.

    Args:
        schema: `WindowConfig` or `MergeConfig`.
        values: A mapping, an OmegaConf config, or the path of a YAML file.

    Raises:
        ConfigError: Unknown key, wrong type or impossible value; the message names the key's path.
    """
    config = typed(schema, read(values), at="")
    # parsed for the errors alone: who asks for values as they stand wants them checked, too
    _settings_of(config) if isinstance(config, MergeConfig) else _window_settings_of(config)
    return config


def parse_settings(values: object) -> Settings:
    """The settings of a `ModelMerging`, from what `build` takes for a `MergeConfig`; raises what `build` raises."""
    return _settings_of(typed(MergeConfig, read(values), at=""))


def parse_window_settings(values: object) -> WindowSettings:
    """The settings of a `RollingMerger`, from what `build` takes for a `WindowConfig`; raises what `build` raises."""
    return _window_settings_of(typed(WindowConfig, read(values), at=""))


def snapshot_cadence(config: WindowConfig) -> Cadence:
    """When snapshots are due."""
    return Cadence(parse_interval(config.every), start=Quantity.parse(config.start, key="start", minimum=0))


def merge_cadence(config: WindowConfig) -> Cadence | None:
    """When merges are due; None: at every snapshot once two are held.

    Snapshots of a growing interval are close together at first, so their merges are a whole window apart unless the
    user says otherwise: each has snapshots of its own.
    """
    if config.merge_every is not None:
        return Cadence(parse_interval(config.merge_every, key="merge_every"))
    every = parse_interval(config.every)
    return Cadence(replace(every, stride=config.window)) if isinstance(every, Share) else None


def save_cadence(config: SaveConfig) -> Cadence | None:
    """When merged models are saved periodically; None: never."""
    return None if config.every is None else Cadence(Quantity.parse(config.every, key="save.every"))


def _window_settings_of(config: WindowConfig) -> WindowSettings:
    require(config, "window", lambda value: 2 <= value <= _LARGEST_WINDOW, f"an integer from 2 to {_LARGEST_WINDOW}")
    require(config, "sample_every", lambda value: value >= 1, "an integer of at least 1")
    require(config, "lr_tolerance", lambda value: 0.0 <= value < 1.0, "a number from 0 to 1")
    require(
        config.breaks, "distrust", lambda value: value is None or value >= 0, "null or steps, 0 and up", at="breaks."
    )
    require(config, "average", lambda value: value in AVERAGES, " or ".join(AVERAGES))
    require(config, "batch_norm", lambda value: value in BATCH_NORMS, " or ".join(BATCH_NORMS))
    require(config, "store", lambda value: value in STORES, " or ".join(STORES))
    require(config, "slot_dtype", lambda value: value in (None, *SLOT_DTYPES), f"null or {' or '.join(SLOT_DTYPES)}")
    for key in ("store_folder", "window_folder"):
        if "://" in str(getattr(config, key, "")):
            raise ConfigError(
                f"{key}: {getattr(config, key)!r} is a URL. Allowed: a folder of a local file system, since its files "
                f"are locked and mapped into memory. Checkpoints of Lightning may lie elsewhere."
            )
    # a callback has the run's folder to fall back on; a merger that is driven by hand has none
    if config.store == "disk" and not config.store_folder and not isinstance(config, MergeConfig):
        raise ConfigError("store_folder: null, and store 'disk' needs a folder. Name one on local storage.")
    cadence = snapshot_cadence(config)
    settings = WindowSettings(config, cadence, merge_cadence(config) or cadence, parse_views(config))
    every = cadence.every
    steps = every.amount if isinstance(every, Quantity) and every.unit == "steps" else None
    if config.average == "block" and steps is not None and config.sample_every > steps:
        raise ConfigError(
            f"sample_every: {config.sample_every} steps, and a block has {steps} (`every`), so most would "
            f"be empty. Allowed: 1 to {steps}."
        )
    return settings


def _settings_of(config: MergeConfig) -> Settings:
    window = _window_settings_of(config)
    tokens = config.tokens_per_batch
    # `true` in YAML is an int to Python
    if isinstance(tokens, bool) or not (isinstance(tokens, str) or (isinstance(tokens, int) and tokens >= 1)):
        raise ConfigError(
            f"tokens_per_batch: {tokens!r} is neither a number of at least 1 nor a key of the batch. In Python a "
            f"callable from a batch to its number of tokens works too."
        )
    require(config, "name", NAME.fullmatch, "letters, digits, '_', '.' and '-', a letter first, 100 at most")
    _refuse_taken_name(config.name)
    require(config, "stateful_data", lambda value: value in ("refuse", "iterate"), "refuse or iterate")
    require(config, "keep_windows", lambda value: value is None or value >= 1, "null or an integer of at least 1")
    require(config, "on_error", lambda value: value in ON_ERROR, " or ".join(ON_ERROR))
    require(config, "on_missing", lambda value: value in ON_MISSING, " or ".join(ON_MISSING))
    saves = save_cadence(config.save)
    require(config, "on_publish_timeout", lambda value: 0.0 < value < math.inf, "seconds, above 0")
    if config.on_publish is not None:
        refuse_command(config.on_publish)
    # `best` is the best of merges, beside which raw has no place
    may_be_raw = config.save.every is not None or config.save.at_end
    require(config.save, "raw", lambda value: not value or may_be_raw, "true beside every or at_end", at="save.")
    require(config.save, "keep", lambda value: value >= 1, "an integer of at least 1", at="save.")
    require(config.save, "mode", lambda value: value in MODES, " or ".join(MODES), at="save.")
    forecasts = parse_forecasts(config)
    return Settings(config, window.cadence, window.merge_cadence, window.views, saves, forecasts)


def _refuse_taken_name(name: str) -> None:
    # lower: some file systems take Merged and merged for one
    if name.split(".")[0].lower() in _FILES_OF_A_RUN:
        raise ConfigError(
            f"name: {name!r} is that of files of a run, in whose folder a callback of this name would write. Allowed: "
            f"names that do not begin with {', '.join(_FILES_OF_A_RUN)} and a dot or nothing after it."
        )
