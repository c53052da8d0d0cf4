"""The Lightning callback: its keys, and its hooks, each of which hands on to the run.

This module knows the order of Lightning's hooks and nothing of how a merge is computed or measured. Training is read
and never written, except while merged weights are in the model, between two batches.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from pretrain_merge.callbacks import refusals
from pretrain_merge.callbacks.both_libraries import CALLBACKS
from pretrain_merge.callbacks.fit import Fit
from pretrain_merge.callbacks.fits import Fits
from pretrain_merge.callbacks.forecasts import RunForecasts
from pretrain_merge.callbacks.lightning_cli import explain_errors
from pretrain_merge.callbacks.metric_check import MetricCheck
from pretrain_merge.callbacks.resuming import find_state
from pretrain_merge.callbacks.run_folder import refuse_remote_folder
from pretrain_merge.config import AUTO, MergeConfig, parse_settings, read, refuse_misfits
from pretrain_merge.evaluation import evaluate
from pretrain_merge.records import MergeRecord
from pretrain_merge.runtime.log import WarnOnce

explain_errors()  # LightningCLI imports this module while it reads what to build

_INPUT_IDS = "input_ids"
_MAPPINGS = ("breaks", "parameters", "save")  # None stands for an empty one


class ModelMerging(*CALLBACKS):  # type: ignore[misc]
    """Keeps a rolling window of snapshots, merges them at intervals, and measures merged beside raw.

    At each merge point every view is merged into the live parameters, evaluated on the same batches as the raw model,
    and the raw model is put back bit for bit. Training is not changed: weights, optimizer state, metrics and random
    numbers are those of a run without the callback.

    Args:
        window: How many snapshots are kept, 2 to 10000.
        every: Interval between snapshots: 1000, "1000 steps", "8B tokens", "2e6 samples"; or a share of the run since
            its last break, which grows with it: "1%", "1% of tokens".
        start: No snapshot before this point.
        merge_every: Merge at the first snapshot at or after each multiple; None: at every snapshot.
        views: Named merges: "sma", "sma4" (the newest four), "wma", "ema", "wsm", or mappings with `name`, `kind`,
            optionally `last` or `span`, and the parameters of the kind.
        span: A view that names no number of snapshots takes the newest that span at most this share of the run since
            its last break; "auto": a share that follows what the run measures, 6% at first and 12% at most; None: all
            that are valid.
        average: "last": a snapshot is the model after a step; "block": the mean of the models in the interval.
        sample_every: With "block": steps between the models that enter the mean.
        tokens_per_batch: Tokens of one batch on one rank: a number, the key of the batch whose elements are counted,
            or a function of the batch.
        lr_tolerance: Relative change of a learning rate that counts as a break.
        breaks: What counts as a break: {"lr": False} for runs whose learning rate decays, {"spikes": False} to ignore
            the training loss; `distrust`: how many steps before a spike snapshots are dropped.
        parameters: Which parameters are merged, by patterns of their names: {include, exclude}.
        merge_buffers: Patterns of float buffers that are merged like parameters.
        batch_norm: Running statistics of BatchNorm: "refuse" such models, keep them "live", or "merge" them.
        store: Where snapshots lie: "device", "host", "disk", or "auto", which chooses by free memory.
        store_folder: Where a disk store writes; None: `window/` in the run's folder.
        slot_dtype: Dtype of snapshots where smaller than the parameter's, e.g. "bfloat16"; None: the parameter's.
        save: Which merged models are kept on disk: {every, keep, best, mode, at_end}.
        forecast: Forecasts of annealed losses by name: {name: {steps, shape, kind, metric, coverage,
            calibration}}; "auto": of an anneal that ends now, and of one that starts now; None: none.
        evaluators: Further evaluations by name: functions from the module to metrics, run on raw and merged alike.
        validate: Whether to evaluate on the Trainer's validation loaders.
        stateful_data: Validation data that carry a position of their own: "refuse", or "iterate" them.
        on_error: What a failing evaluation does: "raise", or "warn" and go on with what could be measured.
        window_folder: Where the snapshots that checkpoints need are kept; None: `window/` in the run's folder.
        keep_windows: Of how many checkpoints, the newest, the windows are kept; None: of all that exist.
        on_missing: When a resumed run's window cannot be restored: "error", or "refill", which starts an empty one.
        on_publish: For each saved model, beside training: a command with {folder}, {step} and {view} in it, which may
            print numbers as JSON, or a function of folder and step that returns some; they are logged at that step.
        on_publish_timeout: Seconds that one of these may take, and that the end of a run waits for those left.
        verbose: Say one line at each merge, besides those at the start and the end of a run.
        name: Prefix of metrics and folders; a second instance needs its own.
        **options: None. A misspelt key is refused here like everywhere else, with the nearest known one.

    Attributes:
        settings: Every word of the keys as a value (intervals, views, forecasts), parsed once.
        config: The keys as they were given, with defaults filled in.
        last_record: What the last merge point measured; None before the first.
        best_model_path: The best merged model on disk, by `save.best`; None where none was saved.

    Raises:
        ConfigError: A key is unknown or a value impossible; the message starts with the key.
    """

    def __init__(
        self,
        window: int = 10,
        every: int | str = "1000 steps",
        start: int | str = 0,
        merge_every: int | str | None = None,
        views: Sequence[str | dict[str, Any]] = ("sma",),
        span: float | str | None = AUTO,
        average: str = "last",
        sample_every: int = 1,
        tokens_per_batch: int | str | Callable[[Any], int] = _INPUT_IDS,
        lr_tolerance: float = 1e-3,
        breaks: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Sequence[str]] | None = None,
        merge_buffers: Sequence[str] = (),
        batch_norm: str = "refuse",
        store: str = "auto",
        store_folder: str | None = None,
        slot_dtype: str | None = None,
        save: Mapping[str, Any] | None = None,
        forecast: Mapping[str, Mapping[str, Any]] | str | bool | None = AUTO,
        evaluators: Mapping[str, Callable[[Any], Mapping[str, float]]] | None = None,
        validate: bool = True,
        stateful_data: str = "refuse",
        on_error: str = "raise",
        window_folder: str | None = None,
        keep_windows: int | None = None,
        on_missing: str = "error",
        on_publish: str | Callable[[Path, int], Any] | None = None,
        on_publish_timeout: float = 3600.0,
        verbose: bool = False,
        name: str = "merge",
        **options: NoReturn,
    ) -> None:
        # the schema holds what YAML can say; a function stands beside it, behind the default of its key
        tokens = _INPUT_IDS if callable(tokens_per_batch) else tokens_per_batch
        snapshots = {"window": window, "every": every, "start": start, "average": average, "sample_every": sample_every}
        breaks_at = {"lr_tolerance": lr_tolerance, "breaks": breaks}
        tensors = {"parameters": parameters, "merge_buffers": merge_buffers, "batch_norm": batch_norm}
        slots = {"store": store, "store_folder": store_folder, "slot_dtype": slot_dtype}
        merges = {"merge_every": merge_every, "views": views, "span": span, "tokens_per_batch": tokens}
        measured = {"validate": validate, "stateful_data": stateful_data, "on_error": on_error, "forecast": forecast}
        windows = {"window_folder": window_folder, "keep_windows": keep_windows, "on_missing": on_missing}
        files = {"save": save} | windows
        command = None if callable(on_publish) else on_publish
        published = {"on_publish": command, "on_publish_timeout": on_publish_timeout}
        shown = {"name": name, "verbose": verbose}
        given = snapshots | breaks_at | tensors | slots | merges | measured | files | published | shown
        self.settings = parse_settings({key: _plain(value, key in _MAPPINGS) for key, value in given.items()} | options)
        self.config = self.settings.config
        notices = WarnOnce()  # what the user was told; once for all runs of this callback
        forecasts = RunForecasts(self.settings, notices)  # refuses calibrations that cannot be read
        checked = refusals.checked_evaluators(evaluators)
        self._notices = notices  # for what is said before a run
        self._metric_check = MetricCheck(self.settings, checked, notices)  # of the names that somebody was given
        work = refusals.checked_on_publish(on_publish, self.config)
        fit_of = partial(Fit, self.settings, tokens_per_batch, checked, work, forecasts, notices)
        self._fits = Fits(fit_of, notices)  # the run that is on, and what the next may need of it

    @classmethod
    def from_config(cls, source: object, **python_only: Any) -> "ModelMerging":
        """The callback from a YAML file, an OmegaConf config or a mapping.

        Args:
            source: Path of a YAML file, or the keys themselves.
            **python_only: What YAML cannot hold: `evaluators`, or functions as `tokens_per_batch` or `on_publish`.

        Raises:
            ConfigError: An unknown key, a wrong type or an impossible value.
        """
        given = read(source)
        refuse_misfits(MergeConfig, given)
        return cls(**{**given, **python_only})

    @property
    def state_key(self) -> str:
        """Key in Lightning's checkpoints: by name only, so that a changed option never loses the state (P21)."""
        return f"ModelMerging[{self.config.name}]"

    @property
    def last_record(self) -> MergeRecord | None:
        """What the last merge point of this run, or of the one that ended last, measured."""
        return self._fits.last_run.last_record if self._fits.last_run is not None else None

    @property
    def best_model_path(self) -> Path | None:
        """The best merged model on disk, by `save.best`."""
        return self._fits.last_run.best_model_path if self._fits.last_run is not None else None

    def mark_phase(self, name: str) -> None:
        """Say that something changed that the weights will show (a data switch): merges do not reach across it.

        Before `fit` it names the phase that the run is in; a resumed run that was in it already goes on unbroken.
        """
        self._fits.mark_phase(name)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies whose parameters cannot be merged in place, before anything is trained."""
        if stage == "fit":  # nothing of ours in `validate`, `test` and `predict`
            refusals.refuse_strategy(trainer.strategy)
            refuse_remote_folder(trainer)
            self._fits.forget_other(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the model once it is configured and on its device, and refuse what cannot be merged exactly."""
        refusals.refuse_model(pl_module, trainer.optimizers, self.config)
        refusals.refuse_other_configs(self.config)
        if self.config.validate:
            evaluate.refuse_given_loaders(trainer, stateful_data=self.config.stateful_data)
        self._metric_check.begin(trainer)
        self._fits.watch(trainer, pl_module)

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Refuse names of metrics that were not measured, before the first batch."""
        self._metric_check.look(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Refuse them at the run's first validation, where there was no sanity check."""
        self._metric_check.look(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a run, or go on with one: P13 lets nothing be restored before."""
        if self.config.validate:
            data, notices = self.config.stateful_data, self._notices
            evaluate.refuse_loaders_of_hooks(trainer, pl_module, stateful_data=data, notices=notices)
        self._fits.begin(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Remember the learning rate that this step uses (P28)."""
        if self._fits.run is not None:
            self._fits.run.optimizer_steps(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Observe the step; at a merge point, measure and publish."""
        if self._fits.run is not None:
            self._fits.run.step(batch, outputs)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save merges of the newest snapshots where the user asked for it, and the window for a checkpoint to come."""
        self._fits.finish(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Free the window and give other callbacks their hooks back."""
        if stage == "fit":
            self._fits.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning calls no `teardown` after an exception; a checkpoint may follow (`save_on_exception`)."""
        self._fits.break_off(trainer, exception)

    def state_dict(self) -> dict[str, Any]:
        """Counters, the manifest of the window, and the folders of saved models, as plain values (P11, P12)."""
        return self._fits.state_for_checkpoint()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that holds a state of ours which nobody would ask for (P21)."""
        if trainer.state.fn == "fit":
            find_state(self.config, self._notices, checkpoint, self.state_key, trainer.callbacks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state of the run that is resumed."""
        self._fits.state = dict(state_dict)


def _plain(value: Any, is_mapping: bool) -> Any:
    """Mappings and sequences as the schema takes them. Text is not a list of letters: it is refused as a whole."""
    if value is None and is_mapping:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
