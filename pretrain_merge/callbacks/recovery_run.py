"""One run that goes back when it diverges: what is watched, what is kept, what is done.

A `RecoveryRun` lives from the first batch of a `fit` to its end. It knows the order of these things; which hook of
Lightning's asks for what is `SpikeRecovery`'s business. Steps and loaders go on when the run goes back: only weights,
buffers and optimizer state are those of before, so the data since are skipped and no loop is rewound.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from pretrain_merge.callbacks.model_merging import ModelMerging
from pretrain_merge.callbacks.optimizer_steps import optimizer_steps
from pretrain_merge.callbacks.recovery_state import RecoverySettings, packed, unpacked
from pretrain_merge.callbacks.resuming import step_of
from pretrain_merge.callbacks.run_folder import logs_folder
from pretrain_merge.callbacks.training_loss import TrainingLoss
from pretrain_merge.errors import ConfigError, DivergenceError, printable
from pretrain_merge.files import atomic
from pretrain_merge.files.folders import move_aside
from pretrain_merge.records.disk_use import bytes_text
from pretrain_merge.runtime import ranks
from pretrain_merge.spikes import READ_EVERY, Onset, SpikeDetector
from pretrain_merge.spikes.changed_steps import ChangedSteps
from pretrain_merge.spikes.live_state import LiveState
from pretrain_merge.spikes.restart_points import RestartPoints, mean_of, most_points

_RECORDS = "recoveries.jsonl"
_NAME = "recovery"


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
    """

    attempt: int
    step: int
    onset: int
    back_to: tuple[int, ...]
    lr_factor: float
    reason: str


class RecoveryRun:
    """One call of `Trainer.fit`.

    Args:
        settings: Of the callback.
        trainer: Before its first batch.
        module: Its module.
        state: Of a run to go on from; empty where there is none.

    Attributes:
        recoveries: All attempts so far.

    Raises:
        CheckpointError: The state is of another model, or of another number of ranks.
    """

    def __init__(self, settings: RecoverySettings, trainer: Any, module: Any, state: Mapping[str, Any]) -> None:
        self._settings, self._trainer, self._module = settings, trainer, module
        self._folder = logs_folder(trainer)
        self._live = LiveState(module, trainer.optimizers, with_optimizers=settings.optimizer == "newest")
        self._points = RestartPoints(settings.distrust, settings.num_kept, settings.folder_of_rank(self._folder))
        self._detector = SpikeDetector()
        # a run that is resumed from a checkpoint without a state of ours goes on counting
        self._step = step_of(trainer)
        self._phase_since = 0  # what the loss was before this step says nothing of what it is now
        self._high_since: int | None = None  # first step of the reads in a row that told of a spike
        self.recoveries: tuple[Recovery, ...] = ()
        self._stepped, self._had_loss = False, False
        self._loss = TrainingLoss()
        if state:
            self._go_on(state)
        if not self._points.steps or (self._step % settings.every == 0 and self._points.steps[-1] != self._step):
            self._keep()  # the first one, or one that a checkpoint saved at this very step had not seen yet
        if state:
            self._write_records()  # without what came after the checkpoint
        elif trainer.is_global_zero:
            move_aside(self._folder / _RECORDS)  # of another run in this folder
        self._announce()
        self._changed: ChangedSteps | None = None
        self._borrowed = ExitStack()  # last: whoever raises above leaves nothing behind
        self.announce_step = self._borrowed.enter_context(optimizer_steps(trainer, module, self))

    # what `optimizer_steps` tells

    def step_comes(self) -> None:
        """An optimizer steps."""
        self._stepped = True

    def optimizer_steps(self, place: int, optimizer: Any) -> None:
        """An optimizer has stepped."""
        self._stepped = True

    # what the hooks ask for

    def begin_batch(self) -> None:
        """Before a batch."""
        # after all that listen to steps since training began: they see the rate that a step really used
        if self._changed is None:
            self._changed = ChangedSteps(self._module, self._factor, self.clip)

    def clip(self, optimizer: Any) -> None:
        """Clip the gradients of a step, once the run went back."""
        if self.recoveries and self._settings.clip is not None:
            self._trainer.precision_plugin.clip_grad_by_norm(optimizer, self._settings.clip)

    def end_batch(self, outputs: Any) -> None:
        """After a batch: where an optimizer stepped, watch its loss; keep a restart point, or go back.

        Raises:
            DivergenceError: It diverged once more than there are attempts.
        """
        self._loss.add(outputs)
        if not self._stepped:
            return
        loss = self._loss.take()
        self._refuse_no_loss(loss)
        self._step += 1
        self._detector.observe(self._step, loss)
        self._stepped = False
        if self._step % READ_EVERY == 0 or self._step % self._settings.every == 0:
            self._look(self._detector.read(self._step))
        if self._step % self._settings.every == 0:
            self._keep()

    def mark_phase(self, name: str) -> None:
        """What the loss was so far says nothing of what it will be."""
        self._detector.mark_change()
        self._high_since, self._phase_since = None, self._step
        self._say(f"step {self._step}: phase {name!r}; the loss is judged anew.")

    def state(self, *, alone: bool = False) -> dict[str, Any]:
        """All that a resumed run needs to do what this one will do.

        Args:
            alone: Other ranks may not be here, so that nothing can be asked of them.
        """
        alone = alone and ranks.num_ranks() > 1
        points = self._points.points if self._settings.in_checkpoints else ()
        return {
            "step": self._step,
            "high_since": self._high_since,
            "phase_since": self._phase_since,
            "recoveries": [asdict(item) | {"back_to": list(item.back_to)} for item in self.recoveries],
            "detector": {} if alone else self._detector.state_dict(),
            "points": packed(points, self._module, alone=alone),
        }

    def close(self) -> None:
        """Give back what was borrowed."""
        self._borrowed.close()
        if self._changed is not None:
            self._changed.close()
        self._points.clear()

    def _factor(self) -> float:
        """By which the rate of the step that comes is multiplied."""
        if not self.recoveries:
            return 1.0
        last, rewarm = self.recoveries[-1], self._settings.rewarm
        return last.lr_factor * min(1.0, (self._step - last.step + 1) / max(1, rewarm))

    def _refuse_no_loss(self, loss: Tensor | None) -> None:
        self._had_loss = self._had_loss or loss is not None
        if not self._had_loss:
            raise ConfigError(
                f"training_step of {type(self._module).__name__} returned no loss, and SpikeRecovery watches it. "
                f"Allowed: a tensor, or a mapping with 'loss'. With manual optimisation, return the detached loss."
            )

    def _keep(self) -> None:
        with ranks.all_or_none("keep a restart point"):
            self._points.add(self._step, self._live.copy, self._detector.state_dict())

    def _look(self, onset: Onset | None) -> None:
        """Go back once the loss stays out of bounds: a spike that passes costs nothing (`confirm`)."""
        settling = self.recoveries and self._step - self.recoveries[-1].step <= self._settings.rewarm
        if onset is None or settling:
            self._high_since = None
            return
        if self._high_since is None:
            self._high_since = max(onset.step, self._step - READ_EVERY + 1)
        if onset.last - self._high_since >= self._settings.confirm:
            self._recover(onset)

    def _recover(self, onset: Onset) -> None:
        settings, attempt = self._settings, len(self.recoveries) + 1
        points = self._points.trusted(onset.step)
        if attempt > settings.attempts or not points:
            raise DivergenceError(self._why_not(onset))
        points = points if settings.weights == "merge" else points[-1:]
        with ranks.all_or_none("go back to a restart point"):
            self._live.write(mean_of(points) if len(points) > 1 else points[-1].read())
            self._points.go_back_to(points[-1])
        if points[-1].step >= self._phase_since:
            self._detector.load_state_dict(points[-1].watch)
        else:  # its weights are of other data than those that come
            self._detector.restart()
        self._high_since = None
        steps = tuple(point.step for point in points)
        recovery = Recovery(attempt, self._step, onset.step, steps, settings.lr**attempt, onset.reason)
        self.recoveries += (recovery,)
        for callback in self._trainer.callbacks:
            if isinstance(callback, ModelMerging):  # its snapshots from before are of other weights
                callback.mark_phase(f"{_NAME} {attempt}")
        self._publish(recovery)

    def _why_not(self, onset: Onset) -> str:
        seen = f"step {onset.step}: {onset.reason}, and it stayed so until step {self._step}"
        done = f"{len(self.recoveries)} of {self._settings.attempts} attempts were made"
        if len(self.recoveries) < self._settings.attempts:
            return (
                f"{seen}; {done}, and there is no restart point from before. Allowed: a divergence after the step that "
                f"the run began or was resumed at. Resume from an older checkpoint."
            )
        return (
            f"{seen}; {done} (the last at step {self.recoveries[-1].step}, at {self.recoveries[-1].lr_factor:g} "
            f"times the learning rate). Look at the data and the model; to go on, lower the rate, or raise attempts, "
            f"and resume from a checkpoint before step {onset.step}."
        )

    def _publish(self, recovery: Recovery) -> None:
        settings = self._settings
        changes = [f"{recovery.lr_factor:g} times the learning rate"]
        changes += [f"gradients clipped at norm {settings.clip:g}"] if settings.clip is not None else []
        changes += [f"{settings.optimizer} optimizer state", f"{settings.rewarm} steps of re-warm-up"]
        where = " to ".join(map(str, dict.fromkeys((recovery.back_to[0], recovery.back_to[-1]))))
        self._say(
            f"step {recovery.step}: {recovery.reason} at step {recovery.onset}. Attempt {recovery.attempt} of "
            f"{settings.attempts}: back to the weights of step {where}, with {', '.join(changes)}; the data since are "
            f"skipped."
        )
        metrics = {
            f"{_NAME}/attempt": float(recovery.attempt),
            f"{_NAME}/onset": float(recovery.onset),
            f"{_NAME}/back_to": float(recovery.back_to[-1]),
            f"{_NAME}/lr_factor": recovery.lr_factor,
        }
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=self._trainer.fit_loop.epoch_loop._batches_that_stepped)  # P15
        self._write_records()

    def _write_records(self) -> None:
        """All attempts so far, anew: a resumed run has made those up to its checkpoint and no others."""
        path = self._folder / _RECORDS
        if self._trainer.is_global_zero and (self.recoveries or path.exists()):
            atomic.make_folder(self._folder)
            atomic.write(path, "".join(json.dumps(asdict(item)) + "\n" for item in self.recoveries))

    def _announce(self) -> None:
        settings = self._settings
        size = self._points.points[-1].num_bytes
        most = most_points(settings.distrust, settings.every, settings.num_kept)
        where = "in host memory" if settings.store == "host" else f"in {settings.folder_of_rank(self._folder)}"
        saved = ", and in each checkpoint" if settings.in_checkpoints else ""
        self._say(
            f"keeps up to {most} restart points, one every {settings.every} steps: {bytes_text(size)} each, "
            f"{bytes_text(most * size)} per rank {where}{saved}."
        )

    def _say(self, text: str) -> None:
        rank_zero_info(printable(f"{_NAME}: {text}"))

    def _go_on(self, state: Mapping[str, Any]) -> None:
        self._step, self._high_since = state["step"], state["high_since"]
        self._phase_since = state.get("phase_since", 0)  # a checkpoint of an earlier version has none
        attempts = ({**item, "back_to": tuple(item["back_to"])} for item in state["recoveries"])
        self.recoveries = tuple(Recovery(**item) for item in attempts)
        if state["detector"]:
            self._detector.load_state_dict(state["detector"])
        if not self._settings.in_checkpoints:
            return
        for step, tensors, watch, is_used in unpacked(state["points"]):
            self._live.refuse_other(tensors)
            self._points.add(step, _giving(tensors), watch, is_used=is_used)


def _giving(tensors: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: tensors
