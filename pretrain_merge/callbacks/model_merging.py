"""The Lightning callback: its keys, and its hooks, each of which hands on to the run.

This module knows the order of Lightning's hooks and nothing of how a merge is computed or measured. Training is read
and never written, except while merged weights are in the model, between two batches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as lightning
import torch

from pretrain_merge.callbacks import refusals
from pretrain_merge.callbacks.borrowing import wrapped
from pretrain_merge.callbacks.fit import Fit
from pretrain_merge.callbacks.forecasts import RunForecasts
from pretrain_merge.callbacks.rehearsal import Rehearsal
from pretrain_merge.callbacks.resuming import find_state, has_begun
from pretrain_merge.callbacks.run import Run
from pretrain_merge.callbacks.run_folder import refuse_remote_folder
from pretrain_merge.config import SPAN, MergeConfig, parse_settings, read, refuse_misfits
from pretrain_merge.records import MergeRecord
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce

_CALLBACKS: tuple[type, ...] = (lightning.Callback,)
if find_spec("pytorch_lightning"):
    # the same library under its other name: a Trainer of either checks for the Callback class of its own
    from pytorch_lightning import Callback as _OtherCallback

    _CALLBACKS += (_OtherCallback,)


_INPUT_IDS = "input_ids"
_MAPPINGS = ("breaks", "parameters", "save", "forecast")  # None stands for an empty one


class ModelMerging(*_CALLBACKS):  # type: ignore[misc]
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
            its last break; None: all that are valid.
        average: "last": a snapshot is the model after a step; "block": the mean of the models in the interval.
        sample_every: With "block": steps between the models that enter the mean.
        tokens_per_batch: Tokens of one batch on one rank: a number, the key of the batch whose elements are counted,
            or a function of the batch.
        lr_tolerance: Relative change of a learning rate that counts as a break.
        breaks: What counts as a break: {"lr": False} for runs whose learning rate decays.
        parameters: Which parameters are merged, by patterns of their names: {include, exclude}.
        merge_buffers: Patterns of float buffers that are merged like parameters.
        batch_norm: Running statistics of BatchNorm: "refuse" such models, keep them "live", or "merge" them.
        store: Where snapshots lie: "device", "host", "disk", or "auto", which chooses by free memory.
        store_folder: Where a disk store writes; None: `window/` in the run's folder.
        slot_dtype: Dtype of snapshots where smaller than the parameter's, e.g. "bfloat16"; None: the parameter's.
        save: Which merged models are kept on disk: {every, keep, best, mode, at_end}.
        forecast: Forecasts of annealed losses by name: {name: {steps, shape, kind, metric, coverage,
            calibration}}.
        evaluators: Further evaluations by name: functions from the module to metrics, run on raw and merged alike.
        validate: Whether to evaluate on the Trainer's validation loaders.
        stateful_data: Validation data that carry a position of their own: "refuse", or "iterate" them.
        window_folder: Where the snapshots that checkpoints need are kept; None: `window/` in the run's folder.
        on_missing: When a resumed run's window cannot be restored: "error", or "refill", which starts an empty one.
        name: Prefix of metrics and folders; a second instance needs its own.
        **options: None. A misspelt key is refused here like everywhere else, with the nearest known one.

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
        span: float | str | None = SPAN,
        average: str = "last",
        sample_every: int = 1,
        tokens_per_batch: int | str | Callable[[Any], int] = _INPUT_IDS,
        lr_tolerance: float = 1e-3,
        breaks: Mapping[str, bool] | None = None,
        parameters: Mapping[str, Sequence[str]] | None = None,
        merge_buffers: Sequence[str] = (),
        batch_norm: str = "refuse",
        store: str = "auto",
        store_folder: str | None = None,
        slot_dtype: str | None = None,
        save: Mapping[str, Any] | None = None,
        forecast: Mapping[str, Mapping[str, Any]] | None = None,
        evaluators: Mapping[str, Callable[[Any], Mapping[str, float]]] | None = None,
        validate: bool = True,
        stateful_data: str = "refuse",
        window_folder: str | None = None,
        on_missing: str = "error",
        name: str = "merge",
        **options: NoReturn,
    ) -> None:
        given = {
            "window": window,
            "every": every,
            "start": start,
            "merge_every": merge_every,
            "views": views,
            "span": span,
            "average": average,
            "sample_every": sample_every,
            # the schema holds what YAML can say
            "tokens_per_batch": _INPUT_IDS if callable(tokens_per_batch) else tokens_per_batch,
            "lr_tolerance": lr_tolerance,
            "breaks": breaks,
            "parameters": parameters,
            "merge_buffers": merge_buffers,
            "batch_norm": batch_norm,
            "store": store,
            "store_folder": store_folder,
            "slot_dtype": slot_dtype,
            "save": save,
            "forecast": forecast,
            "validate": validate,
            "stateful_data": stateful_data,
            "window_folder": window_folder,
            "on_missing": on_missing,
            "name": name,
        }
        # every word of the keys as a value, parsed this once
        self.settings = parse_settings({key: _plain(value, key in _MAPPINGS) for key, value in given.items()} | options)
        self.config = self.settings.config  # the keys as they were given, with defaults filled in
        self._notices = WarnOnce()  # what the user was told; once for all runs of this callback
        forecasts = RunForecasts(self.settings, self._notices)  # refuses calibrations that cannot be read
        # what a `Fit` has besides its Trainer and module
        self._parts = (tokens_per_batch, refusals.checked_evaluators(evaluators), forecasts, self._notices)
        self._state: dict[str, Any] = {}  # of the checkpoint that is resumed, or as it was remembered last
        self._phase_to_come: str | None = None  # marked before a run began
        self._run: Run | Rehearsal | None = None  # between `on_train_start` and the end of `fit`
        self._last_run: Run | Rehearsal | None = None  # that one, or the one that ended last: its window is kept
        self._borrowed = ExitStack()  # the fit loop's `run`, and all that a run has; given back when `fit` ends

    @classmethod
    def from_config(cls, source: object, **python_only: Any) -> "ModelMerging":
        """The callback from a YAML file, an OmegaConf config or a mapping.

        Args:
            source: Path of a YAML file, or the keys themselves.
            **python_only: What YAML cannot hold: `evaluators`, or a `tokens_per_batch` function.

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
        return self._last_run.last_record if self._last_run is not None else None

    @property
    def best_model_path(self) -> Path | None:
        """The best merged model on disk, by `save.best`."""
        return self._last_run.best_model_path if self._last_run is not None else None

    def mark_phase(self, name: str) -> None:
        """Say that something changed that the weights will show (a data switch): merges do not reach across it.

        Before `fit` it names the phase that the run is in; a resumed run that was in it already goes on unbroken.
        """
        if self._run is not None:
            self._run.merger.mark_phase(name)
        else:
            self._phase_to_come = name

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies whose parameters cannot be merged in place, before anything is trained."""
        if stage != "fit":
            return
        refusals.refuse_strategy(trainer.strategy)
        refuse_remote_folder(trainer)
        if not has_begun(trainer) or self._last_run is None or self._last_run.module is not pl_module:
            self._state = {}  # of another Trainer's run, or model (P24); that of a resumed run is loaded after this

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the model once it is configured and on its device, and refuse what cannot be merged exactly."""
        refusals.refuse_model(pl_module, trainer.optimizers, self.config)
        refusals.refuse_other_configs(self.config)
        self._borrowed.enter_context(wrapped(trainer.fit_loop, "run", partial(self._fit, trainer, pl_module)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a run, or go on with one; makes the merge that its checkpoint owes."""
        if self._last_run is not None:
            self._last_run.release()
            self._last_run = None
        fit = Fit(self.settings, *self._parts, trainer, pl_module)
        self._run = self._last_run = Rehearsal(fit) if trainer.fast_dev_run else Run(fit, self._state)
        self._borrowed.callback(self._run.close)
        self._run.catch_up()
        phase, self._phase_to_come = self._phase_to_come, None
        if phase not in (None, self._run.merger.phase):
            self._run.merger.mark_phase(phase)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Remember the learning rate that this step uses (P28)."""
        if self._run is not None:
            self._run.optimizer_steps(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Observe the step; at a merge point, measure and publish."""
        if self._run is not None:
            self._run.step(batch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save merges of the newest snapshots where the user asked for it, and the window for a checkpoint to come."""
        if self._run is not None:
            self._run.finish()
        with ranks.all_or_none("keep the window of the end"):
            lost = "" if trainer.checkpoint_callbacks else "the run before ended, and keeps no checkpoints."
            self._remember(lost=lost)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Free the window and give other callbacks their hooks back."""
        if stage == "fit":
            self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning calls no `teardown` after an exception; a checkpoint may follow (`save_on_exception`)."""
        # those without this choice, as OnExceptionCheckpoint, may do nothing else
        will_save = any(getattr(item, "save_on_exception", True) for item in trainer.checkpoint_callbacks)
        is_known = ranks.is_known_to_all_ranks(exception)
        reason = f"the run before ended with {type(exception).__name__}."
        try:
            with ranks.all_or_none("keep the window") if is_known and will_save else nullcontext():
                self._remember(lost="" if will_save else reason)
        except Exception as error:
            if not is_known:
                raise
            self._notices.warn("lost", f"the window is not kept: {error}")
            self._remember(lost=f"{reason} {error}")  # the checkpoint is saved without it
        finally:
            self._end()

    def state_dict(self) -> dict[str, Any]:
        """Counters, the manifest of the window, and the folders of saved models, as plain values (P11, P12)."""
        # every rank is asked, and all must know where one cannot write; after an exception not every rank may be here
        with ranks.all_or_none("keep the window for a checkpoint") if self._run is not None else nullcontext():
            self._remember()
            if self._last_run is not None:
                self._last_run.announce()
        return dict(self._state)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that holds a state of ours which nobody would ask for (P21)."""
        if trainer.state.fn == "fit":
            find_state(self.config, self._notices, checkpoint, self.state_key, trainer.callbacks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state of the run that is resumed."""
        self._state = dict(state_dict)

    def _fit(self, trainer: Any, pl_module: Any, users_run: Callable[[], None]) -> None:
        users_run()
        # Lightning runs no hook of training where a resumed run has no step left, and this one may owe its last
        # merge; a process that was killed at its end also left a lock and the files of a disk store
        if self._run is None and self._state and trainer.ckpt_path is not None and not trainer.fast_dev_run:
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def _remember(self, *, lost: str = "") -> None:
        """The state as it is now; writes the files that it refers to, unless the window is to be lost."""
        if self._run is not None:
            self._state = self._run.state(lost=lost)

    def _end(self) -> None:
        """Free the window and give back what was borrowed; what a checkpoint may need was remembered."""
        self._run = None
        self._borrowed.close()


def _plain(value: Any, is_mapping: bool) -> Any:
    """Mappings and sequences as the schema takes them. Text is not a list of letters: it is refused as a whole."""
    if value is None and is_mapping:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
