"""The calls of `fit` that one callback sees, one after another: the run that is on, and what the next may need of it.

This module knows when a run begins and ends, however it ends. What happens in one is `Run`'s business, and which hook
of Lightning's asks for what is `ModelMerging`'s.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

from pretrain_merge.callbacks.borrowing import wrapped
from pretrain_merge.callbacks.fit import Fit
from pretrain_merge.callbacks.rehearsal import Rehearsal
from pretrain_merge.callbacks.resuming import has_begun
from pretrain_merge.callbacks.run import Run
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce


class Fits:
    """At most one run at a time.

    Args:
        fit_of: A `Fit` of a Trainer and its module, with the settings of the callback.
        notices: What the user was told already.

    Attributes:
        run: Between `on_train_start` and the end of `fit`.
        last_run: That one, or the one that ended last: a checkpoint saved after `fit` needs its window.
        state: Of the checkpoint that is resumed, or as it was remembered last.
    """

    def __init__(self, fit_of: Callable[[Any, Any], Fit], notices: WarnOnce) -> None:
        self._fit_of = fit_of
        self._notices = notices
        self.run: Run | Rehearsal | None = None
        self.last_run: Run | Rehearsal | None = None
        self.state: dict[str, Any] = {}
        self._phase_to_come: str | None = None  # marked before a run began
        self._borrowed = ExitStack()  # the fit loop's `run`, and all that a run has; given back when `fit` ends

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the callback has: a run is of one, with its threads, its files and the lock of its folder."""
        return vars(self) | {"run": None, "last_run": None, "_borrowed": ExitStack()}

    def mark_phase(self, name: str) -> None:
        """Mark a phase of the run that is on, or of the next one."""
        if self.run is not None:
            self.run.merger.mark_phase(name)
        else:
            self._phase_to_come = name

    def forget_other(self, trainer: Any, module: Any) -> None:
        """Forget the state of another Trainer's run, or model (P24); that of a resumed run is loaded after this."""
        # P24: one callback serves several Trainers; what is of another model must not reach this run
        if not has_begun(trainer) or self.last_run is None or self.last_run.module is not module:
            self.state = {}

    def watch(self, trainer: Any, module: Any) -> None:
        """Hear when the fit loop is through, which Lightning has no hook for where no step was left."""
        self._borrowed.enter_context(wrapped(trainer.fit_loop, "run", partial(self._through, trainer, module)))

    def begin(self, trainer: Any, module: Any) -> None:
        """Begin a run, or go on with one; makes the merge that its checkpoint owes."""
        # the Trainer's counters go on, and what they counted so far was the steps of a model that is gone
        is_new_model = self.last_run is not None and self.last_run.module is not module and trainer.ckpt_path is None
        if self.last_run is not None:
            # its window may be large, and the new run takes one of its own
            self.last_run.release()
            self.last_run = None
        fit = self._fit_of(trainer, module)
        run_of = Rehearsal if trainer.fast_dev_run else partial(Run, plain=self.state, is_new_model=is_new_model)
        self.run = self.last_run = run_of(fit)
        self._borrowed.callback(self.run.close)
        self.run.catch_up()
        phase, self._phase_to_come = self._phase_to_come, None
        if phase not in (None, self.run.merger.phase):
            self.run.merger.mark_phase(phase)

    def finish(self, trainer: Any) -> None:
        """Training has ended as it should."""
        if self.run is not None:
            self.run.finish()
        with ranks.all_or_none("keep the window of the end"):
            self._remember(
                lost="" if trainer.checkpoint_callbacks else "the run before ended, and keeps no checkpoints."
            )

    def break_off(self, trainer: Any, exception: BaseException) -> None:
        """Training has ended with an exception; Lightning may save a checkpoint yet, and calls no `teardown`."""
        # those without this choice, as OnExceptionCheckpoint, may do nothing else
        will_save = any(getattr(item, "save_on_exception", True) for item in trainer.checkpoint_callbacks)
        reason, is_known = (
            f"the run before ended with {type(exception).__name__}.",
            ranks.is_known_to_all_ranks(exception),
        )
        try:
            with ranks.all_or_none("keep the window") if is_known and will_save else nullcontext():
                self._remember(lost="" if will_save else reason)
        except Exception as error:
            if not is_known:
                raise
            self._notices.warn("lost", f"the window is not kept: {error}")
            self._remember(lost=f"{reason} {error}")  # the checkpoint is saved without it
        finally:
            self.end()

    def state_for_checkpoint(self) -> dict[str, Any]:
        """The state now; the files that it refers to are written, and a checkpoint that is being saved needs them."""
        # every rank is asked, and all must know where one cannot write; after an exception not every rank may be here
        with ranks.all_or_none("keep the window for a checkpoint") if self.run is not None else nullcontext():
            if self.run is not None:
                self.run.meet()
            self._remember()
            if self.last_run is not None:
                self.last_run.announce()
        return dict(self.state)

    def end(self) -> None:
        """Free the window and give back what was borrowed; what a checkpoint may need was remembered."""
        self.run = None
        self._borrowed.close()

    def _through(self, trainer: Any, module: Any, users_run: Callable[[], None]) -> None:
        users_run()
        # Lightning runs no hook of training where a resumed run has no step left, and this one may owe its last
        # merge; a process that was killed at its end also left a lock and the files of a disk store
        if self.run is None and self.state and trainer.ckpt_path is not None and not trainer.fast_dev_run:
            self.begin(trainer, module)
            self.finish(trainer)

    def _remember(self, *, lost: str = "") -> None:
        """The state as it is now; writes the files that it refers to, unless the window is to be lost."""
        if self.run is not None:
            self.state = self.run.state(lost=lost)
