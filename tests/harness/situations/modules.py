"""Modules of every kind: metrics, optimizers by hand, compiled graphs, schedulers, buffers, logs."""

import shutil
from typing import Any

import pytest
import torch
import torchmetrics
from harness.models import Regression, TiedModel, TwoOptimizers, documents, rows
from harness.situations.situation import Situation
from torch import Tensor, nn


class _EverythingLogged(Regression):
    """Torchmetrics of every kind, in training across a whole epoch, and in validation."""

    def __init__(self) -> None:
        super().__init__()
        classes = {"task": "multiclass", "num_classes": 3}
        group = {
            name: getattr(torchmetrics, name)(average="macro", **classes) for name in ("Precision", "Recall", "F1Score")
        }
        self.train_scores = torchmetrics.MetricCollection(group, prefix="train_")
        self.val_scores = self.train_scores.clone(prefix="val_")
        self.train_error, self.val_error = torchmetrics.MeanSquaredError(), torchmetrics.MeanSquaredError()
        self.shared_error = torchmetrics.MeanAbsoluteError()
        self.every_value = torchmetrics.CatMetric()
        self.head = nn.Linear(1, 3)

    def _both(self, batch: Any, stage: str) -> Tensor:
        x, y = batch
        prediction = self.net(x)
        scores, labels = self.head(prediction), (y.squeeze(1) > 0).long() + (y.squeeze(1) > 1).long()
        collection, error = getattr(self, f"{stage}_scores"), getattr(self, f"{stage}_error")
        collection.update(scores, labels)
        error(prediction, y)
        self.shared_error(prediction, y)
        self.every_value.update(prediction.detach().mean())
        self.log_dict(collection, on_step=False, on_epoch=True)
        self.log(f"{stage}_error", error, on_step=True, on_epoch=True)
        self.log(f"{stage}_mean", self.every_value.compute().mean())
        return nn.functional.mse_loss(prediction, y) + nn.functional.cross_entropy(scores, labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._both(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._both(batch, "val"))

    def on_train_epoch_end(self) -> None:
        self.log("shared", self.shared_error.compute())
        self.shared_error.reset()


def torchmetrics_in_training_and_validation() -> Situation:
    return Situation(module=_EverythingLogged())


class _CountsInPlace(Regression):
    """State that is made in one validation and written in place in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.confusion = torchmetrics.ConfusionMatrix(task="binary")
        self.register_buffer("seen", torch.zeros(()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.confusion.update((self.net(batch[0]) > 0).long(), (batch[1] > 0).long())
        self.seen += 1
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.log("agree", self.confusion.compute().diagonal().float().mean())
        self.log("seen", self.seen)
        self.confusion.reset()
        self.seen = torch.zeros(())


def state_that_lives_between_validations() -> Situation:
    return Situation(module=_CountsInPlace(), options={"num_sanity_val_steps": 1})


def two_optimizers_by_hand() -> Situation:
    return Situation(module=TwoOptimizers())


def accumulated_gradients() -> Situation:
    return Situation(train=rows(28, shuffle=True), options={"accumulate_grad_batches": 3, "max_epochs": 4})


class _AccumulatesByHand(TwoOptimizers):
    """One optimizer steps in every batch, the other in every third, so that its gradients live across merges."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        often, seldom = self.optimizers()
        often.zero_grad()
        self.manual_backward(self.loss(batch))
        often.step()
        if batch_idx % 3 == 2:
            seldom.step()
            seldom.zero_grad()


def gradients_that_live_across_merges() -> Situation:
    return Situation(module=_AccumulatesByHand())


def tied_weights() -> Situation:
    return Situation(module=TiedModel(), train=documents(22, shuffle=True), validation=documents(6, seed=1))


class _Compiled(Regression):
    def __init__(self, backend: str) -> None:
        super().__init__()
        torch._dynamo.reset()  # graphs of runs before count towards a limit
        self.net = torch.compile(self.net, backend=backend)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x.to(next(self.parameters()).dtype)).float(), y.float())


def compiled() -> Situation:
    return Situation(module=_Compiled("aot_eager"), train=rows(26, shuffle=True))


def compiled_by_inductor() -> Situation:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    return Situation(module=_Compiled("inductor"))


def schedulers_of_both_kinds() -> Situation:
    class Module(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
            by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            on_plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return [optimizer], [
                {"scheduler": by_step, "interval": "step"},
                {"scheduler": on_plateau, "monitor": "val_loss"},
            ]

    return Situation(module=Module(), options={"max_epochs": 4})


def modes_of_their_own() -> Situation:
    class Module(Regression):
        def on_train_epoch_start(self) -> None:
            self.net[2].eval()

        def on_validation_model_train(self) -> None:
            self.net[0].train()

    return Situation(module=Module())


def the_demo_model_with_two_workers() -> Situation:
    pytest.importorskip("transformers")
    from pretrain_merge.demo.models import LanguageModel, build_model, constant_after_warmup

    return Situation(
        module=LanguageModel(build_model("llama", seed=0), peak_lr=3e-3, lr_factor=constant_after_warmup(2)),
        train=documents(20, num_workers=2),
        validation=documents(6, seed=1, num_workers=2),
        options={"max_epochs": 1, "val_check_interval": 2},
    )


def a_frozen_layer_that_eval_folds() -> Situation:
    class Folding(nn.Linear):
        """loralib: B @ A is added to the frozen weight in eval mode, and subtracted again in train mode."""

        def __init__(self) -> None:
            super().__init__(4, 6)
            self.weight.requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))
            self.is_folded = False

        def train(self, mode: bool = True) -> Any:
            if mode is self.is_folded:
                with torch.no_grad():
                    self.weight += (self.b @ self.a) * (-1 if mode else 1)
                self.is_folded = not mode
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (0 if self.is_folded else x @ self.a.T @ self.b.T)

    module = Regression()
    module.net[0] = Folding()
    return Situation(module=module)


def buffers_of_odd_kinds() -> Situation:
    class Module(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.eye(4).to_sparse())
            self.register_buffer("lowest", torch.tensor([]))
            self.register_buffer("phases", torch.ones(2, dtype=torch.complex64).conj(), persistent=False)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if not self.lowest.numel():
                self.lowest.resize_(4).zero_()
            self.lowest.minimum(batch[0].amin(0))
            self.adjacency._values().mul_(2)
            super().validation_step(((self.adjacency @ batch[0].T).T, batch[1]), batch_idx)

    return Situation(module=Module())


class _Gan(Regression):
    """Two networks by turns; each is frozen while the other steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        optimizer = critic if batch_idx % 3 else generator
        self.requires_grad_(True)
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.critic(self.net(batch[0])).square().mean() + self.loss(batch))
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        self.critic.requires_grad_(batch_idx % 2 == 0)  # one stays frozen across a merge

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net.parameters(), 0.01), torch.optim.Adam(self.critic.parameters(), 0.01)]


def a_gan_that_toggles() -> Situation:
    return Situation(module=_Gan(), options={"max_epochs": 3})


SITUATIONS = [
    torchmetrics_in_training_and_validation,
    state_that_lives_between_validations,
    two_optimizers_by_hand,
    accumulated_gradients,
    gradients_that_live_across_merges,
    tied_weights,
    # importing inductor's kernels warns
    pytest.param(compiled_by_inductor, marks=pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")),
    schedulers_of_both_kinds,
    modes_of_their_own,
    the_demo_model_with_two_workers,
    a_frozen_layer_that_eval_folds,
    buffers_of_odd_kinds,
    a_gan_that_toggles,
]
