"""One run that goes back when it diverges: what is watched, what is kept, what is done.

A `RecoveryRun` lives from the first batch of a `fit` to its end. It knows the order of these things; which hook of
Lightning's asks for what is `SpikeRecovery`'s business. Steps and loaders go on when the run goes back: only weights,
buffers and optimizer state are those of before, so the data since are skipped and no loop is rewound.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from pretrain_merge.callbacks.model_merging import ModelMerging
from pretrain_merge.callbacks.optimizer_steps import optimizer_steps
from pretrain_merge.callbacks.recovery_averages import begin_average_anew
from pretrain_merge.callbacks.recovery_log import DATA, Recovery, RecoveryLog
from pretrain_merge.callbacks.recovery_state import RecoverySettings, packed, unpacked
from pretrain_merge.callbacks.resuming import step_of
from pretrain_merge.callbacks.run_folder import logs_folder
from pretrain_merge.callbacks.training_loss import TrainingLoss
from pretrain_merge.errors import ConfigError, DivergenceError
from pretrain_merge.runtime import ranks
from pretrain_merge.spikes import READ_EVERY, Onset, SpikeDetector
from pretrain_merge.spikes.changed_steps import ChangedSteps
from pretrain_merge.spikes.live_state import LiveState
from pretrain_merge.spikes.restart_points import RestartPoint, RestartPoints, mean_of

_AT_ONCE = 5  # steps; so many the detector judges together


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
        self._log = RecoveryLog(settings, trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        with_optimizers = settings.optimizer == "newest"
        self._live = LiveState(module, trainer.optimizers, with_optimizers=with_optimizers, scaler=scaler)
        self._points = RestartPoints(
            settings.distrust, settings.num_kept, settings.folder_of_rank(logs_folder(trainer))
        )
        self._detector = SpikeDetector()
        # a run that is resumed from a checkpoint without a state of ours goes on counting
        self._step = step_of(trainer)
        self._phase_since = 0  # what the loss was before this step says nothing of what it is now
        self._high_since: int | None = None  # first step of the reads in a row that told of a spike
        self.recoveries: tuple[Recovery, ...] = ()
        self.has_stepped, self._had_loss = False, False
        self._loss = TrainingLoss()
        if state:
            self._go_on(state)
        is_due = self._step % settings.every == 0 and self._is_calm
        if not self._points.steps or (is_due and self._points.steps[-1] != self._step):
            self._keep()  # the first one, or one that a checkpoint saved at this very step had not seen yet
        if state:
            self._log.write(self.recoveries)  # without what came after the checkpoint
        else:
            self._log.move_aside()
        self._log.begin(self._points.points[-1].num_bytes)
        self._changed: ChangedSteps | None = None
        self._borrowed = ExitStack()  # last: whoever raises above leaves nothing behind
        self.announce_step = self._borrowed.enter_context(optimizer_steps(trainer, module, self))

    # what `optimizer_steps` tells

    def optimizer_steps(self, place: int, optimizer: Any) -> None:
        """An optimizer has stepped."""
        self.has_stepped = True

    # what the hooks ask for

    def begin_batch(self) -> None:
        """Before a batch."""
        # after all that listen to steps since training began: they see the rate that a step really used
        if self._changed is None:
            self._changed = ChangedSteps(self._module, self._factor, self.clip)
        # not where the run goes back: Lightning cannot load a checkpoint of FSDP2 with optimizers that are empty
        if self.recoveries and self._step == self.recoveries[-1].resumed and self._settings.optimizer == "fresh":
            self._live.begin_optimizers_afresh()

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
        if not self.has_stepped:
            return
        loss = self._loss.take()
        self._refuse_no_loss(loss)
        self._step += 1
        self._detector.observe(self._step, loss)
        self.has_stepped = False
        if self._step % READ_EVERY == 0 or self._step % self._settings.every == 0:
            self._look(self._detector.read(self._step))
        if self._step % self._settings.every == 0 and self._is_calm:
            self._keep()

    def mark_phase(self, name: str) -> None:
        """What the loss was so far says nothing of what it will be."""
        self._detector.mark_change()
        self._high_since, self._phase_since = None, self._step
        self._log.say(f"step {self._step}: phase {name!r}; the loss is judged anew.")

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
        at = self._step - last.resumed + 1
        # weights that have not moved are judged by the data alone; by a ramp of 30 steps this is a third of one
        return last.lr_factor * min(1.0, at / max(1, rewarm)) if at >= _AT_ONCE else 0.0

    @property
    def _is_calm(self) -> bool:
        """Whether weights are worth keeping: damaged ones would also drive out those that a divergence asks for."""
        return self._high_since is None and not self._is_settling

    @property
    def _is_settling(self) -> bool:
        """Whether the run went back so lately that neither its loss nor its weights say what comes of it."""
        return bool(self.recoveries) and self._step - self.recoveries[-1].resumed <= max(
            READ_EVERY, self._settings.rewarm
        )

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
        if self._is_settling:
            if onset is not None:
                self._blame_data(onset)
            return
        self._distrust_skipped()
        if onset is None:
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
            raise DivergenceError(self._log.why_not(onset, self._step, self.recoveries))
        self._points.forget(onset.step)
        points = points if settings.weights == "merge" else points[-1:]
        self._go_back(points)
        steps, factor = tuple(point.step for point in points), _lr_factor(self.recoveries) * settings.lr
        recovery = Recovery(attempt, self._step, onset.step, steps, factor, onset.reason, resumed=self._step)
        self.recoveries += (recovery,)
        self._log.publish(recovery)
        self._log.write(self.recoveries)

    def _blame_data(self, onset: Onset) -> None:
        """Go back to the newest weights from before the onset: those of before it see such a loss before they move."""
        *others, last = self.recoveries
        newest = self._points.newest_before(last.onset)
        # no point: `in_checkpoints` is off, and a resumed run has none but its checkpoint
        if newest is None or onset.step > last.resumed + _AT_ONCE:  # later the rate is high enough to have done it
            return
        if last.cause == DATA and self._step - last.step >= self._settings.distrust:
            return  # data that stay as they are would be waited for for ever
        self._go_back([newest])
        self._points.mark_used(newest.step)
        factor = _lr_factor(others)
        told = replace(last, back_to=(newest.step,), lr_factor=factor, resumed=self._step, cause=DATA)
        self.recoveries = (*others, told)
        if last.cause != DATA:  # once, and not at each read while they are bad
            self._log.blame_data(told)
        self._log.write(self.recoveries)

    def _distrust_skipped(self) -> None:
        """Where the data were not to blame, points between the one that was gone back to and the onset are damaged."""
        if self.recoveries and self.recoveries[-1].cause != DATA:
            last = self.recoveries[-1]
            self._points.forget(last.back_to[-1] + 1, last.onset)
            self._points.mark_used(last.back_to[-1])

    def _go_back(self, points: Sequence[RestartPoint]) -> None:
        with ranks.all_or_none("go back to a restart point"):
            self._live.write(mean_of(points) if len(points) > 1 else points[-1].read())
        if points[-1].step >= self._phase_since:
            # as if the steps since had not been: counted as unknown, they would leave too few to judge the next by
            self._detector.load_state_dict({**points[-1].watch, "newest": self._step})
        else:  # its weights are of other data than those that come
            self._detector.restart()
        self._high_since = None
        for callback in self._trainer.callbacks:
            if isinstance(callback, ModelMerging):  # its snapshots from before are of other weights
                callback.mark_phase(f"recovery at step {self._step}")
            begin_average_anew(callback, self._module)

    def _go_on(self, state: Mapping[str, Any]) -> None:
        self._step, self._high_since = state["step"], state["high_since"]
        self._phase_since = state.get("phase_since", 0)  # a checkpoint of an earlier version has none
        # one of an earlier version did not wait, and told no cause
        attempts = (
            {"resumed": item["step"], **item, "back_to": tuple(item["back_to"])} for item in state["recoveries"]
        )
        self.recoveries = tuple(Recovery(**item) for item in attempts)
        if state["detector"]:
            self._detector.load_state_dict(state["detector"])
        if not self._settings.in_checkpoints:
            return
        for step, tensors, watch, is_used in unpacked(state["points"]):
            self._live.refuse_other(tensors)
            self._points.add(step, _giving(tensors), watch, is_used=is_used)


def _lr_factor(recoveries: Sequence[Recovery]) -> float:
    return recoveries[-1].lr_factor if recoveries else 1.0


def _giving(tensors: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: tensors
