"""The start of a run: what its checkpoint says, and what is left in its folder of window, records and merged models.

This module knows what may have become of a run's files between two processes, and says so. It knows no hooks.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain_merge.cadence import Progress
from pretrain_merge.callbacks.fit import Fit
from pretrain_merge.callbacks.kept_window import KeptWindow
from pretrain_merge.callbacks.run_folder import RunFolder, files_of, run_folder
from pretrain_merge.callbacks.run_state import RunState, refuse_unclaimed_state
from pretrain_merge.config import MergeConfig
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files.atomic import remove_leftovers
from pretrain_merge.merged_models.retention import MergedModels
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.records import MergeRecord, keep_records_until
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce


def refill_or_raise(config: MergeConfig, notices: WarnOnce, error: Exception, step: int) -> None:
    """Raise what keeps a window from being restored, or say so once, as `on_missing` wants it."""
    if config.on_missing == "refill":
        notices.warn("refill", f"resumed at step {step}: the window starts empty (on_missing: refill). {error}")
        return
    raise type(error)(
        f"the window of {config.name!r} at step {step} cannot be restored: {error} Point window_folder to the "
        f"folder that holds its files, or start with an empty window by on_missing='refill'."
    ) from error


def find_state(
    config: MergeConfig, notices: WarnOnce, checkpoint: Mapping[str, Any], key: str, callbacks: Iterable[Any]
) -> None:
    """Refuse a checkpoint that holds a state of ours which nobody would ask for, as `on_missing` wants it (P21).

    Raises:
        CheckpointError: It does.
    """
    try:
        refuse_unclaimed_state(checkpoint.get("callbacks", {}), key, callbacks)
    except CheckpointError as error:
        refill_or_raise(config, notices, error, checkpoint["global_step"])


def step_of(trainer: Any) -> int:
    """The step that a run is at, as far as Lightning knows."""
    # with optimizers stepped by hand, `global_step` counts each of them
    by_hand = not trainer.lightning_module.automatic_optimization
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped if by_hand else trainer.global_step)


def has_begun(trainer: Any) -> bool:
    """Whether a Trainer trained before: what it counts differs between automatic and manual optimisation."""
    # by hand-stepped optimizers `global_step` may stay 0; batches count all the same
    return bool(trainer.global_step or trainer.fit_loop.epoch_loop._batches_that_stepped)


class Start:
    """A run that begins, or goes on from a checkpoint.

    Args:
        fit: One call of `Trainer.fit`.
        plain: Our state in the checkpoint, or of the `fit` before; empty where there is none.

    Attributes:
        folder: Of this run.
        state: Where it stands.

    Raises:
        CheckpointError: The state is damaged.
    """

    def __init__(self, fit: Fit, plain: Mapping[str, Any]) -> None:
        self._fit, self._config, self._notices, self._trainer = fit, fit.config, fit.notices, fit.trainer
        self._has_state = bool(plain)
        self._goes_on = bool(plain) or fit.trainer.ckpt_path is not None
        with ranks.all_or_none("read the state of the run"):
            self.state = self._read(plain)
        self.folder = run_folder(fit.config, fit.trainer)

    def fill(self, merger: RollingMerger, kept_window: KeptWindow) -> None:
        """Bring back the window that the checkpoint needs.

        Raises:
            CheckpointError: It cannot be restored.
            ConfigError: The configuration makes other snapshots.
        """
        state = self.state
        if state.lost and self._trainer.ckpt_path is None:  # `fit` once more, not a checkpoint that must go on
            self._notices.warn("lost", f"the window starts empty at step {state.progress.step}: {state.lost}")
        elif state.progress.step:
            try:
                if self._has_state:
                    kept_window.restore(merger, self._fit.module, state)
                else:
                    kept_window.refuse_missing_state()
            except (CheckpointError, ConfigError) as error:
                self._refill_or_raise(error, state.progress.step)
                merger.resume_from(state.progress)
        # after the restore: until then the files that it reads are needed by nobody
        kept_window.prune()

    def open_folder(self, files: RunFolder | None, *, until: int, read: Callable[[MergeRecord], object]) -> str:
        """Make the folder this run's own: what is of another run, or lies ahead, goes aside. Collective.

        Args:
            files: The folder, on rank 0.
            until: The last step whose record stays.
            read: Called on rank 0 with each record that stays.

        Returns:
            The run's identity.
        """
        identity = ""
        self._merged_before = self.folder / "merged"
        if files is not None:
            remove_leftovers(files.merged)
            if not self._goes_on:
                identity = files.begin(self._notices)
            else:
                state = self.state
                identity = files.resume(state.identity, self._notices)
                before = files_of(state.identity, Path(state.run_folder)) if state.run_folder else None
                records, self._merged_before = before or (files.records, files.merged)
                self._cut(files.records, until, before=records, read=read)
        # rank 0 alone looks into the folder; what it found is true of all
        identity, self._merged_before = ranks.gather((identity, self._merged_before))[0]
        return identity

    def merged_models(self) -> MergedModels:
        """The folder `merged/` that was opened, with the books of the run so far. Collective."""
        state = self.state
        models = MergedModels(self.folder / "merged", self._config.save, asdict(self._config), state.progress)
        if state.saved is not None:
            models.resume_from(state.saved, self._merged_before)
        return models

    def _cut(self, records: Path, until: int, *, before: Path, read: Callable[[MergeRecord], object]) -> None:
        state = self.state
        newest = keep_records_until(records, until, before=before, read=read)
        # said, not refused: records are a curve, and the window is whole without them
        if min(state.last_merge, until) > newest:
            self._notices.warn(
                "records",
                f"{records} lacks merges up to step {state.last_merge}, which were made: it was moved, or cut when the "
                f"run was resumed from an earlier checkpoint.",
            )

    def _read(self, plain: Mapping[str, Any]) -> RunState:
        trainer = self._trainer
        if not plain and not has_begun(trainer):
            return RunState(Progress())
        step = step_of(trainer)
        if plain:
            try:
                return RunState.from_plain(plain)
            except CheckpointError as error:
                self._refill_or_raise(error, step)
        elif self._goes_on:
            self._notices.warn(
                "no state",
                f"resumed at step {step} from a checkpoint without counters of {self._config.name!r}: the window "
                f"starts empty, samples and tokens count from here.",
            )
        return RunState(Progress(step=step))

    def _refill_or_raise(self, error: Exception, step: int) -> None:
        refill_or_raise(self._config, self._notices, error, step)
