"""One measurement inside a real fit, after a step of choice, and modules that log much or draw numbers."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from harness.models import Regression, rows, trainer

from pretrain_merge.evaluation import evaluate


class At(pl.Callback):
    """Calls a function after one step, where a merge would be measured."""

    def __init__(self, step: int, act: Callable[[Any, Any], Any]) -> None:
        self.step, self.act, self.result = step, act, None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.result = self.act(trainer, pl_module)


def measure_once(trainer: Any, module: Any, **options: Any) -> dict[str, float]:
    with evaluate.isolated(trainer, module, **options) as measure:
        return measure("raw")


def measured(folder: Any, module: Any, validation: Any, *callbacks: Any, **options: Any) -> dict[str, float]:
    """What one measurement after step 2 gives."""
    isolated = options.pop("isolated", {})
    at = At(2, lambda trainer, module: measure_once(trainer, module, **isolated))
    trainer(folder, at, *callbacks, max_steps=2, **options).fit(module, rows(), validation)
    return at.result


class DrawsNumbers(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) + torch.rand(()))
