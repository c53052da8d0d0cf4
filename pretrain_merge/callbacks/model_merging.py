"""The Lightning callback: hooks to clock, merger, evaluation, records and files.

This module knows the order of Lightning's hooks and nothing of how a merge is computed or measured. Training is read
and never written, except while merged weights are in the model, between two batches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pretrain_merge import parameters
from pretrain_merge.cadence import Cadence
from pretrain_merge.callbacks import merge_point
from pretrain_merge.callbacks.clock import Clock, TokensPerBatch
from pretrain_merge.callbacks.forecasts import RunForecasts
from pretrain_merge.callbacks.kept_window import DurableWindow, RunState, refuse_state_of_nobody
from pretrain_merge.callbacks.monitors import Monitors
from pretrain_merge.callbacks.resuming import Start, refill_or_raise, run_folder
from pretrain_merge.config import MergeConfig, WindowConfig, build, merge_cadence, save_cadence, snapshot_cadence
from pretrain_merge.errors import CheckpointError, ConfigError, UnsupportedModelError
from pretrain_merge.evaluation import evaluate
from pretrain_merge.evaluation.evaluate import Evaluator
from pretrain_merge.merged_models.retention import MergedModels, refuse_unmeasured
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.records import MergeRecord, Recipe, append_record
from pretrain_merge.records.loggers import Tracker
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import Notices

_CALLBACKS: tuple[type, ...] = (lightning.Callback,)
if find_spec("pytorch_lightning"):
    # the same library under its other name: a Trainer of either checks for the Callback class of its own
    from pytorch_lightning import Callback as _OtherCallback

    _CALLBACKS += (_OtherCallback,)


_REFUSED_STRATEGIES = {
    "FSDPStrategy": "FSDP1 flattens parameters, also with use_orig_params=True; use FSDP2 (ModelParallelStrategy)",
    "DeepSpeedStrategy": "DeepSpeed's engine owns parameters and optimizer at every ZeRO stage; use DDP, or FSDP2 "
    "(ModelParallelStrategy) where the model outgrows a device",
}

_OF_A_RANK = ("store", "store_folder")


class ModelMerging(*_CALLBACKS):  # type: ignore[misc]
    """Keeps a rolling window of snapshots, merges them at intervals, and measures merged beside raw.

    At each merge point every view is merged into the live parameters, evaluated on the same batches as the raw model,
    and the raw model is put back bit for bit. Training is not changed: weights, optimizer state, metrics and random
    numbers are those of a run without the callback.

    Args:
        window: How many snapshots are kept, 2 to 10000.
        every: Interval between snapshots: 1000, "1000 steps", "8B tokens", "2e6 samples".
        start: No snapshot before this point.
        merge_every: Merge at the first snapshot at or after each multiple; None: at every snapshot.
        views: Named merges: "sma", "sma4" (the newest four), "wma", "ema", "wsm", or mappings with `name`, `kind`,
            optionally `last`, and the parameters of the kind.
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
        average: str = "last",
        sample_every: int = 1,
        tokens_per_batch: int | str | Callable[[Any], int] = "input_ids",
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
        given = {key: value for key, value in locals().items() if key in {item.name for item in fields(MergeConfig)}}
        empty: dict[str, Any] = {"breaks": breaks, "parameters": parameters, "save": save, "forecast": forecast}
        given |= {key: {} if value is None else value for key, value in empty.items()} | options
        if callable(tokens_per_batch):  # the schema holds what YAML can say
            given.pop("tokens_per_batch")
        self.config = build(MergeConfig, {key: _plain(value) for key, value in given.items()})
        self._tokens_per_batch: TokensPerBatch = tokens_per_batch
        self._evaluators = _checked_evaluators(evaluators)
        self._notices = Notices()
        self._tracker = Tracker()
        self._forecasts = RunForecasts(self.config, self._notices)
        self._state: dict[str, Any] = {}
        self._durable: DurableWindow | None = None
        self._last_merge = 0
        self._phase_to_come: str | None = None
        self._merger: RollingMerger | None = None
        self._clock: Clock | None = None
        self._monitors: Monitors | None = None
        self._merged_models: MergedModels | None = None
        self._give_back = ExitStack()
        self._records_path: Path | None = None
        self.last_record: MergeRecord | None = None

    @classmethod
    def from_config(cls, source: object, **python_only: Any) -> "ModelMerging":
        """The callback from a YAML file, an OmegaConf config or a mapping.

        Args:
            source: Path of a YAML file, or the keys themselves.
            **python_only: What YAML cannot hold: `evaluators`, or a `tokens_per_batch` function.

        Raises:
            ConfigError: An unknown key, a wrong type or an impossible value.
        """
        return cls(**asdict(build(MergeConfig, source)) | python_only)

    @property
    def state_key(self) -> str:
        """Key in Lightning's checkpoints: by name only, so that a changed option never loses the state (P21)."""
        return f"ModelMerging[{self.config.name}]"

    @property
    def best_model_path(self) -> Path | None:
        """The best merged model on disk, by `save.best`."""
        return self._merged_models.best_path if self._merged_models else None

    def mark_phase(self, name: str) -> None:
        """Say that something changed that the weights will show (a data switch): merges do not reach across it.

        Before `fit` it names the phase that the run is in; a resumed run that was in it already goes on unbroken.
        """
        if self._merger is not None:
            self._merger.mark_phase(name)
        else:
            self._phase_to_come = name

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies whose parameters cannot be merged in place, before anything is trained."""
        kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        refused = next((kind for kind in kinds if kind in _REFUSED_STRATEGIES), None)
        if stage == "fit" and refused:
            raise UnsupportedModelError(f"{refused} is not supported: {_REFUSED_STRATEGIES[refused]}.")
        if stage == "fit" and trainer.global_step == 0:
            self._state = {}  # of another Trainer's run (P24); that of a resumed run is loaded after this

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the model once it is configured and on its device, and refuse what cannot be merged exactly."""
        parameters.mergeable_tensors(
            pl_module,
            merge_buffers=self.config.merge_buffers,
            batch_norm=self.config.batch_norm,
            **asdict(self.config.parameters),
        )
        _refuse_other_configs(self.config)
        self._watch_for_a_complete_run(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start or go on counting, and find the run's folder."""
        if self._durable is not None:
            self._durable.release()  # of a run before
            self._durable = None
        start = Start(self.config, self._notices, trainer, self._state)
        state, folder = start.state, start.folder
        self._clock = Clock(self._cadences(), self._tokens_per_batch, state.progress, state.pending, state.lr)
        self._merger = RollingMerger(**self._window_options(folder))
        self._merger.watch(pl_module, trainer.optimizers)
        self._merger.resume_from(state.progress)
        self.last_record = self._records_path = self._merged_models = None
        self._tracker = Tracker()
        self._forecasts = RunForecasts(self.config, self._notices)
        self._monitors = Monitors(trainer.callbacks, f"{self.config.name}/")
        if not trainer.fast_dev_run:
            self._open(trainer, pl_module, self._merger, start)
        if self._phase_to_come not in (None, self._merger.phase):
            self._merger.mark_phase(self._phase_to_come)
        self._phase_to_come = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Remember the learning rate that this step uses (P28)."""
        if self._clock is not None:
            optimizers = [getattr(item, "optimizer", item) for item in trainer.optimizers]
            index = next((i for i, item in enumerate(optimizers) if item is optimizer), len(optimizers))
            self._clock.optimizer_steps(index, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Observe the step; at a merge point, measure and publish."""
        clock, merger = self._clock, self._merger
        if clock is None or merger is None:
            return
        progress = clock.batch_ends(batch, share=evaluate.data_share(trainer))
        if progress is None:
            return
        if trainer.fast_dev_run:
            self._rehearse(trainer, pl_module)
            return
        merger.observe(pl_module, progress, lr=clock.lr)
        self._merge_if_due(trainer, pl_module, merger)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save merges of the newest snapshots where the user asked for it, and the window for a checkpoint to come."""
        merger, models = self._merger, self._merged_models
        newest = merger.window.newest if merger is not None else None
        if merger is not None and models is not None and self.config.save.at_end and newest is not None:
            with ranks.together("save merged models at the end"), merger.swap(pl_module) as merge_view:
                for view in merger.views:
                    if view not in self._forecasts.views and merger.why_not(view) is None:
                        models.keep_last(pl_module, view, newest.progress, merge_view(view))
        if merger is not None and not self._last_merge:
            reason = merger.why_not(merger.views[0]) or "no merge point was reached."
            self._notices.once("no merge", f"training ended at step {trainer.global_step} without a merge: {reason}")
        with ranks.together("keep the window of the end"):
            self._remember(
                lost="" if trainer.checkpoint_callbacks else "the run before ended, and keeps no checkpoints."
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Free the window and give other callbacks their hooks back."""
        if stage == "fit":
            self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning calls no `teardown` after an exception; a checkpoint may follow (`save_on_exception`)."""
        # those without this choice, as OnExceptionCheckpoint, may do nothing else
        will_save = any(getattr(item, "save_on_exception", True) for item in trainer.checkpoint_callbacks)
        reason = f"the run before ended with {type(exception).__name__}."
        is_on_all = ranks.is_on_all(exception)
        try:
            with ranks.together("keep the window") if is_on_all and will_save else nullcontext():
                self._remember(lost="" if will_save else reason)
        except Exception as error:
            if not is_on_all:
                raise
            self._notices.once("lost", f"the window is not kept: {error}")
            self._remember(lost=f"{reason} {error}")  # the checkpoint is saved without it
        finally:
            self._end()

    def state_dict(self) -> dict[str, Any]:
        """Counters, the manifest of the window, and the folders of saved models, as plain values (P11, P12)."""
        # every rank is asked, and all must know where one cannot write; after an exception not every rank may be here
        with ranks.together("keep the window for a checkpoint") if self._merger is not None else nullcontext():
            self._remember()
            if self._durable is not None:
                self._durable.announce()
        return dict(self._state)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that holds a state of ours which nobody would ask for (P21)."""
        if trainer.state.fn != "fit":
            return
        try:
            refuse_state_of_nobody(checkpoint.get("callbacks", {}), self.state_key, trainer.callbacks)
        except CheckpointError as error:
            refill_or_raise(self.config, self._notices, error, checkpoint["global_step"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state of the run that is resumed."""
        self._state = dict(state_dict)

    def _watch_for_a_complete_run(self, trainer: Any, pl_module: Any) -> None:
        """Lightning runs no hook of training where a resumed run has no step left, and this one may owe its last merge.

        A process that was killed at its end also left a lock and the files of a disk store.
        """
        fit_loop = trainer.fit_loop
        users_run = fit_loop.run

        def run() -> None:
            users_run()
            if self._merger is None and self._state and trainer.ckpt_path is not None and not trainer.fast_dev_run:
                self.on_train_start(trainer, pl_module)
                self.on_train_end(trainer, pl_module)

        fit_loop.run = run
        self._give_back.callback(vars(fit_loop).pop, "run", None)  # its class has it

    def _end(self) -> None:
        """Free the window and give other callbacks their hooks back; what a checkpoint may need was remembered."""
        self._give_back.close()
        if self._durable is not None:
            self._durable.close()
        if self._merger is not None:
            self._merger.close()
        if self._monitors is not None:
            self._monitors.release()
        self._merger = self._clock = self._monitors = None

    def _remember(self, *, lost: str = "") -> None:
        """The state as it is now; writes the files that it refers to, unless the window is to be lost."""
        clock, merger, durable = self._clock, self._merger, self._durable
        if clock is None or merger is None or durable is None:
            return
        manifest = None if lost else durable.keep(merger)
        self._state = RunState(
            progress=clock.progress,
            pending=clock.pending,  # of this rank: exact on resume where all ranks' batches are of one size
            lr=clock.lr_by_optimizer,
            run_folder=str(durable.run_folder),
            window_folder=str(durable.folder),
            window=manifest.to_plain() if manifest is not None else None,
            lost=lost,
            saved=self._merged_models.state() if self._merged_models is not None else None,
            last_merge=self._last_merge,
        ).to_plain()

    def _cadences(self) -> list[Cadence]:
        optional = (merge_cadence(self.config), save_cadence(self.config.save))
        return [snapshot_cadence(self.config), *(cadence for cadence in optional if cadence is not None)]

    def _window_options(self, folder: Path) -> dict[str, Any]:
        values = asdict(self.config)
        options = {item.name: values[item.name] for item in fields(WindowConfig)}
        return options | {
            "store_folder": options["store_folder"] or str(folder / "window"),
            "views": [*options["views"], *self._forecasts.views],
        }

    def _open(self, trainer: Any, pl_module: Any, merger: RollingMerger, start: Start) -> None:
        """Window, records and merged models of the run; makes the merge that its checkpoint owes."""
        state, folder = start.state, start.folder
        with ranks.together("open the run's folder"):
            self._durable = DurableWindow(trainer, folder, Path(self.config.window_folder or folder / "window"))
            start.fill(merger, pl_module, self._durable)
            self._last_merge = state.last_merge
            is_owed = state.last_merge < state.progress.step and merger.merge_is_due()
            self._say_what_monitors_keep(folder)
            self._records_path = folder / "merges.jsonl"
            self._merged_models = start.merged_models()
            until = state.progress.step - is_owed
            before = start.clear(self._records_path, until=until) if trainer.is_global_zero else []
        if self._forecasts:
            self._forecasts.go_on_from(ranks.gather(before)[0])
        if is_owed:  # the checkpoint was saved before the merge of its step was recorded, say by a signal
            self._merge_if_due(trainer, pl_module, merger)
            if self._last_merge < state.progress.step and ranks.any_rank(trainer.received_sigterm):
                raise SIGTERMException  # Lightning would look only after another step, which would bury the merge

    def _say_what_monitors_keep(self, folder: Path) -> None:
        if self._monitors is not None and self._monitors.checkpoints:
            self._notices.once(
                "monitor",
                f"a ModelCheckpoint monitors a metric of {self.config.name!r}. Its checkpoints hold RAW weights; the "
                f"best merged model is kept in {folder / 'merged'} by save: {{best: <metric>}}.",
            )

    def _merge_if_due(self, trainer: Any, pl_module: Any, merger: RollingMerger) -> None:
        if not merger.merge_is_due():
            return
        # rank 0 writes and logs: the others must not go on where it could not
        with ranks.together(f"merge at step {merger.progress.step}"):
            self._publish(trainer, self._measured(trainer, pl_module, merger))

    def _measured(self, trainer: Any, pl_module: Any, merger: RollingMerger) -> MergeRecord | None:
        record = self._measure(trainer, pl_module, merger)
        if record is None and not ranks.any_rank(trainer.received_sigterm):  # a signal after which the run goes on
            record = self._measure(trainer, pl_module, merger)
        if record is None:
            self._notices.once(
                "broken off",
                f"step {merger.progress.step}: a signal broke off the merge. A run that is resumed from here makes it.",
            )
        return record

    def _measure(self, trainer: Any, pl_module: Any, merger: RollingMerger) -> MergeRecord | None:
        """Raw and every view on the same batches; None where a signal ended the evaluation early."""
        models = self._merged_models

        def keep(view: str, recipe: Recipe, metrics: Mapping[str, float]) -> None:
            if models is not None and view not in self._forecasts.views:
                models.keep(pl_module, view, merger.progress, recipe, metrics)

        return merge_point.measured(
            self.config, trainer, pl_module, merger, evaluators=self._evaluators, notices=self._notices, keep=keep
        )

    def _publish(self, trainer: Any, record: MergeRecord | None) -> None:
        if record is None:
            return
        record = self._forecasts.added_to(record)
        self.last_record, self._last_merge = record, record.step
        self._tracker.publish(trainer.loggers, record)
        if trainer.is_global_zero and self._records_path is not None:
            append_record(self._records_path, record)
        metrics = {key: torch.tensor(value, dtype=torch.float64) for key, value in record.metrics().items()}
        trainer.callback_metrics.update(metrics)
        if self._monitors is not None:
            self._monitors.new_values()

    def _rehearse(self, trainer: Any, pl_module: Any) -> None:
        """`fast_dev_run`: a full window of this one model, once, so that all views, memory and evaluation are tried."""
        if self.last_record is not None:
            return
        options = self._window_options(run_folder(self.config, trainer)) | {
            "every": 1,
            "start": 0,
            "merge_every": None,
            "sample_every": 1,
        }
        merger = RollingMerger(**options)
        for step in range(1, self.config.window + 1):
            merger.observe(pl_module, step)
        try:
            record = self._measure(trainer, pl_module, merger)
            for metrics in record.views.values() if record else ():
                refuse_unmeasured(self.config.save.best, metrics)
            self._publish(trainer, record)
        finally:
            merger.close()


def _refuse_other_configs(config: MergeConfig) -> None:
    """Ranks that snapshot at other steps would wait for each other: a file may be stale on one node."""
    of_ranks = ranks.gather(_comparable(asdict(config)))
    for key, value in of_ranks[0].items():
        other = next((number for number, item in enumerate(of_ranks) if item[key] != value), None)
        if other is not None and key not in _OF_A_RANK:
            raise ConfigError(
                f"{key}: {value!r} on rank 0 and {of_ranks[other][key]!r} on rank {other}. All ranks need the same; "
                f"only {' and '.join(_OF_A_RANK)} may differ. Copy the configuration to every node."
            )


def _comparable(value: Any) -> Any:
    """As other processes can have it: a function (the shape of a decay) by its name."""
    if isinstance(value, Mapping):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return getattr(value, "__qualname__", repr(value)) if callable(value) else value


def _plain(value: Any) -> Any:
    """Mappings and sequences as the schema takes them. Text is no list of letters: the schema refuses it as a whole."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _checked_evaluators(evaluators: object) -> dict[str, Evaluator]:
    if evaluators is None:
        return {}
    if not isinstance(evaluators, Mapping) or not all(callable(item) for item in evaluators.values()):
        raise ConfigError(
            f"evaluators: {evaluators!r} does not name functions. Allowed: a mapping from names to functions that take "
            f"the module and return metrics, such as {{'norm': weight_norm}}."
        )
    return dict(evaluators)
