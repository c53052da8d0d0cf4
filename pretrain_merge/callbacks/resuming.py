"""The start of a run: what its checkpoint says, and what is left in its folder of window, records and merged models.

This module knows what may have become of a run's files between two processes, and says so. It knows no hooks.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain_merge.cadence import Progress
from pretrain_merge.callbacks.kept_window import DurableWindow, RunState
from pretrain_merge.config import MergeConfig
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files.atomic import remove_leftovers
from pretrain_merge.files.folders import move_aside
from pretrain_merge.merged_models.retention import MergedModels
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.records import MergeRecord, keep_records_until
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import Notices


def run_folder(config: MergeConfig, trainer: Any) -> Path:
    """Where records, merged models and the window go. Collective."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast: on every rank
    return folder if config.name == MergeConfig.name else folder / config.name


def refill_or_raise(config: MergeConfig, notices: Notices, error: Exception, step: int) -> None:
    """Raise what keeps a window from being restored, or say so once, as `on_missing` wants it."""
    if config.on_missing == "refill":
        notices.once("refill", f"resumed at step {step}: the window starts empty (on_missing: refill). {error}")
        return
    raise type(error)(
        f"the window of {config.name!r} at step {step} cannot be restored: {error} Point window_folder to the "
        f"folder that holds its files, or start with an empty window by on_missing='refill'."
    ) from error


class Start:
    """A run that begins, or goes on from a checkpoint.

    Args:
        config: Of the callback.
        notices: What the user was told already.
        trainer: A Trainer before its first batch.
        plain: Our state in the checkpoint; empty where there is none.

    Attributes:
        folder: Of this run.
        state: Where it stands.

    Raises:
        CheckpointError: The state is damaged.
    """

    def __init__(self, config: MergeConfig, notices: Notices, trainer: Any, plain: Mapping[str, Any]) -> None:
        self._config, self._notices, self._trainer = config, notices, trainer
        self._has_state = bool(plain)
        with ranks.together("read the state of the run"):
            self.state = self._read(plain)
        self.folder = run_folder(config, trainer)

    def fill(self, merger: RollingMerger, module: Any, durable: DurableWindow) -> None:
        """Bring back the window that the checkpoint needs.

        Raises:
            CheckpointError: It cannot be restored.
            ConfigError: The configuration makes other snapshots.
        """
        state = self.state
        if state.lost and self._trainer.ckpt_path is None:  # `fit` once more, not a checkpoint that must go on
            self._notices.once("lost", f"the window starts empty at step {state.progress.step}: {state.lost}")
        elif state.progress.step:
            try:
                if self._has_state:
                    durable.restore(merger, module, state)
                else:
                    durable.refuse_lost_state()
            except (CheckpointError, ConfigError) as error:
                self._refill_or_raise(error, state.progress.step)
                merger.resume_from(state.progress)
        durable.prune()

    def merged_models(self) -> MergedModels:
        """The folder `merged/`, with the books of the run so far. Collective."""
        state = self.state
        models = MergedModels(self.folder / "merged", self._config.save, asdict(self._config), state.progress)
        if state.saved is not None:
            models.go_on_from(state.saved, Path(state.run_folder) / "merged")
        return models

    def clear(self, records: Path, *, until: int) -> list[MergeRecord]:
        """Make the folder this run's own, on rank 0: what is of another run, or lies ahead, goes aside.

        Args:
            records: The file that records are appended to.
            until: The last step whose record stays.

        Returns:
            The records that stay.
        """
        state = self.state
        remove_leftovers(self.folder / "merged")
        if state.progress.step == 0:
            for path in (records, self.folder / "merged"):
                if aside := move_aside(path):
                    self._notices.once(str(path), f"{path} is of an earlier run; it is now {aside}.")
            return []
        kept = keep_records_until(records, until, before=Path(state.run_folder) / records.name)
        if min(state.last_merge, until) > (kept[-1].step if kept else 0):
            self._notices.once(
                "records",
                f"{records} lacks merges up to step {state.last_merge}, which were made: it was moved, or cut when the "
                f"run was resumed from an earlier checkpoint.",
            )
        return kept

    def _read(self, plain: Mapping[str, Any]) -> RunState:
        trainer = self._trainer
        if trainer.global_step == 0:
            return RunState(Progress())
        # with optimizers stepped by hand, `global_step` counts each of them
        by_hand = not trainer.lightning_module.automatic_optimization
        step = trainer.fit_loop.epoch_loop._batches_that_stepped if by_hand else trainer.global_step
        if plain:
            try:
                return RunState.from_plain(plain)
            except CheckpointError as error:
                self._refill_or_raise(error, step)
        else:
            self._notices.once(
                "no state",
                f"resumed at step {step} from a checkpoint without counters of {self._config.name!r}: the window "
                f"starts empty, samples and tokens count from here.",
            )
        return RunState(Progress(step=step))

    def _refill_or_raise(self, error: Exception, step: int) -> None:
        refill_or_raise(self._config, self._notices, error, step)
