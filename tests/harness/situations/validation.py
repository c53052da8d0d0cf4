"""What a module's own validation writes: buffers, attributes, random numbers, logs, weights."""

import random
from typing import Any

import numpy as np
import torch
from harness.models import Regression, TwoOptimizers
from harness.situations.situation import Situation
from torch import Tensor, nn


class _WritesBuffers(Regression):
    """Batch statistics move in validation too, and a buffer is replaced, not written."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def loss(self, batch: Any) -> Tensor:
        return super().loss((self.norm(batch[0]), batch[1]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.norm.train()
        self.seen = self.seen + 1
        super().validation_step(batch, batch_idx)


def buffers_written_in_validation() -> Situation:
    return Situation(module=_WritesBuffers())


def random_numbers_in_validation() -> Situation:
    class Module(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            noise = torch.rand(()) + random.random() + float(np.random.rand())
            self.log("val_loss", self.loss(batch) + noise)

    return Situation(module=Module())


class _RemembersValidation(Regression):
    """Python attributes that validation moves and training logs, and a generator for both."""

    def __init__(self) -> None:
        super().__init__()
        self.best, self.outputs, self.history = float("inf"), [], {"losses": [], "steps": []}
        self.generator = torch.Generator().manual_seed(8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("best", self.best if self.best < float("inf") else 0.0)
        self.log("validations", float(len(self.history["losses"])))
        return super().training_step(batch, batch_idx) + torch.rand((), generator=self.generator)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outputs.append(self.loss(batch) + torch.rand((), generator=self.generator))

    def on_validation_epoch_end(self) -> None:
        mean = torch.stack(self.outputs).mean()
        self.outputs.clear()
        self.best = min(self.best, float(mean))
        self.history["losses"].append(float(mean))
        self.history["steps"] = [*self.history["steps"], self.global_step]
        self.first = getattr(self, "first", self.global_step)
        self.log_dict({"val_loss": mean, "first": float(self.first), "steps": float(len(self.history["steps"]))})


def attributes_moved_in_validation() -> Situation:
    return Situation(module=_RemembersValidation(), options={"max_epochs": 3})


def a_stop_that_validation_asks_for() -> Situation:
    class Module(Regression):
        def on_validation_epoch_end(self) -> None:
            self.trainer.should_stop = self.trainer.global_step >= 6

    return Situation(module=Module(), options={"val_check_interval": 5})


def logs_of_every_kind() -> Situation:
    class Module(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log_dict({"a": loss, "b": 2 * loss}, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("both", 3.0, on_step=True, on_epoch=True, prog_bar=True)
            self.log("largest", float(batch_idx), reduce_fx="max")

        def on_validation_epoch_end(self) -> None:
            self.log("at_end", 1.0)
            self.logger.log_metrics({"by_hand": 1.0}, step=self.global_step)
            for logger in self.loggers:
                logger.log_metrics({"by_hand_too": 1.0}, step=self.global_step)

    return Situation(module=Module(), options={"val_check_interval": 3})


def a_step_of_the_optimizer_in_validation() -> Situation:
    class Module(TwoOptimizers):
        @torch.enable_grad()
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            optimizer = self.optimizers()[1]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log("val_loss", loss.detach())

    return Situation(module=Module())


def writers_past_versions() -> Situation:
    class Module(Regression):
        def on_train_batch_end(self, *_: Any) -> None:
            for parameter in self.parameters():
                parameter.data.clamp_(-0.3, 0.3)

        def on_validation_epoch_end(self) -> None:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()

    return Situation(module=Module(), options={"val_check_interval": 3})


SITUATIONS = [
    buffers_written_in_validation,
    random_numbers_in_validation,
    attributes_moved_in_validation,
    a_stop_that_validation_asks_for,
    logs_of_every_kind,
    a_step_of_the_optimizer_in_validation,
    writers_past_versions,
]
