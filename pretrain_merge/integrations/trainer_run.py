"""One call of a Hugging Face Trainer's `train`: steps observed, merges measured and published, files kept.

This module knows the order of these things. It knows no events, and nothing of how the Trainer evaluates.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import Tensor

from pretrain_merge.cadence import Progress
from pretrain_merge.callbacks import merge_point, refusals
from pretrain_merge.callbacks.auto_spans import AutoSpans
from pretrain_merge.callbacks.borrowing import wrapped
from pretrain_merge.callbacks.forecasts import RunForecasts
from pretrain_merge.callbacks.resuming import refill_or_raise
from pretrain_merge.callbacks.run_folder import RunFolder, files_of
from pretrain_merge.callbacks.run_state import RunState
from pretrain_merge.callbacks.training_loss import TrainingLoss
from pretrain_merge.config import MergeConfig, Settings
from pretrain_merge.errors import CheckpointError, ConfigError, UnsupportedModelError, WindowNotReadyError
from pretrain_merge.evaluation.evaluate import Evaluator
from pretrain_merge.files.atomic import named_by_user, remove_leftovers
from pretrain_merge.integrations import trainer_evaluation
from pretrain_merge.integrations.trainer_checkpoints import TrainerCheckpoints, find_state
from pretrain_merge.merged_models.retention import MergedModels
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.parameters import is_sharded
from pretrain_merge.records import RAW, MergeRecord, Recipe, append_record, keep_records_until
from pretrain_merge.resume.manifest import Manifest
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.window.spike_breaks import Damage

_open_runs: "WeakSet[TrainerRun]" = WeakSet()  # a run that an exception ended keeps its locks, and is told by nobody


class TrainerRun:
    """A run that begins, or goes on from a checkpoint.

    Args:
        settings: Of the callback.
        evaluators: Further evaluations by name.
        forecasts: Forecasts without a history.
        notices: What the user was told already.
        trainer: A Trainer before its first step.
        ignored: Keys of the model's outputs that its evaluations ignore.
        resumed: The checkpoint that it goes on from, where it was named.

    Attributes:
        merger: Holds the window.
        last_record: What was measured at the last merge point; None before the first.

    Raises:
        CheckpointError: The window cannot be restored, or the run's folder not be written.
        ConfigError: The configuration makes other snapshots than the window holds, or counts what the Trainer does not.
        UnsupportedModelError: The model, its optimizer or its engine cannot be merged exactly.
    """

    def __init__(
        self,
        settings: Settings,
        evaluators: Mapping[str, Evaluator],
        forecasts: RunForecasts,
        notices: WarnOnce,
        trainer: Any,
        ignored: list[str] | None,
        resumed: Path | None,
    ) -> None:
        self._settings, self._config, self._evaluators, self._notices = settings, settings.config, evaluators, notices
        self._trainer, self._model, self._ignored = trainer, trainer.model, ignored
        self.last_record: MergeRecord | None = None
        _refuse(settings, trainer)
        output = Path(trainer.args.output_dir).absolute()  # for good, should the run change directory
        self._folder = named_by_user(output) if self._config.name == MergeConfig.name else output / self._config.name
        # P8: an exception leaves train() without an event, and its locks would refuse the next call
        for other in [run for run in _open_runs if run._folder == self._folder]:
            other.close()
        self._forecasts = forecasts.of_a_run()
        self._auto = AutoSpans(settings)
        self._not_saved = {view.name for view in self._forecasts.views}  # views that only forecasts need
        users = self._config.window_folder
        self._window_folder = named_by_user(users) if users else self._folder / "window"
        with ExitStack() as borrowed:
            window = settings.window_in(self._folder, self._forecasts.views)
            self.merger = borrowed.enter_context(closing(RollingMerger(window)))
            # P36: what is frozen at this moment may train later; the optimizer knows it
            self.merger.watch(self._model, [trainer.optimizer])
            # no event tells of a loss, and those that the Trainer logs were waited for
            self._loss = TrainingLoss()
            borrowed.enter_context(wrapped(trainer, "training_step", self._noting_loss))
            with ranks.all_or_none("open the run's folder"):
                self._checkpoints = None
                if ranks.rank() == 0:
                    self._checkpoints = TrainerCheckpoints(output, self._window_folder, self._config.keep_windows)
                    borrowed.callback(self._checkpoints.close)
                state = self._filled(resumed)
                self._identity = self._open_folder(state, borrowed)
            self._last_merge, self._kept = state.last_merge, 0
            self._merged_models = MergedModels(
                self._folder / "merged", self._config.save, asdict(self._config), state.progress
            )
            if state.saved is not None:
                self._merged_models.resume_from(state.saved, Path(state.run_folder) / "merged")
            # complete: what failed before this line was given back by the block
            self._borrowed = borrowed.pop_all()
        _open_runs.add(self)

    @property
    def best_model_path(self) -> Path | None:
        """The best merged model on disk."""
        return self._merged_models.best_path

    def catch_up(self) -> None:
        """Make the merge that the checkpoint owes: a signal broke it off before."""
        if self._last_merge < self.merger.progress.step:
            self._merge_if_due()

    def step(self, lr: tuple[float, ...]) -> None:
        """After a step of the optimizer, with the rates that it used: observe it; at a merge point, publish."""
        trainer, before = self._trainer, self.merger.progress
        # the Trainer counts no samples; the last batch of an epoch may be smaller, which this cannot see
        batch = trainer._train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
        tokens = int(trainer.state.num_input_tokens_seen)
        now = Progress(trainer.state.global_step, before.samples + batch, tokens)
        self.merger.observe(self._model, now, lr=lr)
        self._withdraw(self.merger.judge(before, self._loss.take()))
        self._merge_if_due()

    def keep(self) -> None:
        """Make the window durable for a checkpoint of this step; once, however often it is asked.

        Raises:
            CheckpointError: The disk refuses.
        """
        step = self.merger.progress.step
        # asked before the checkpoint is written and after it, and by a save that nothing announced
        if self._kept == step:
            return
        with ranks.all_or_none("keep the window for a checkpoint"):
            self.merger.meet()
            if self._checkpoints is not None or is_sharded(self._model):
                manifest = self.merger.manifest(self._model, self._window_folder)
                if self._checkpoints is not None:
                    self._checkpoints.note(self._state(manifest), [file.name for file in manifest.files])
        self._kept = step

    def prune(self) -> None:
        """A checkpoint was written: delete what none needs any more."""
        if self._checkpoints is not None:
            self._checkpoints.prune()

    def finish(self) -> None:
        """Training has ended: save merges of the newest snapshots where the user asked for it; say why there are none.

        Raises:
            CheckpointError: The disk refuses.
        """
        self._withdraw(self.merger.judge_rest())
        merger, newest = self._auto.tell(self.merger), self.merger.window.newest
        if self._config.save.at_end and newest is not None:
            try:
                with ranks.all_or_none("save merged models at the end"), merger.swap(self._model) as merge_view:
                    if self._config.save.raw:
                        raw = Recipe((merger.progress.step,), (1.0,))
                        self._add_processing(self._merged_models.save_last(self._model, RAW, merger.progress, raw))
                    for view in merger.views:
                        if view not in self._not_saved and merger.why_not(view) is None:
                            path = self._merged_models.save_last(self._model, view, newest.progress, merge_view(view))
                            self._add_processing(path)
            except WindowNotReadyError as error:  # another callback changed the model when training ended
                self._notices.warn("end", f"no merged model is saved at the end: {error}")
        self._merged_models.finish()
        if not self._last_merge:
            reason = merger.why_not(merger.views[0]) or "no merge point was reached."
            self._notices.warn("no merge", f"training ended at step {merger.progress.step} without a merge: {reason}")

    def close(self) -> None:
        """Free the window and the locks of its folders."""
        _open_runs.discard(self)
        self._borrowed.close()

    def _noting_loss(self, users_step: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        """Around `Trainer.training_step`, once for each batch of a step."""
        loss = users_step(*arguments, **options)
        self._loss.add(loss)
        return loss

    def _withdraw(self, damage: Damage | None) -> None:
        """Merges that were saved before a spike was seen held snapshots that the window has dropped since."""
        if damage is not None:
            self._merged_models.withdraw(damage.after, damage.reason)

    def _filled(self, resumed: Path | None) -> RunState:
        """The state of the checkpoint, with its window in the merger; an empty one where training begins."""
        step, own = self._trainer.state.global_step, self._window_folder
        state = RunState(Progress(step))
        if not step:
            return state
        folders = [own]
        if resumed is not None and own.is_relative_to(self._folder):  # a checkpoint of a run that was moved or copied
            folders.append(resumed.absolute().parent / own.relative_to(self._folder))
        try:
            found = find_state(step, folders)
            if found is not None:
                state, folder = found
                manifest = Manifest.from_plain(state.window)
                self.merger.restore(manifest, self._model, folder)
                if self._checkpoints is not None and folder == own:
                    self._checkpoints.hold(file.name for file in manifest.files)
                return state
            # rank 0 alone has the list; all must take the same way out
            if ranks.any_rank(self._checkpoints is not None and self._checkpoints.knows(step)):
                raise CheckpointError(f"{own} had a window for the checkpoint of step {step}, and its state is gone.")
            self._notices.warn(
                "no state",
                f"resumed at step {step} from a checkpoint without a window in {own}: the window starts empty, and "
                f"samples count from here.",
            )
        except (CheckpointError, ConfigError) as error:
            refill_or_raise(self._config, self._notices, error, step)
        self.merger.resume_from(state.progress)
        return state

    def _open_folder(self, state: RunState, borrowed: ExitStack) -> str:
        """Make the folder this run's own: what is of another run, or lies ahead, goes aside; the run's identity."""
        identity = ""
        if ranks.rank() == 0:
            files = RunFolder(self._folder)
            borrowed.callback(files.close)
            remove_leftovers(files.merged)
            if not state.progress.step:
                identity = files.begin(self._notices)
            else:
                identity = files.resume(state.identity, self._notices)
                before = files_of(state.identity, Path(state.run_folder)) if state.run_folder else None
                # the merge of the checkpoint's own step is owed where a signal broke it off: its record is not there
                until = state.progress.step - (state.last_merge < state.progress.step and self.merger.merge_is_due())
                records = before[0] if before else files.records

                def read(record: MergeRecord) -> None:
                    self._forecasts.append(record)
                    self._auto.append(record)

                keep_records_until(files.records, until, before=records, read=read)
        # of rank 0, which alone looked into the folder
        return ranks.gather(identity)[0]

    def _state(self, manifest: Manifest) -> RunState:
        return RunState(
            progress=self.merger.progress,
            identity=self._identity,
            run_folder=str(self._folder),
            window_folder=str(self._window_folder),
            window=manifest.to_plain(),
            saved=self._merged_models.state(),
            last_merge=self._last_merge,
        )

    def _merge_if_due(self) -> None:
        if not self.merger.merge_is_due():
            return
        step = self.merger.progress.step
        # one rank's failure must end all, or the others wait in their next reduction for ever
        with ranks.all_or_none(f"merge at step {step}"):
            record = self._measured()
            if record is not None:
                record = replace(record, withdrawn=self._merged_models.withdrawn)
                self.last_record, self._last_merge = self._publish(record), step
                return
        self._notices.warn(
            "broken off", f"step {step}: a signal broke off the merge. A run that is resumed from here makes it."
        )

    def _measured(self) -> MergeRecord | None:
        """Raw and every view on the same data; None where a signal ended the evaluation early."""
        age = self.merger.progress.step - self.merger.window.since.step
        reads = self._forecasts.reads(self.last_record, age)
        return merge_point.measured(
            self._config,
            self._trainer,
            self._model,
            self._auto.tell(self.merger),
            views=[view for view in self.merger.views if reads or view not in self._not_saved],
            evaluators=self._evaluators,
            notices=self._notices,
            keep=self._save_if_due,
            isolate=partial(trainer_evaluation.isolated, ignored=self._ignored),
        )

    def _publish(self, record: MergeRecord) -> MergeRecord:
        """To the file of records and the Trainer's own reporters."""
        # on every rank: `last_record` is part of each one's state
        record = self._forecasts.with_forecasts(self._auto.with_choices(record))
        if ranks.rank() == 0:
            append_record(self._folder / "merges.jsonl", record)
        should_log = self._trainer.control.should_log
        self._trainer.log(record.metrics())
        self._trainer.control.should_log = should_log  # P39: a log resets it, and the scheduled one would not come
        return record

    def _save_if_due(self, view: str, recipe: Recipe, metrics: Mapping[str, float], may_lack_best: bool) -> None:
        if view not in self._not_saved:
            progress = self.merger.progress
            self._merged_models.save_if_due(
                self._model,
                view,
                progress,
                recipe,
                metrics,
                may_lack_best=may_lack_best,
                trusted_until=self.merger.trusted_until,
            )
            self._add_processing(self._merged_models.path_of(view, progress))

    def _add_processing(self, folder: Path) -> None:
        """What `Trainer.save_model` writes beside a model: the tokenizer or processor, as far as there is one."""
        processing = getattr(self._trainer, "processing_class", None)
        if processing is not None and ranks.rank() == 0 and folder.exists():
            processing.save_pretrained(folder)


def _refuse(settings: Settings, trainer: Any) -> None:
    config = settings.config
    # P19: parameters are not plain tensors outside of its forward
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise UnsupportedModelError(
            "DeepSpeed is not supported: its engine owns parameters and optimizer at every ZeRO stage. Allowed: one "
            "device, DDP, FSDP2. Train with one of these."
        )
    units = {quantity.unit for cadence in settings.cadences for quantity in (cadence.every, cadence.start)}
    if "tokens" in units and getattr(trainer.args, "include_num_input_tokens_seen", "no") in ("no", False):
        raise ConfigError(
            f"every: {config.every!r} counts tokens (or start, merge_every, save.every), and this Trainer does not. "
            f"Set TrainingArguments(include_num_input_tokens_seen='all'), or count in steps."
        )
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's wrapper has eval() for all
    refusals.refuse_model(trainer.model, [optimizer], config)
    refusals.refuse_other_configs(config)
