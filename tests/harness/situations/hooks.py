"""What hooks of validation reach beyond the module: schedulers, optimizers, the datamodule, globals, callbacks."""

from collections import Counter, defaultdict, deque
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from harness.models import Regression, TwoOptimizers, rows
from harness.situations.situation import Situation
from torch import Tensor, nn
from torch.utils.data import DataLoader


def hooks_that_step_schedulers() -> Situation:
    class Module(TwoOptimizers):
        def configure_optimizers(self) -> Any:
            optimizers = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[0], patience=0, threshold=0.5)
            return optimizers, [plateau, torch.optim.lr_scheduler.ExponentialLR(optimizers[1], 0.9)]

        def on_validation_epoch_end(self) -> None:
            plateau, exponential = self.lr_schedulers()
            plateau.step(self.trainer.callback_metrics["val_loss"])
            exponential.step()

    return Situation(module=Module(), options={"max_epochs": 4})


def hooks_that_turn_the_optimizers_screws() -> Situation:
    class Module(Regression):
        def on_validation_epoch_end(self) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            group = optimizer.param_groups[0]
            group["lr"] *= 0.5
            group["betas"] = (group["betas"][0] * 0.9, 0.99)
            for state in optimizer.state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].data.mul_(2)
            optimizer.state.pop(self.net[3].bias, None)

    return Situation(module=Module(), options={"val_check_interval": 3})


def hooks_that_unfreeze() -> Situation:
    class Module(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net[3].requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

        def on_validation_end(self) -> None:
            self.net[3].requires_grad_(self.current_epoch >= 1)

    return Situation(module=Module(), options={"max_epochs": 3})


def a_curriculum_in_the_datamodule() -> Situation:
    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.level, self.asked = 1, Counter()

        def train_dataloader(self) -> DataLoader:
            self.asked["train"] += 1
            return rows(8 * self.level, shuffle=True)

        def val_dataloader(self) -> DataLoader:
            self.asked["validation"] += 1
            return rows(6, seed=self.asked["validation"])

    class Module(Regression):
        def on_validation_epoch_end(self) -> None:
            self.trainer.datamodule.level += 1

    return Situation(
        Module(), train=None, validation=None, data=Data(),
        options={"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1},
    )  # fmt: skip


_LEVEL = [1.0]


class _Meter:
    seen = 0

    def __init__(self) -> None:
        self.window, self.history = deque(maxlen=4), defaultdict(list)


def counters_of_every_kind() -> Situation:
    class Module(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.counter, self.meter, self.array = Counter(), _Meter(), np.zeros(1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            used = self.counter["validations"] + self.meter.seen + len(self.meter.window) + float(self.array[0])
            return super().training_step(batch, batch_idx) * (_LEVEL[0] + used + len(self.meter.history["losses"]))

        def on_validation_epoch_end(self) -> None:
            self.counter["validations"] += 1
            type(self.meter).seen += 1
            self.meter.window.append(self.global_step)
            self.meter.history["losses"].append(1.0)
            self.array += 0.5
            _LEVEL[0] *= 1.1

    _LEVEL[0], _Meter.seen = 1.0, 0
    return Situation(module=Module(), options={"val_check_interval": 3})


def settings_of_torch() -> Situation:
    class Module(Regression):
        def on_validation_epoch_end(self) -> None:
            torch.set_default_dtype(torch.float64)
            torch.backends.cudnn.benchmark = True

        def on_train_batch_start(self, *_: Any) -> None:
            self.log("is_single", float(torch.get_default_dtype() == torch.float32))
            torch.set_default_dtype(torch.float32)

        def on_train_end(self) -> None:  # the next run begins as this one did
            torch.set_default_dtype(torch.float32)
            torch.backends.cudnn.benchmark = False

    return Situation(module=Module())


def another_callback_that_the_module_drives() -> Situation:
    class Curriculum(pl.Callback):
        level = 1

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.level = self.level

    class Module(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.level

        def on_validation_epoch_end(self) -> None:
            next(item for item in self.trainer.callbacks if isinstance(item, Curriculum)).level += 1

    return Situation(module=Module(), callbacks=(Curriculum(),))


def hooks_that_replace_what_the_trainer_has() -> Situation:
    class Module(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"scale": 1.0})

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.hparams.scale

        def on_validation_epoch_end(self) -> None:
            self.trainer.optimizers = [torch.optim.SGD(self.parameters(), 0.01)]
            self.hparams.scale *= 1.1
            self.hook = nn.modules.module.register_module_forward_hook(lambda module, _, y: y * 0.9)

        def on_train_batch_end(self, *_: Any) -> None:
            self.log("num_hooks", float(len(nn.modules.module._global_forward_hooks)))

        def on_validation_end(self) -> None:
            self.hook.remove()

    return Situation(module=Module())


SITUATIONS = [
    hooks_that_step_schedulers,
    hooks_that_turn_the_optimizers_screws,
    hooks_that_unfreeze,
    a_curriculum_in_the_datamodule,
    counters_of_every_kind,
    settings_of_torch,
    another_callback_that_the_module_drives,
    hooks_that_replace_what_the_trainer_has,
]
