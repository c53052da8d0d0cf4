"""One run from its first batch to its end: steps counted, snapshots taken, merges measured and published, files kept.

A `Run` is built whole or not at all, and gives back what it borrowed when it is closed. It knows the order of these
things and nothing of how a merge is computed or measured; Lightning's hooks are `ModelMerging`'s business.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from pretrain_merge.callbacks import merge_point
from pretrain_merge.callbacks.announcements import Announcements
from pretrain_merge.callbacks.auto_spans import AutoSpans
from pretrain_merge.callbacks.borrowing import wrapped
from pretrain_merge.callbacks.clock import Clock
from pretrain_merge.callbacks.fit import Fit
from pretrain_merge.callbacks.forecasts import RunForecasts
from pretrain_merge.callbacks.kept_window import KeptWindow
from pretrain_merge.callbacks.monitors import Monitors
from pretrain_merge.callbacks.on_publish import OnPublish
from pretrain_merge.callbacks.optimizer_steps import optimizer_steps
from pretrain_merge.callbacks.publisher import Publisher
from pretrain_merge.callbacks.resuming import Start
from pretrain_merge.callbacks.run_folder import RunFolder
from pretrain_merge.callbacks.run_state import RunState
from pretrain_merge.callbacks.training_loss import TrainingLoss
from pretrain_merge.errors import WindowNotReadyError
from pretrain_merge.evaluation import evaluate
from pretrain_merge.files import atomic
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.records import RAW, MergeRecord, Recipe
from pretrain_merge.records.thinning import History
from pretrain_merge.runtime import ranks
from pretrain_merge.window.spike_breaks import Damage


class Run:
    """One call of `Trainer.fit` that trains.

    Args:
        fit: The call.
        plain: Our state in the checkpoint, or of the `fit` before; empty where there is none.
        is_new_model: Whether what the Trainer counted so far were the steps of another model.

    Attributes:
        clock: Counts steps, samples and tokens, and knows the rate of each step.
        merger: Holds the window.
        last_record: What was measured at the last merge point; None before the first.

    Raises:
        CheckpointError: The window cannot be restored, or the run's folder not be written.
        ConfigError: The configuration makes other snapshots than the window holds.
    """

    clock: Clock
    merger: RollingMerger

    def __init__(self, fit: Fit, plain: Mapping[str, Any], *, is_new_model: bool = False) -> None:
        self._fit, self.module = fit, fit.module
        self.last_record: MergeRecord | None = None
        # P32: the module's own hook runs after ours, and may clip or project
        self._may_change_weights_after_us = not fit.module.on_train_batch_end.__module__.endswith(".core.hooks")
        self._loss = TrainingLoss()
        self._is_unobserved = False  # a step that was counted, while the module's own hook has not run yet
        start = Start(fit, plain)
        state, folder = start.state, start.folder
        self._last_merge = state.last_merge  # step of the last record; what is younger is owed
        self._forecasts = forecasts = fit.forecasts.of_a_run()
        self._auto = AutoSpans(fit.settings)
        self._not_saved = {view.name for view in forecasts.views}  # views that only forecasts need
        with ExitStack() as borrowed:
            window = fit.settings.window_in(folder, forecasts.views)
            self.merger = borrowed.enter_context(closing(RollingMerger(window)))
            self._window = self.merger.window  # for each step, and through properties it takes calls
            # P36: before the first step, or what is frozen then would be missed
            self.merger.watch(fit.module, fit.trainer.optimizers)
            begins = is_new_model and state.progress.step > 0
            self.merger.resume_from(state.progress, begins="the fit before was of another model" if begins else "")
            share, counters = evaluate.data_share(fit.trainer), (state.progress, state.pending, state.lr)
            self.clock = Clock(fit.settings.cadences, fit.tokens_per_batch, *counters, share=share)
            steps = optimizer_steps(fit.trainer, fit.module, self.clock)
            self.optimizer_steps = borrowed.enter_context(steps)
            if self._may_change_weights_after_us:
                borrowed.enter_context(wrapped(fit.trainer.fit_loop.epoch_loop, "on_advance_end", self._after_batch))
            monitors = Monitors(fit.trainer, f"{fit.config.name}/")
            borrowed.enter_context(monitors.waiting())
            with ranks.all_or_none("open the run's folder"):
                self._open(start, forecasts, monitors, borrowed)
            self._borrowed = borrowed.pop_all()  # given back in `close`, the last first

    @property
    def best_model_path(self) -> Path | None:
        """The best merged model on disk."""
        return self._merged_models.best_path

    def catch_up(self) -> None:
        """Make the snapshot and the merge that the checkpoint owes: it was saved before they were, say by a signal."""
        if self.merger.progress.step < self.clock.progress.step:
            self.merger.observe(self.module, self.clock.progress, lr=self.clock.lr)
        if self._owes_merge:
            self._merge_if_due()
            if self._owes_merge and ranks.any_rank(self._fit.trainer.received_sigterm):
                raise SIGTERMException  # Lightning would look only after another step, which would bury the merge

    def step(self, batch: Any, outputs: Any) -> None:
        """After a batch: count it, and observe the step once its weights are final; at a merge point, publish."""
        has_stepped = self.clock.batch_ends(batch, since=self._window.since) is not None
        if has_stepped and not self._may_change_weights_after_us:
            self._observe(self._loss.take_with(outputs, is_copy=self.module.automatic_optimization))
        else:
            self._loss.add(outputs)
            self._is_unobserved = has_stepped

    def meet(self) -> None:
        """All ranks are here, before each of them gives its `state`."""
        self.merger.meet()

    def finish(self) -> None:
        """Training has ended: save merges of the newest snapshots where the user asked for it; say why there are none.

        Raises:
            CheckpointError: The disk refuses.
        """
        self._withdraw(self.merger.judge_rest())
        merger, newest = self._auto.tell(self.merger), self.merger.window.newest
        if self._fit.config.save.at_end and newest is not None:
            try:
                with ranks.all_or_none("save merged models at the end"), merger.swap(self.module) as merge_view:
                    if self._fit.config.save.raw:
                        progress = self.clock.progress
                        self._merged_models.save_last(self.module, RAW, progress, Recipe((progress.step,), (1.0,)))
                    for view in merger.views:
                        if view not in self._not_saved and merger.why_not(view) is None:
                            self._merged_models.save_last(self.module, view, newest.progress, merge_view(view))
            except WindowNotReadyError as error:  # another callback changed the model when training ended
                self._fit.notices.warn("end", f"no merged model is saved at the end: {error}")
        self._on_publish.finish()
        self._publisher.finish()
        self._merged_models.finish()
        self._announcements.end(self.last_record, self.best_model_path)
        if best_here := ranks.gather(self._auto.advice())[0]:
            self._fit.notices.warn("auto", best_here)
        if not self._last_merge:
            self._announcements.no_merge(self.merger, self.clock)

    def state(self, *, lost: str = "") -> dict[str, Any]:
        """The state as it is now, as plain values; writes the files that it refers to.

        Args:
            lost: Why the window is not to be kept; empty: it is.

        Raises:
            CheckpointError: The disk refuses.
        """
        manifest = None if lost else self._kept_window.keep(self.merger)
        return RunState(
            progress=self.clock.progress,
            pending=self.clock.pending,  # of this rank: exact on resume where all ranks' batches are of one size
            lr=self.clock.lr_by_optimizer,
            identity=self._identity,
            run_folder=str(self._kept_window.run_folder),
            window_folder=str(self._kept_window.folder),
            window=manifest.to_plain() if manifest is not None else None,
            lost=lost,
            saved=self._merged_models.state(),
            last_merge=self._last_merge,
        ).to_plain()

    def announce(self) -> None:
        """A checkpoint that is being written will need the window that `state` kept; also after the run."""
        self._kept_window.announce()

    def close(self) -> None:
        """Free the window and give back what was borrowed; what a checkpoint may need was kept by `state`."""
        self._borrowed.close()

    def release(self) -> None:
        """The checkpoints of its Trainer do not matter any more."""
        self._kept_window.release()

    def _open(self, start: Start, forecasts: RunForecasts, monitors: Monitors, borrowed: ExitStack) -> None:
        """Window, records and merged models of the run."""
        fit, state, folder = self._fit, start.state, start.folder
        files = None
        if fit.trainer.is_global_zero:
            files = RunFolder(folder)
            borrowed.callback(files.close)
        users = fit.config.window_folder
        where = atomic.named_by_user(users) if users else folder / "window"
        self._announcements = Announcements(fit, folder)
        self._kept_window = KeptWindow(fit.trainer, folder, where, keep=fit.config.keep_windows)
        try:
            borrowed.callback(self._kept_window.close)
            start.fill(self.merger, self._kept_window)
            self._announcements.begin(self.merger, state.progress, monitors)
            until = state.progress.step - self._owes_merge
            history = History()

            def read(record: MergeRecord) -> None:
                forecasts.append(record)
                self._auto.append(record)
                history.append(record)

            self._identity = start.open_folder(files, until=until, read=read)
            if files is not None:
                files.keep_config(asdict(fit.config))
            self._merged_models = start.merged_models()
            self._publisher = Publisher(fit, forecasts, monitors, folder / "merges.jsonl", history)
            self._on_publish = OnPublish(fit, self._publisher.publish_late)
            borrowed.callback(self._on_publish.close)
            self._merged_models.users = self._on_publish
            self._on_publish.go_on(self._merged_models.kept)
        except BaseException:
            self._kept_window.release()
            raise

    @property
    def _owes_merge(self) -> bool:
        """Whether the merge of the step so far was not recorded, as far as is known: it may be observed yet."""
        step = self.clock.progress.step
        return self._last_merge < step and (self.merger.progress.step < step or self.merger.merge_is_due())

    def _after_batch(self, advance_end: Callable[..., None], *arguments: Any) -> None:
        """After the module's own hook, before validation."""
        if self._is_unobserved:
            self._is_unobserved = False
            self._observe(self._loss.take())
        advance_end(*arguments)

    def _observe(self, loss: Tensor | float | None) -> None:
        merger, clock = self.merger, self.clock
        before = merger.progress
        is_snapshot = merger.observe(self.module, clock.progress, lr=clock.lr)
        damage = merger.judge(before, loss, is_copy=True)
        if damage is not None:
            self._withdraw(damage)
        if is_snapshot:  # without one nothing is due
            self._merge_if_due()

    def _withdraw(self, damage: Damage | None) -> None:
        """Merges that were saved before a spike was seen held snapshots that the window has dropped since."""
        if damage is not None:
            self._merged_models.withdraw(damage.after, damage.reason)

    def _merge_if_due(self) -> None:
        if not self.merger.merge_is_due():
            return
        step = self.merger.progress.step
        # rank 0 writes and logs: the others must not go on where it could not
        with ranks.all_or_none(f"merge at step {step}"):
            record = self._measure()
            if record is None and not ranks.any_rank(self._fit.trainer.received_sigterm):
                record = self._measure()  # after a signal that lets the run go on
            if record is not None:
                record = replace(self._auto.with_choices(record), withdrawn=self._merged_models.withdrawn)
                self.last_record, self._last_merge = self._publisher.publish(record), record.step
                self._announcements.merged(self.last_record)
                self._on_publish.collect()
                return
        text = f"step {step}: a signal broke off the merge. A run that is resumed from here makes it."
        self._fit.notices.warn("broken off", text)

    def _measure(self) -> MergeRecord | None:
        """Raw and every view on the same batches; None where a signal ended the evaluation early."""
        fit, age = self._fit, self.merger.progress.step - self.merger.window.since.step
        reads = self._forecasts.reads(self.last_record, age)
        return merge_point.measured(
            fit.config,
            fit.trainer,
            fit.module,
            self._auto.tell(self.merger),
            views=[view for view in self.merger.views if reads or view not in self._not_saved],
            evaluators=fit.evaluators,
            notices=fit.notices,
            keep=self._save_if_due,
        )

    def _save_if_due(self, view: str, recipe: Recipe, metrics: Mapping[str, float], may_lack_best: bool) -> None:
        if view not in self._not_saved:
            self._merged_models.save_if_due(
                self.module,
                view,
                self.merger.progress,
                recipe,
                metrics,
                may_lack_best=may_lack_best,
                trusted_until=self.merger.trusted_until,
            )
