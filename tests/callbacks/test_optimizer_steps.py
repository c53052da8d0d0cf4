"""A step counts wherever an optimizer of the run steps, and where weights are final is where they are observed."""

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from harness.models import LIGHTNING_REMARKS, Regression, rows, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.optimizer import _global_optimizer_post_hooks

from pretrain_merge import ModelMerging, load_merged
from pretrain_merge.errors import UnsupportedModelError
from pretrain_merge.records import read_records

pytestmark = [*LIGHTNING_REMARKS, pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")]
EVERY_2 = {"window": 3, "every": 2}


class Raw(Regression):
    """Steps the optimizer itself, which no hook of Lightning's hears of."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        optimizer.optimizer.step()


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def optimizer(self) -> Any:
        return self.optimizers(use_pl_optimizer=False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizer()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Own(Manual):
    """An optimizer that the Trainer does not know."""

    def configure_optimizers(self) -> None:
        self.own = torch.optim.SGD(self.parameters(), lr=0.1)

    def optimizer(self) -> Any:
        return self.own


def records_of(folder: Any, module: Any, options: Any = None, *callbacks: Any, **own: Any) -> Any:
    merging = ModelMerging(**(EVERY_2 | (options or {})))
    run = trainer(folder, merging, *callbacks, **({"max_epochs": 2} | own))
    run.fit(module, rows(), rows(4, seed=1))
    path = folder / "merges.jsonl"
    return read_records(path) if path.exists() else []


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("kind", [Raw, Manual, Own])
def test_steps_that_lightnings_hook_does_not_show_are_counted(kind, tmp_path):
    assert [record.step for record in records_of(tmp_path, kind())] == [4, 6, 8, 10, 12]


def test_optimizers_of_other_models_do_not_count(tmp_path, caplog):
    class Nothing(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            probe = torch.nn.Linear(2, 1)
            torch.optim.SGD(probe.parameters(), lr=0.1).step()

    with caplog.at_level(logging.WARNING, logger="pretrain_merge"):
        assert records_of(tmp_path, Nothing()) == []
    assert any("no step of an optimizer on parameters of the model was seen in 12" in text for text in caplog.messages)
    assert not _global_optimizer_post_hooks


@pytest.mark.parametrize("rate", [{"lr": None}, {}], ids=repr)
def test_an_optimizer_without_a_rate_makes_no_break(rate, tmp_path):
    class Signs(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter -= 0.01 * parameter.grad.sign()
            return loss

    module = Regression()
    module.configure_optimizers = lambda: Signs(module.parameters(), rate)
    recorded = records_of(tmp_path, module)
    assert [record.window for record in recorded] == [2, 3, 3, 3, 3]
    assert recorded[-1].lr == ()


class Averages(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_an_optimizer_that_swaps_in_its_own_average_is_refused_with_the_recipe(tmp_path):
    module = Regression()
    module.configure_optimizers = lambda: Averages(module.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match=r"Averages .*optimizer\.eval\(\); merger\.observe"):
        records_of(tmp_path, module)


class Clips(Regression):
    """Weights are final after the module's own hook only (WGAN)."""

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.data.clamp_(-0.05, 0.05)


class Measured(pl.Callback):
    def __init__(self) -> None:
        self.loss: dict[int, float] = {}

    def on_validation_end(self, run: Any, module: Any) -> None:
        self.loss[run.global_step] = float(run.callback_metrics["val_loss"])


def test_p32_weights_that_the_modules_own_hook_writes_are_those_observed(tmp_path):
    measured = Measured()
    own = {"val_check_interval": 2, "max_epochs": 2}
    recorded = records_of(tmp_path, Clips(), {"save": {"at_end": True}}, measured, **own)
    assert {record.step: pytest.approx(record.raw["val_loss"]) for record in recorded} == {
        step: loss for step, loss in measured.loss.items() if step > 2
    }
    merged = Clips()
    load_merged(merged, next((tmp_path / "merged").iterdir()))
    assert max(float(parameter.detach().abs().max()) for parameter in merged.parameters()) <= 0.05 + 1e-7


def test_p32_a_checkpoint_between_the_hooks_owes_the_snapshot_and_the_merge(tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    records_of(tmp_path, Clips(), None, kept)
    merging = ModelMerging(**EVERY_2)
    resumed = trainer(tmp_path, merging, ModelCheckpoint(tmp_path / "kept", save_top_k=-1), max_epochs=2)
    resumed.fit(Clips(), rows(), rows(4, seed=1), ckpt_path=tmp_path / "kept" / "step=8.ckpt")
    assert [(record.step, record.recipes["sma"].steps) for record in read_records(tmp_path / "merges.jsonl")] == [
        (4, (2, 4)),
        (6, (2, 4, 6)),
        (8, (4, 6, 8)),
        (10, (6, 8, 10)),
        (12, (8, 10, 12)),
    ]


def test_a_rate_that_decays_is_said_with_the_way_out_also_at_the_end(tmp_path, caplog):
    module = Regression()

    def decays() -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 40)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module.configure_optimizers = decays
    assert records_of(tmp_path, module) == []
    said = [text for text in caplog.messages if "breaks: {lr: off}" in text]
    assert "fell 10 times in a row" in said[0]
    assert "training ended at step 12 without a merge" in said[1]
    assert not any("will be ready" in text for text in caplog.messages)
