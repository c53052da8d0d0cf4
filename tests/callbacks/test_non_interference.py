"""Promise 1: with the callback on or off, a run is the same bit for bit, whatever the run does."""

import functools
import random
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from harness.models import (
    LIGHTNING_REMARKS,
    AugmentedRows,
    MemoryLogger,
    Recorder,
    Regression,
    Rows,
    Run,
    TiedModel,
    TwoOptimizers,
    differences,
    documents,
    rows,
    same_bits,
    trainer,
)
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler

from pretrain_merge import ModelMerging

pytestmark = LIGHTNING_REMARKS


@dataclass
class Situation:
    """A run that somebody might have, built anew for each of the two runs."""

    module: Any = field(default_factory=Regression)
    train: Any = field(default_factory=lambda: rows(shuffle=True))
    validation: Any = field(default_factory=lambda: rows(10, seed=1))
    generators: tuple[torch.Generator, ...] = ()
    callbacks: tuple[Any, ...] = ()
    callbacks_first: bool = False
    data: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def run(folder: Any, build: Callable[[], Situation], *callbacks: Any) -> Run:
    pl.seed_everything(7, verbose=False)
    situation = build()
    recorder = Recorder(*situation.generators)
    options = {"logger": MemoryLogger(folder), "log_every_n_steps": 1, "max_epochs": 2} | situation.options
    first, others = (situation.callbacks, ()) if situation.callbacks_first else ((), situation.callbacks)
    own = trainer(folder, *first, *callbacks, *others, recorder, **options)
    own.fit(situation.module, situation.train, situation.validation, situation.data)
    return recorder.run


def merging(**options: Any) -> ModelMerging:
    # half of the time of a run is that of its merges: three of them in twelve steps, two in one epoch
    return ModelMerging(**({"window": 3, "every": 2, "merge_every": 4, "views": ["sma", "wma"]} | options))


def merged_run(folder: Any, build: Callable[[], Situation], *others: Any, **options: Any) -> Run:
    callback = merging(**options)
    with_merging = run(folder / "on", build, callback, *others)
    assert callback.last_record is not None, "no merge was made, so nothing was tried"
    assert callback.last_record.views, "no view was measured"
    return with_merging


def on_and_off(folder: Any, build: Callable[[], Situation], *others: Any, **options: Any) -> list[str]:
    return differences(merged_run(folder, build, *others, **options), run(folder / "off", build))


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> Callable[[Callable[[], Situation]], Run]:
    """The run without merging of a situation, made once for the tests that compare several runs with it."""
    return functools.cache(lambda build: run(tmp_path_factory.mktemp("off"), build))


# --- data ---


def two_workers() -> Situation:
    return Situation(
        train=DataLoader(AugmentedRows(), 4, shuffle=True, num_workers=2),
        validation=DataLoader(AugmentedRows(10, seed=1), 4, num_workers=2),
        options={"max_epochs": 1},
    )


def persistent_workers() -> Situation:
    return Situation(
        train=DataLoader(AugmentedRows(), 4, shuffle=True, num_workers=1, persistent_workers=True),
        validation=DataLoader(AugmentedRows(10, seed=1), 4, num_workers=1, persistent_workers=True),
    )


def one_generator_for_train_and_validation() -> Situation:
    generator = torch.Generator().manual_seed(3)
    return Situation(
        train=rows(shuffle=True, generator=generator),
        validation=rows(10, seed=1, shuffle=True, generator=generator),
        generators=(generator,),
        options={"max_epochs": 3},
    )


def shuffled_validation() -> Situation:
    return Situation(validation=rows(10, seed=1, shuffle=True))


def several_validation_loaders() -> Situation:
    return Situation(validation=[rows(10, seed=1, shuffle=True), rows(7, seed=2)])


def a_mapping_of_validation_loaders() -> Situation:
    return Situation(validation={"a": rows(10, seed=1), "b": rows(7, seed=2)})


def a_combined_validation_loader() -> Situation:
    class Module(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            for name, part in batch.items():
                if part is not None:
                    self.log(f"val_loss_{name}", self.loss(part), batch_size=len(part[0]))

    loader = CombinedLoader({"a": rows(10, seed=1, shuffle=True), "b": rows(7, seed=2)}, "max_size")
    return Situation(module=Module(), validation=loader)


def random_augmentation() -> Situation:
    return Situation(
        train=DataLoader(AugmentedRows(), 4, shuffle=True), validation=DataLoader(AugmentedRows(10, seed=1), 4)
    )


class _OwnNoise(Rows):
    """Noise from generators that the data set holds, one of which both data sets hold."""

    def __init__(self, num_rows: int, shared: np.random.Generator, own: Any, *, seed: int) -> None:
        super().__init__(num_rows, seed=seed)
        self.shared, self.own = shared, own

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        noise = self.own.gauss(0, 0.1) if isinstance(self.own, random.Random) else self.own.normal(0, 0.1)
        return x + float(self.shared.normal(0, 0.1)) + float(noise), y


def generators_inside_data_sets() -> Situation:
    shared = np.random.default_rng(5)
    return Situation(
        train=DataLoader(_OwnNoise(24, shared, random.Random(1), seed=0), 4, shuffle=True),
        validation=DataLoader(
            ConcatDataset([_OwnNoise(6, shared, np.random.RandomState(2), seed=1), Rows(4, seed=2)]), 4
        ),
    )


class _NoisyCollator:
    """A collator with a generator of its own, as collators that mask tokens have."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(11)

    def __call__(self, items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        x, y = (torch.stack(part) for part in zip(*items, strict=True))
        return [x + 0.1 * torch.randn(x.shape, generator=self.generator), y]


def one_noisy_collator_for_train_and_validation() -> Situation:
    collator = _NoisyCollator()
    return Situation(
        train=rows(shuffle=True, collate_fn=collator),
        validation=rows(10, seed=1, collate_fn=collator),
        generators=(collator.generator,),
    )


class _LateCollator(_NoisyCollator):
    """Makes its generator at its first batch, and counts."""

    def __init__(self) -> None:
        self.generator, self.num_batches = None, 0

    def __call__(self, items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(11)
        self.num_batches += 1
        x, y = super().__call__(items)
        return [x + self.num_batches / 10, y]


def collators_behind_functions() -> Situation:
    late, closed_over = _LateCollator(), _NoisyCollator()

    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.collator = _NoisyCollator()

        def collate(self, items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
            return self.collator(items)

    kinds = [functools.partial(_call, late), lambda items: closed_over(items), Data().collate]
    return Situation(
        train=rows(shuffle=True, collate_fn=kinds[0]),
        validation=[rows(6, seed=seed, collate_fn=kind) for seed, kind in enumerate(kinds)],
        generators=(closed_over.generator, kinds[2].__self__.collator.generator),
    )


def _call(collator: Any, items: Any) -> Any:
    return collator(items)


class _EpochSampler(Sampler[int]):
    """A sampler that counts its passes and shuffles by their number and a generator of its own."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.passes, self.epoch = num_rows, 0, 0
        self.random = random.Random(4)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        order = list(range(self.num_rows))
        random.Random(f"{self.epoch} {self.passes} {self.random.random()}").shuffle(order)
        return iter(order)


def a_sampler_that_counts_passes() -> Situation:
    sampler = _EpochSampler(10)
    return Situation(train=rows(10, sampler=sampler), validation=rows(10, seed=1, sampler=sampler))


class _Stream(IterableDataset):
    """A stream that starts over at each iteration, with global random numbers."""

    def __init__(self, num_rows: int, *, seed: int) -> None:
        self.rows = Rows(num_rows, seed=seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(self.rows)):
            x, y = self.rows[index]
            yield x + 0.1 * torch.randn(()), y


def streams_that_start_over() -> Situation:
    return Situation(train=DataLoader(_Stream(24, seed=0), 4), validation=DataLoader(_Stream(10, seed=1), 4))


def loaders_that_are_reloaded() -> Situation:
    return Situation(options={"reload_dataloaders_every_n_epochs": 1})


# --- modules ---


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


def the_demo_model_with_two_workers() -> Situation:
    pytest.importorskip("transformers")
    from pretrain_merge.demo.models import LanguageModel, build_model, constant_after_warmup

    return Situation(
        module=LanguageModel(build_model("llama", seed=0), peak_lr=3e-3, lr_factor=constant_after_warmup(2)),
        train=documents(20, num_workers=2),
        validation=documents(6, seed=1, num_workers=2),
        options={"max_epochs": 1, "val_check_interval": 2},
    )


# --- what hooks of validation reach beyond the module ---


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


# --- who else writes weights ---


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


def writers_past_versions() -> Situation:
    class Module(Regression):
        def on_train_batch_end(self, *_: Any) -> None:
            for parameter in self.parameters():
                parameter.data.clamp_(-0.3, 0.3)

        def on_validation_epoch_end(self) -> None:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()

    return Situation(module=Module(), options={"val_check_interval": 3})


def averaging_by_lightning(kind: str, *, first: bool) -> Callable[[], Situation]:
    def build() -> Situation:
        if kind == "ema":
            own = pl.callbacks.EMAWeightAveraging(decay=0.9)
        else:
            own = pl.callbacks.StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=1)
        return Situation(callbacks=(own,), callbacks_first=first, options={"max_epochs": 4})

    build.__name__ = f"{kind}_{'before' if first else 'after'}_ours"
    return build


# --- Trainers ---


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
    Situation,
    two_workers,
    persistent_workers,
    one_generator_for_train_and_validation,
    shuffled_validation,
    several_validation_loaders,
    a_mapping_of_validation_loaders,
    a_combined_validation_loader,
    random_augmentation,
    generators_inside_data_sets,
    one_noisy_collator_for_train_and_validation,
    collators_behind_functions,
    a_sampler_that_counts_passes,
    streams_that_start_over,
    loaders_that_are_reloaded,
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
    buffers_written_in_validation,
    random_numbers_in_validation,
    attributes_moved_in_validation,
    a_stop_that_validation_asks_for,
    logs_of_every_kind,
    the_demo_model_with_two_workers,
    a_progress_bar,
    sanity_check,
    validation_every_few_steps,
    no_validation_until_the_last_epoch,
    few_validation_batches,
    learning_rate_finder,
    hooks_that_step_schedulers,
    hooks_that_turn_the_optimizers_screws,
    hooks_that_unfreeze,
    a_curriculum_in_the_datamodule,
    counters_of_every_kind,
    settings_of_torch,
    another_callback_that_the_module_drives,
    a_step_of_the_optimizer_in_validation,
    hooks_that_replace_what_the_trainer_has,
    a_frozen_layer_that_eval_folds,
    buffers_of_odd_kinds,
    a_gan_that_toggles,
    writers_past_versions,
    averaging_by_lightning("ema", first=True),
    averaging_by_lightning("ema", first=False),
    averaging_by_lightning("swa", first=True),
    averaging_by_lightning("swa", first=False),
]


@pytest.mark.parametrize("build", SITUATIONS, ids=lambda build: build.__name__)
def test_a_run_is_the_same_with_and_without_merging(build, tmp_path):
    assert on_and_off(tmp_path, build, batch_norm="live", breaks={"lr": False}) == []


KINDS = {
    "plain": Situation,
    "gradient accumulation": accumulated_gradients,
    "two optimizers by hand": two_optimizers_by_hand,
    "compiled": compiled,
    "dropout and workers that augment": two_workers,
    "tied weights": tied_weights,
    "several validation loaders": several_validation_loaders,
    "two callbacks": random_augmentation,
}


# In float32 most kinds are situations above. Autocast is of the evaluation alone, so it meets the kinds of evaluations.
ALONE = [("compiled", "32-true"), ("two callbacks", "32-true")]
MIXED = [(kind, "bf16-mixed") for kind in ("plain", "compiled", "two optimizers by hand", "several validation loaders")]


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "bf16-true") for kind in KINDS), *MIXED, *ALONE])
def test_a_run_of_every_kind_is_the_same_in_every_precision(kind, precision, tmp_path):
    def build() -> Situation:
        situation = KINDS[kind]()
        situation.options = situation.options | {"precision": precision}
        return situation

    others = [merging(name="late", every=3, average="block")] if kind == "two callbacks" else []
    assert on_and_off(tmp_path, build, *others) == []
    assert all(other.last_record is not None for other in others)


def test_an_evaluator_that_calls_backward_leaves_the_gradients_that_accumulate(tmp_path):
    @torch.enable_grad()
    def sharpness(module: Any) -> dict[str, float]:
        assert all(parameter.grad is None for parameter in module.parameters())
        module.loss((torch.ones(2, 4), torch.zeros(2, 1))).backward()
        return {"norm": float(torch.stack([weight.grad.norm() for weight in module.parameters()]).norm())}

    evaluators = {"sharpness": sharpness}
    assert on_and_off(tmp_path, gradients_that_live_across_merges, evaluators=evaluators) == []


def _empties(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data = torch.empty(0)


def _frees(module: Any) -> None:
    for parameter in module.parameters():
        parameter.untyped_storage().resize_(0)


LEFT_BEHIND = {
    "another dtype": nn.Module.double,
    "no memory": _empties,
    "memory that was freed": _frees,
    "the meta device": lambda module: module.to("meta"),
    "a parametrization": lambda module: parametrizations.weight_norm(module.net[0]),
    "a pruned layer": lambda module: prune.l1_unstructured(module.net[0], "weight", 0.5),
    "another layer": lambda module: module.net.__setitem__(0, nn.Linear(4, 6)),
}


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_whatever_an_evaluator_leaves_behind_is_undone_before_gradients_come_back(what, tmp_path, without):
    evaluators = {"leaves": lambda module: (LEFT_BEHIND[what](module), {"x": 1.0})[1]}
    left = merged_run(tmp_path, gradients_that_live_across_merges, evaluators=evaluators)
    assert differences(left, without(gradients_that_live_across_merges)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"average": "block"},
        {"average": "block", "every": 3, "sample_every": 2},
        {"merge_every": 2},
        {"every": "8 samples"},
        {"evaluators": {"draws": lambda module: {"number": float(torch.rand(())) + random.random()}}},
        {"save": {"every": 2, "best": "val_loss", "at_end": True}},
        {"validate": False, "evaluators": {"trains": lambda module: {"mode": float(module.train().training)}}},
    ],
    ids=[
        "blocks",
        "sampled blocks",
        "a merge with every snapshot",
        "by samples",
        "random evaluator",
        "saving",
        "evaluator in train mode",
    ],
)
def test_a_run_is_the_same_whatever_the_callback_does(options, tmp_path, without):
    assert differences(merged_run(tmp_path, random_augmentation, **options), without(random_augmentation)) == []


def test_batch_size_scaling_gives_the_same_run(tmp_path):
    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> DataLoader:
            return rows(shuffle=True, batch_size=self.batch_size)

        def val_dataloader(self) -> DataLoader:
            return rows(10, seed=1, batch_size=self.batch_size)

    def scaled(folder: Any, *callbacks: Any) -> Run:
        pl.seed_everything(7, verbose=False)
        recorder = Recorder()
        finder = BatchSizeFinder(max_trials=1, init_val=4, steps_per_trial=2)
        trainer(folder, *callbacks, finder, recorder, max_epochs=2).fit(Regression(), datamodule=Data())
        return recorder.run

    callback = merging()
    assert differences(scaled(tmp_path / "on", callback), scaled(tmp_path / "off")) == []
    assert callback.last_record.step == 12


def test_p05_checkpoints_hold_the_same_but_for_our_counters(tmp_path):
    def checkpoints(folder: Any, *callbacks: Any) -> dict[str, Any]:
        saving = ModelCheckpoint(
            folder / "kept", monitor="val_loss", every_n_train_steps=3, save_top_k=-1, save_last=True
        )
        stopping = EarlyStopping("val_loss", patience=1)
        run(folder, lambda: Situation(callbacks=(saving, stopping), options={"val_check_interval": 3}), *callbacks)
        return {path.name: torch.load(path, weights_only=True) for path in sorted((folder / "kept").iterdir())}

    on, off = checkpoints(tmp_path / "on", merging()), checkpoints(tmp_path / "off")
    assert on.keys() == off.keys()
    assert len(on) > 1
    for name in on:
        assert on[name]["callbacks"].pop("ModelMerging[merge]")
        for checkpoint in (on[name], off[name]):
            for state in checkpoint["callbacks"].values():
                state.pop("dirpath", None), state.pop("best_model_path", None)
                state.pop("kth_best_model_path", None), state.pop("last_model_path", None)
                state["best_k_models"] = list(state.get("best_k_models", {}).values())
        assert same_bits(on[name], off[name]), name


def test_a_profile_counts_the_same_calls_but_for_our_hooks(tmp_path):
    def profile(folder: Any, *callbacks: Any) -> dict[str, int]:
        profiler = SimpleProfiler()
        run(folder, lambda: Situation(options={"profiler": profiler}), *callbacks)
        return {
            action: len(durations)
            for action, durations in profiler.recorded_durations.items()
            if "ModelMerging" not in action
        }

    assert profile(tmp_path / "on", merging()) == profile(tmp_path / "off")


class _Meddles(pl.Callback):
    def __init__(self, meddle: Callable[[Any, Any], object]) -> None:
        self.meddle = meddle

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            self.meddle(trainer, pl_module)


@pytest.mark.parametrize(
    ("meddle", "seen"),
    [
        (lambda trainer, module: torch.rand(1), "random_state"),
        (lambda trainer, module: random.random(), "random_state"),
        (lambda trainer, module: next(iter(trainer.val_dataloaders)), "generators"),
        (lambda trainer, module: module.net[0].weight.data.view(-1)[0].add_(1e-6), "weights after step 4"),
        (lambda trainer, module: module.net[2].eval(), "modes"),
        (lambda trainer, module: trainer.loggers[0].log_metrics({"x": 1.0}), "lines"),
        (lambda trainer, module: trainer.optimizers[0].state.clear(), "optimizers"),
    ],
)
def test_a_callback_that_meddles_would_be_seen(meddle, seen, tmp_path, without):
    meddled = run(tmp_path, one_generator_for_train_and_validation, _Meddles(meddle))
    assert seen in differences(meddled, without(one_generator_for_train_and_validation))
