"""What a run that goes back says of it: in the log, in the loggers, in its folder, and in the error that ends it.

This module knows words and files. What is done, and when, is `RecoveryRun`'s business.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from pretrain_merge.callbacks.recovery_state import RecoverySettings
from pretrain_merge.callbacks.run_folder import logs_folder
from pretrain_merge.errors import printable
from pretrain_merge.files import atomic
from pretrain_merge.files.folders import move_aside
from pretrain_merge.records.disk_use import bytes_text
from pretrain_merge.spikes import Onset
from pretrain_merge.spikes.restart_points import most_points, remove_leftovers

_RECORDS = "recoveries.jsonl"
_NAME = "recovery"
DATA = "data"


@dataclass(frozen=True)
class Recovery:
    """One attempt: where the run went back, and what it changed.

    Attributes:
        attempt: Its number, from 1.
        step: After which the run went back.
        onset: First step of the divergence.
        back_to: Steps after which the weights were that it went on with: one, or those of a mean.
        lr_factor: By which every rate is multiplied from here on.
        reason: What was seen.
        resumed: After which step the rate began to rise: later than `step` where the data were bad still.
        cause: "data", where the weights of before saw as high a loss before they had moved; None: it was the rate, or
            data that were good again by then.
    """

    attempt: int
    step: int
    onset: int
    back_to: tuple[int, ...]
    lr_factor: float
    reason: str
    resumed: int
    cause: str | None = None


class RecoveryLog:
    """Of one call of `Trainer.fit`.

    Args:
        settings: Of the callback.
        trainer: Its folder and loggers are written to.
    """

    def __init__(self, settings: RecoverySettings, trainer: Any) -> None:
        self._settings, self._trainer = settings, trainer
        self._folder = logs_folder(trainer)

    def begin(self, num_bytes: int) -> None:
        """A run begins: what its restart points take.

        Args:
            num_bytes: Of one of them.
        """
        settings = self._settings
        most = most_points(settings.distrust, settings.every, settings.num_kept)
        where = "in host memory" if settings.store == "host" else f"in {settings.folder_of_rank(self._folder)}"
        saved = ", and in each checkpoint" if settings.in_checkpoints else ""
        self.say(
            f"keeps up to {most} restart points, one every {settings.every} steps: {bytes_text(num_bytes)} each, "
            f"{bytes_text(most * num_bytes)} per rank {where}{saved}."
        )

    def remove_leftovers(self) -> None:
        """Of a process that was killed: what it had half written, and the files of its restart points."""
        if self._trainer.is_global_zero:
            atomic.remove_leftovers(self._folder, f"{_RECORDS}.*")
        points = self._settings.folder_of_rank(self._folder)
        if points is not None:
            remove_leftovers(points)

    def move_aside(self) -> None:
        """Records of another run in this folder."""
        if self._trainer.is_global_zero:
            move_aside(self._folder / _RECORDS)

    def write(self, recoveries: Sequence[Recovery]) -> None:
        """All attempts so far, anew: a resumed run has made those up to its checkpoint and no others."""
        path = self._folder / _RECORDS
        if self._trainer.is_global_zero and (recoveries or path.exists()):
            atomic.make_folder(self._folder)
            atomic.write(path, "".join(json.dumps(asdict(item)) + "\n" for item in recoveries))

    def publish(self, recovery: Recovery) -> None:
        """An attempt, in the log and in the loggers."""
        settings = self._settings
        changes = [_rate(recovery)] if recovery.lr_factor != 1.0 else []
        changes += [f"gradients clipped at norm {settings.clip:g}"] if settings.clip is not None else []
        changes += [f"{settings.optimizer} optimizer state", f"{settings.rewarm} steps of re-warm-up"]
        where = " to ".join(map(str, dict.fromkeys((recovery.back_to[0], recovery.back_to[-1]))))
        self.say(
            f"step {recovery.step}: {recovery.reason} at step {recovery.onset}. Attempt {recovery.attempt} of "
            f"{settings.attempts}: back to the weights of step {where}, with {', '.join(changes)}; the data since are "
            f"skipped."
        )
        self._log_metrics(recovery)

    def blame_data(self, recovery: Recovery) -> None:
        """The weights of before have told the cause."""
        self.say(
            f"step {recovery.resumed}: the weights of before see a loss as high, so the data are to blame. Back to the "
            f"weights of step {recovery.back_to[-1]}, at {_rate(recovery)}; the data since are skipped, and those that "
            f"come until they are better, for {self._settings.distrust} steps at most."
        )
        self._log_metrics(recovery)

    def _log_metrics(self, recovery: Recovery) -> None:
        metrics = {
            f"{_NAME}/attempt": float(recovery.attempt),
            f"{_NAME}/onset": float(recovery.onset),
            f"{_NAME}/back_to": float(recovery.back_to[-1]),
            f"{_NAME}/lr_factor": recovery.lr_factor,
        }
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=self._trainer.fit_loop.epoch_loop._batches_that_stepped)  # P15

    def why_not(self, onset: Onset, step: int, recoveries: Sequence[Recovery]) -> str:
        """Why the run ends instead of going back once more."""
        seen = f"step {onset.step}: {onset.reason}, and it stayed so until step {step}"
        done = f"{len(recoveries)} of {self._settings.attempts} attempts were made"
        if len(recoveries) < self._settings.attempts:
            return (
                f"{seen}; {done}, and there is no restart point from before. Allowed: a divergence after the step that "
                f"the run began or was resumed at. Resume from an older checkpoint."
            )
        last = recoveries[-1]
        told = ", where the data were to blame" if last.cause == DATA else ""
        return (
            f"{seen}; {done} (the last at step {last.step}, at {_rate(last)}{told}). Look "
            f"at the data and the model; to go on, lower the rate, or raise attempts, and resume from a checkpoint "
            f"before step {onset.step}."
        )

    def say(self, text: str) -> None:
        """On the first rank."""
        rank_zero_info(printable(f"{_NAME}: {text}"))


def _rate(recovery: Recovery) -> str:
    factor = recovery.lr_factor
    return "the learning rate of before" if factor == 1.0 else f"{factor:g} times the learning rate"
