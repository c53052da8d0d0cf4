"""The numbers of an evaluation are Lightning's own, over whatever loaders and limits the run has."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torchmetrics
from evaluation.measuring import At, DrawsNumbers, measured
from harness.models import LIGHTNING_REMARKS, Regression, Rows, regression_of, rows, trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pretrain_merge import ModelMerging
from pretrain_merge.evaluation import evaluate

pytestmark = LIGHTNING_REMARKS


class Pairs(pl.Callback):
    """After each validation: Lightning's own metrics beside those that a merge at the same step logged of raw."""

    def __init__(self) -> None:
        self.pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        ours = {
            key.removeprefix("merge/raw/"): value
            for key, value in trainer.callback_metrics.items()
            if key.startswith("merge/raw/")
        }
        if ours and not trainer.sanity_checking:
            self.pairs.append(({key: trainer.callback_metrics[key] for key in ours}, ours))


class _LogsMuch(Regression):
    """Reductions, steps and epochs, sums and torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()
        self.several = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError(), torchmetrics.R2Score()])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch)
        self.log_dict({"val_loss": loss, "twice": 2 * loss})
        self.log("largest", loss, reduce_fx="max")
        self.log("sum", loss, reduce_fx="sum")
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("of_three", loss, batch_size=3)
        if dataloader_idx == 0:
            prediction = self.net(batch[0])
            self.error(prediction, batch[1])
            self.several.update(prediction, batch[1])
            self.log("error", self.error)
            self.log_dict(dict(self.several.items()))

    def on_validation_epoch_start(self) -> None:
        self.log("at_start", float(self.net[0].weight.sum()))

    def on_validation_epoch_end(self) -> None:
        self.log("at_end", float(self.net[3].weight.sum()))


class _PerName(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name, part in batch.items():
            if part is not None:
                self.log(f"loss_{name}", self.loss(part), batch_size=len(part[0]))


class _TakesTheIterator(Regression):
    def validation_step(self, dataloader_iter: Any) -> None:
        batch, _, _ = next(dataloader_iter)
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))


class _Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = Rows(8, seed=1)
        index = 0
        while True:
            yield source[index % 8]
            index += 1


LOADERS = {
    "a ragged last batch": (Regression, lambda: rows(10, seed=1), {}),
    "a batch count": (Regression, lambda: rows(22, seed=1), {"limit_val_batches": 2}),
    "a share of the batches": (Regression, lambda: rows(22, seed=1), {"limit_val_batches": 0.5}),
    "several loaders": (Regression, lambda: [rows(10, seed=1), rows(7, seed=2)], {}),
    "a mapping of loaders": (Regression, lambda: {"a": rows(10, seed=1), "b": rows(7, seed=2)}, {}),
    "loaders side by side": (
        _PerName,
        lambda: CombinedLoader({"a": rows(10, seed=1), "b": rows(7, seed=2)}, "max_size"),
        {},
    ),
    "an endless stream": (Regression, lambda: DataLoader(_Endless(), 4), {"limit_val_batches": 3}),
    "a step that takes the iterator": (_TakesTheIterator, lambda: rows(12, seed=1), {}),
    "overfitting": (Regression, lambda: rows(10, seed=1), {"overfit_batches": 3, "val_check_interval": 1.0}),
    "everything logged": (_LogsMuch, lambda: rows(10, seed=1), {}),
    "everything logged of two loaders": (_LogsMuch, lambda: [rows(10, seed=1), rows(8, seed=2)], {}),
    "shuffled": (DrawsNumbers, lambda: rows(10, seed=1, shuffle=True), {}),
    "bf16-mixed": (Regression, lambda: rows(10, seed=1), {"precision": "bf16-mixed"}),
    "bf16-true": (Regression, lambda: rows(10, seed=1), {"precision": "bf16-true"}),
    "64-true": (Regression, lambda: rows(10, seed=1), {"precision": "64-true"}),
}


@pytest.mark.parametrize("situation", LOADERS)
def test_p16_the_raw_metric_is_lightnings_own_bit_for_bit(situation, tmp_path):
    module, validation, options = LOADERS[situation]
    pairs = Pairs()
    merging = ModelMerging(window=3, every=3)
    options = {"max_steps": 9, "val_check_interval": 3} | options
    trainer(tmp_path, merging, pairs, **options).fit(module(), rows(), validation())
    assert len(pairs.pairs) == 2  # merges at steps 6 and 9
    for lightnings, ours in pairs.pairs:
        assert {name: float(value) for name, value in lightnings.items()} == {
            name: float(value) for name, value in ours.items()
        }
        assert lightnings


def test_the_raw_metric_is_that_of_the_pytorch_lightning_trainer_too(tmp_path):
    module = regression_of(pytorch_lightning)()
    merging = ModelMerging(window=2, every=3)
    options = {"library": pytorch_lightning, "max_steps": 6, "val_check_interval": 3}
    own = trainer(tmp_path, merging, **options)
    own.fit(module, rows(), [rows(10, seed=1), rows(7, seed=2)])
    for name in ("val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"):
        assert own.callback_metrics[name] == own.callback_metrics[f"merge/raw/{name}"]
        assert own.callback_metrics[name] != own.callback_metrics[f"merge/sma/{name}"]


def test_a_ragged_last_batch_counts_by_its_size(tmp_path):
    module, validation = Regression(dropout=0.0), rows(10, seed=1)
    value = measured(tmp_path, module, validation)["val_loss"]
    with torch.no_grad():
        by_row = (module.net(validation.dataset.x) - validation.dataset.y).double().square()
    by_batch = [float(by_row[start : start + 4].mean()) for start in (0, 4, 8)]
    assert value == pytest.approx(float(by_row.mean()), rel=1e-6)
    assert value != pytest.approx(sum(by_batch) / 3, rel=1e-3)  # what a mean of batch means would say


def test_loaders_are_told_apart_by_lightnings_names(tmp_path):
    values = measured(tmp_path, Regression(), [rows(10, seed=1), rows(7, seed=2)])
    assert sorted(values) == ["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]


def test_p16_without_validation_batches_there_are_evaluators_only(tmp_path):
    values = measured(
        tmp_path,
        Regression(),
        rows(10, seed=1),
        limit_val_batches=0,
        isolated={"evaluators": {"one": lambda _: {"a": 1}}},
    )
    assert values == {"one/a": 1.0}


def test_validation_can_be_left_out(tmp_path):
    isolated = {"validate": False, "evaluators": {"one": lambda _: {"a": torch.tensor([1.5])}}}
    assert measured(tmp_path, Regression(), rows(10, seed=1), isolated=isolated) == {"one/a": 1.5}


def test_loaders_are_asked_for_where_the_run_has_not_validated_yet(tmp_path):
    assert "val_loss" in measured(tmp_path, Regression(), rows(10, seed=1), check_val_every_n_epoch=5)


def test_a_module_without_validation_measures_nothing(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert measured(tmp_path, Module(), None) == {}


def test_a_metric_of_training_is_not_taken_for_one_of_validation(tmp_path):
    assert sorted(measured(tmp_path, Regression(), rows(4, seed=1))) == ["val_loss"]


def _names(values: Sequence[dict[str, float]]) -> list[list[str]]:
    return [sorted(value) for value in values]


def test_every_measurement_gives_the_same_names(tmp_path):
    def act(trainer: Any, module: Any) -> list[dict[str, float]]:
        with evaluate.isolated(trainer, module) as measure:
            return [measure("raw"), measure("sma")]

    at = At(2, act)
    trainer(tmp_path, at, max_steps=2).fit(_LogsMuch(), rows(), [rows(10, seed=1), rows(7, seed=2)])
    raw, merged = _names(at.result)
    assert raw == merged
