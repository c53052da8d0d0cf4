"""One `Trainer.fit` of the demo, for the run and for its annealing branch alike.

This module knows Lightning: trainer options, the progress bar, the checkpoint at which the branch leaves the run. It
knows neither merging nor what the results mean.
"""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader, Dataset

from pretrain_merge.demo.corpus import Corpus, TrainingBlocks, ValidationBlocks
from pretrain_merge.demo.experiment import Experiment
from pretrain_merge.demo.report import METRIC

_VALIDATION_BATCH = 128


def fit(
    experiment: Experiment,
    corpus: Corpus,
    module: lightning.LightningModule,
    *,
    first_step: int = 0,
    last_step: int | None = None,
    data_seed: int | None = None,
    ckpt_path: Path | None = None,
    accelerator: str = "cpu",
    **trainer_options: Any,
) -> lightning.Trainer:
    """Train a module on the experiment's text, from the first step or from a checkpoint on.

    Args:
        experiment: Data and length.
        corpus: The text.
        module: Takes what `TrainingBlocks` gives.
        first_step: Steps of the run that the checkpoint has behind it.
        last_step: Where to end; default: the experiment's last step.
        data_seed: Draws the training blocks; default: the experiment's seed.
        ckpt_path: A Lightning checkpoint to go on from; None: start anew.
        accelerator: Lightning's name of what it trains on; one device of it.
        **trainer_options: Callbacks, loggers and validation intervals.

    Returns:
        The trainer, when it is done.
    """
    train_blocks = TrainingBlocks(
        corpus.train,
        block_length=experiment.block_length,
        # Of the whole run also for a branch: resumed, Lightning counts the batches before it as read (P26).
        num_blocks=experiment.num_steps * experiment.batch_size,
        first=first_step * experiment.batch_size,
        seed=experiment.seed if data_seed is None else data_seed,
    )
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=experiment.num_steps if last_step is None else last_step,
        # as models of this kind are pre-trained; the peak rate is high enough to need it
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        enable_checkpointing=False,
        enable_model_summary=False,
        **trainer_options,
    )
    trainer.fit(
        module,
        _loader(train_blocks, experiment.batch_size),
        validation_loader(experiment, corpus),
        ckpt_path=ckpt_path,
        # a checkpoint is tensors and plain values here, never code
        weights_only=True,
    )
    return trainer


def validation_loader(experiment: Experiment, corpus: Corpus) -> DataLoader[Any]:
    """The held-out blocks, in order."""
    blocks = ValidationBlocks(
        corpus.validation, block_length=experiment.block_length, num_blocks=experiment.num_validation_blocks
    )
    return _loader(blocks, _VALIDATION_BATCH)


def _loader(blocks: Dataset[Any], batch_size: int) -> DataLoader[Any]:
    return DataLoader(blocks, batch_size=batch_size)  # in order: the data set has drawn already


class CheckpointAt(Callback):
    """Saves one Lightning checkpoint, at one step."""

    def __init__(self, step: int, path: Path) -> None:
        self._step = step
        self._path = path

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save, if this is the step."""
        if trainer.global_step == self._step:
            trainer.save_checkpoint(self._path)


class ValidationCurve(Callback):
    """Collects the validation loss by step."""

    def __init__(self, logger: WandbLogger | None) -> None:
        self.values: dict[int, float] = {}
        self._logger = logger

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the loss, and log it."""
        loss = float(trainer.callback_metrics[METRIC])
        self.values[trainer.global_step] = loss
        if self._logger is not None:
            self._logger.log_metrics({f"annealed/{METRIC}": loss}, step=trainer.global_step)


class NamedBar(TQDMProgressBar):
    """One bar from the first to the last step, named for what runs; validations are too short for bars of their own."""

    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=10)
        self._name = name

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Open the bar at the step where training starts."""
        super().on_train_start(trainer, *_)
        bar = self.train_progress_bar
        # Lightning's bar is of one epoch; this run has as many as the data set's length makes
        bar.total, bar.initial = trainer.max_steps, trainer.global_step
        bar.set_description(self._name)

    def on_train_epoch_start(self, *_: Any) -> None:
        """Nothing: there is one epoch, and a branch enters in its middle, where Lightning would not call this."""

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        """What is shown beside the bar: not the run's id."""
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}

    def init_validation_tqdm(self) -> Tqdm:
        """No bar for validation."""
        return Tqdm(disable=True)


class FolderLogger(WandbLogger):
    """W&B's logger, whose run has the folder itself: that of the records too, which go where the first logger says."""

    @property
    def name(self) -> str:
        """No folder of the project."""
        return ""

    @property
    def version(self) -> str:
        """No folder of the run."""
        return ""


@contextmanager
def offline_run(experiment: Experiment, folder: Path) -> Iterator[WandbLogger]:
    """A W&B run on this disk alone; `wandb sync` can upload it later."""
    logger = FolderLogger(project="pretrain-merge-demo", name=experiment.family, save_dir=folder, offline=True)
    with redirect_stderr(io.StringIO()):  # as it starts, WandbLogger passes an old setting that W&B warns of
        logger.log_hyperparams(asdict(experiment))
    try:
        yield logger
    finally:
        # W&B writes in the background; what it has not written when the process ends is lost
        logger.experiment.finish()


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's and W&B's remarks on choices that the demo made on purpose stay unsaid."""
    logs = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "pytorch_lightning")]
    levels, environment = [log.level for log in logs], dict(os.environ)
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)
