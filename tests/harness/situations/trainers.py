"""Trainers and callbacks of every kind: when they validate, what they look for, who else averages."""

from collections.abc import Callable

import lightning.pytorch as pl
from harness.situations.situation import Situation
from harness.situations.validation import logs_of_every_kind
from lightning.pytorch.callbacks import LearningRateFinder


def averaging_by_lightning(kind: str, *, first: bool) -> Callable[[], Situation]:
    def build() -> Situation:
        if kind == "ema":
            own = pl.callbacks.EMAWeightAveraging(decay=0.9)
        else:
            own = pl.callbacks.StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=1)
        return Situation(callbacks=(own,), callbacks_first=first, options={"max_epochs": 4})

    build.__name__ = f"{kind}_{'before' if first else 'after'}_ours"
    return build


def sanity_check() -> Situation:
    return Situation(options={"num_sanity_val_steps": 2})


def validation_every_few_steps() -> Situation:
    return Situation(
        options={"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": -1, "max_steps": 11}
    )


def no_validation_until_the_last_epoch() -> Situation:
    return Situation(options={"check_val_every_n_epoch": 2})


def a_progress_bar() -> Situation:
    situation = logs_of_every_kind()
    situation.options["enable_progress_bar"] = True
    return situation


def few_validation_batches() -> Situation:
    return Situation(options={"limit_val_batches": 2})


def learning_rate_finder() -> Situation:
    return Situation(callbacks=(LearningRateFinder(num_training_steps=12),))


SITUATIONS = [
    a_progress_bar,
    sanity_check,
    validation_every_few_steps,
    no_validation_until_the_last_epoch,
    few_validation_batches,
    learning_rate_finder,
    averaging_by_lightning("ema", first=True),
    averaging_by_lightning("ema", first=False),
    averaging_by_lightning("swa", first=True),
    averaging_by_lightning("swa", first=False),
]
