"""Hugging Face's Trainer: its hooks, and which Trainer it is that calls them.

This module knows events. What happens in a run is `TrainerRun`'s business.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pretrain_merge.callbacks.forecasts import RunForecasts
from pretrain_merge.callbacks.refusals import checked_evaluators
from pretrain_merge.config import MergeConfig, parse_settings, read, refuse_misfits
from pretrain_merge.errors import ConfigError, UnsupportedModelError
from pretrain_merge.integrations.trainer_run import TrainerRun
from pretrain_merge.records import MergeRecord
from pretrain_merge.runtime.log import WarnOnce

_NOT_HERE = {
    "tokens_per_batch": "the Trainer counts tokens itself: TrainingArguments(include_num_input_tokens_seen=…)",
    "stateful_data": "the Trainer builds the loaders that it evaluates on",
    "on_publish": "only ModelMerging runs commands; a callback's on_save can",
    "on_publish_timeout": "only ModelMerging runs commands",
    "verbose": "the Trainer prints what is logged",
}


class HuggingFaceMerging(TrainerCallback):
    """`ModelMerging` for Hugging Face's `Trainer`: one of its `callbacks`, after those that change weights.

    At each merge point raw and merged weights are measured by the Trainer's own evaluation (`Trainer.evaluate`), on its
    `eval_dataset`, and go to its own reporters and to `merges.jsonl` in its `output_dir`. Training is not changed: its
    weights, optimizer, random numbers, scheduled evaluations, best checkpoint and early stopping are those of a run
    without the callback. A run that is resumed goes on with the window that its checkpoint had.

    Args:
        evaluators: Further evaluations by name: functions from the model to metrics, run on raw and merged alike.
        **options: The keys of `pretrain_merge.config.MergeConfig` but for those of a batch and of commands:
            `window`, `every`, `views`, `save`, `forecast`, `name` and so on. `validate=False` leaves evaluation to
            `evaluators`.

    Raises:
        ConfigError: A key is unknown or a value impossible; the message starts with the key.
    """

    def __init__(
        self, *, evaluators: Mapping[str, Callable[[Any], Mapping[str, float]]] | None = None, **options: Any
    ) -> None:
        for key in _NOT_HERE.keys() & options.keys():
            raise ConfigError(f"{key}: {options[key]!r} is not a choice here, since {_NOT_HERE[key]}. Remove the key.")
        refuse_misfits(MergeConfig, options)
        self.settings = parse_settings(options)
        self._evaluators = checked_evaluators(evaluators)
        self._notices = WarnOnce()
        self._forecasts = RunForecasts(self.settings, self._notices)
        self._run: TrainerRun | None = None
        self._lr: tuple[float, ...] = ()  # of the step that is being made

    @classmethod
    def from_config(cls, source: object, **python_only: Any) -> "HuggingFaceMerging":
        """The callback from a YAML file, an OmegaConf config or a mapping.

        Args:
            source: Path of a YAML file, or the keys themselves.
            **python_only: What YAML cannot hold: `evaluators`.

        Raises:
            ConfigError: An unknown key, a wrong type or an impossible value.
        """
        return cls(**{**read(source), **python_only})

    @property
    def last_record(self) -> MergeRecord | None:
        """What the last merge point of this run, or of the one that ended last, measured."""
        return self._run.last_record if self._run is not None else None

    @property
    def best_model_path(self) -> Path | None:
        """The best merged model on disk, by `save.best`."""
        return self._run.best_model_path if self._run is not None else None

    def mark_phase(self, name: str) -> None:
        """Say that something changed that the weights will show (a data switch): merges do not reach across it.

        Raises:
            ConfigError: No run has begun.
        """
        if self._run is None:
            raise ConfigError(f"mark_phase({name!r}) before training has begun. Call it from a hook of the Trainer.")
        self._run.merger.mark_phase(name)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin a run, or go on with one; makes the merge that its checkpoint owes."""
        if self._run is not None:
            self._run.close()  # ended by an exception, of which the Trainer tells nobody
        trainer, given = _caller(self)
        ignored, resumed = given.get("ignore_keys_for_eval"), given.get("resume_from_checkpoint")
        self._run = TrainerRun(
            self.settings,
            self._evaluators,
            self._forecasts,
            self._notices,
            trainer,
            ignored=ignored,
            resumed=Path(resumed) if isinstance(resumed, str) else None,
        )
        self._run.catch_up()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Remember the learning rate that this step used, before the scheduler moves it (P28)."""
        groups = parts["optimizer"].param_groups
        self._lr = tuple(float(group["lr"]) for group in groups if group.get("lr") is not None)  # else it has no rate

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Observe the step; at a merge point, measure and publish."""
        if self._run is not None:
            self._run.step(self._lr)
            self._keep_if_saved(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the window durable where a checkpoint follows."""
        self._keep_if_saved(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint was written: files that none needs any more go."""
        if self._run is not None:
            self._run.keep()
            self._run.prune()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save merges of the newest snapshots where the user asked for it."""
        if self._run is not None:
            self._run.finish()
            self._run.close()

    def _keep_if_saved(self, control: TrainerControl) -> None:
        # before the checkpoint: a process that is killed while it writes one must leave no checkpoint without a window
        if self._run is not None and control.should_save:
            self._run.keep()


def _caller(callback: TrainerCallback) -> tuple[Trainer, dict[str, Any]]:
    """The Trainer that runs a callback's event, and what its loop was called with.

    A Trainer hands its callbacks everything but itself, and an evaluation by its own loop needs it.
    """
    # outwards: the first Trainer that is met runs this event
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(item is callback for item in owner.callback_handler.callbacks):
            return owner, dict(frame.f_locals)
        frame = frame.f_back  # type: ignore[assignment]
    raise UnsupportedModelError(
        f"{type(callback).__name__} was called by something that is not a transformers.Trainer with it among its "
        f"callbacks. Allowed: Trainer(callbacks=[merging]) or trainer.add_callback(merging). In a loop of your own use "
        f"RollingMerger."
    )
