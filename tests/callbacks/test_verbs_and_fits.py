"""Several callbacks, fits and Trainers, rehearsals, tuners and other verbs: each sees its own and leaves nothing."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks.watching import RawAfterStep, Seen, records
from harness.models import (
    LIGHTNING_REMARKS,
    MemoryLogger,
    Regression,
    TiedModel,
    documents,
    rows,
    same_bits,
    trainer,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from pretrain_merge import ModelMerging
from pretrain_merge.errors import ConfigError
from pretrain_merge.records import read_records

pytestmark = LIGHTNING_REMARKS


def test_two_callbacks_have_their_own_names_windows_and_folders(tmp_path):
    first = ModelMerging(window=2, every=2)
    second = ModelMerging(window=3, every=3, views=["wma"], name="long", save={"at_end": True})
    own = trainer(tmp_path, first, second, max_steps=6)
    own.fit(Regression(), rows(), rows(4, seed=1))
    assert {"merge/sma/val_loss", "long/wma/val_loss", "merge/step", "long/step"} <= own.callback_metrics.keys()
    assert "merge/wma/val_loss" not in own.callback_metrics
    assert [record.step for record in records(tmp_path)] == [4, 6]
    assert [(record.name, record.step) for record in records(tmp_path / "long")] == [("long", 6)]
    assert (tmp_path / "long" / "merged" / "step-00000006-wma").is_dir()


def test_two_callbacks_of_one_name_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"`ModelMerging`.*`callback.state_key` must be unique"):
        trainer(tmp_path, ModelMerging(), ModelMerging(window=3))


def test_p24_one_callback_serves_a_second_trainer_and_model(tmp_path):
    merging = ModelMerging(window=2, every=2)
    for name, steps in (("first", 7), ("second", 5)):
        trainer(tmp_path / name, merging, max_steps=steps).fit(TiedModel(), documents(), documents(4, seed=1))
    assert [record.step for record in records(tmp_path / "first")] == [4, 6]
    assert [(record.step, record.tokens) for record in records(tmp_path / "second")] == [(4, 96)]


def test_p24_a_second_fit_of_one_trainer_goes_on_counting(tmp_path):
    merging, module = ModelMerging(window=3, every=2), TiedModel()
    own = trainer(tmp_path, merging, max_steps=5)
    own.fit(module, documents(), documents(4, seed=1))
    own.fit_loop.epoch_loop.max_steps = 11
    own.fit(module, documents(), documents(4, seed=1))
    assert [(record.step, record.recipes["sma"].steps, record.tokens) for record in records(tmp_path)] == [
        (4, (2, 4), 96),
        (8, (6, 8), 192),  # without checkpoints the window is not kept: it starts empty and refills
        (10, (6, 8, 10), 240),
    ]


def test_p24_a_second_fit_of_one_trainer_that_keeps_checkpoints_goes_on_with_its_window(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4)
    merging, module = ModelMerging(window=3, every=2), TiedModel()
    own = trainer(tmp_path, merging, saving, max_steps=5)
    own.fit(module, documents(), documents(4, seed=1))
    own.fit_loop.epoch_loop.max_steps = 7
    own.fit(module, documents(), documents(4, seed=1))
    assert merging.last_record.recipes["sma"].steps == (2, 4, 6)


def test_records_of_an_earlier_run_are_moved_aside(tmp_path):
    for _ in range(2):
        trainer(tmp_path, ModelMerging(window=2, every=2), max_steps=4).fit(Regression(), rows(), rows(4, seed=1))
    assert [record.step for record in records(tmp_path)] == [4]
    assert [record.step for record in read_records(tmp_path / "merges.1.jsonl")] == [4]


def test_records_are_in_the_loggers_folder_where_there_is_one(tmp_path):
    logger = CSVLogger(tmp_path / "logs", name="run", version=3)
    own = trainer(tmp_path, ModelMerging(window=2, every=2), max_steps=4, logger=logger)
    own.fit(Regression(), rows(), rows(4, seed=1))
    assert len(records(Path(logger.log_dir))) == 1
    assert not (tmp_path / "merges.jsonl").exists()


def test_a_fast_dev_run_measures_once_and_writes_nothing(tmp_path):
    seen = Seen()
    merging = ModelMerging(
        window=3,
        every=1000,
        views=["sma3", "wma"],
        evaluators={"seen": seen},
        save={"best": "val_loss", "at_end": True},
    )
    module, raw = Regression(), RawAfterStep()
    own = trainer(tmp_path, raw, merging, fast_dev_run=3)
    own.fit(module, rows(), rows(10, seed=1))
    assert len(seen.weights) == 4  # raw, two views and the mean of a forecast, at the first step only
    for name, value in seen.weights[0].items():  # the window was filled with this one model
        torch.testing.assert_close(seen.weights[1][name], value, rtol=2**-22, atol=0.0)
    assert sorted(merging.last_record.shown) == ["sma3", "wma"]
    assert "merge/sma3/val_loss" in own.callback_metrics
    assert same_bits(weights(module), own.raw)
    assert list(tmp_path.rglob("*.jsonl")) == list(tmp_path.rglob("merged*")) == []


def test_a_fast_dev_run_shows_that_save_best_names_no_metric(tmp_path):
    merging = ModelMerging(window=2, every=1000, save={"best": "val_los"})
    with pytest.raises(ConfigError, match=r"save\.best: 'val_los' was not measured\. Measured: val_loss"):
        trainer(tmp_path, merging, fast_dev_run=True).fit(Regression(), rows(), rows(10, seed=1))


def test_a_fast_dev_run_after_a_real_run_writes_nothing_either(tmp_path):
    merging = ModelMerging(window=2, every=2, save={"every": 2})
    trainer(tmp_path, merging, max_steps=4).fit(Regression(), rows(), rows(4, seed=1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer(tmp_path, merging, fast_dev_run=2).fit(Regression(), rows(), rows(4, seed=1))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_verbs_of_the_trainer_do_nothing_of_ours(verb, tmp_path):
    class Module(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    own = trainer(tmp_path, ModelMerging(window=2, every=1, save={"at_end": True}), max_steps=2)
    getattr(own, verb)(Module(), rows(4, seed=1))
    assert not any(key.startswith("merge/") for key in own.callback_metrics)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_p24_after_a_fit_other_verbs_see_the_raw_model(verb, tmp_path):
    class Module(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

    module, merging = Module(), ModelMerging(window=2, every=2)
    own = trainer(tmp_path, merging, max_steps=4)
    own.fit(module, rows(), rows(10, seed=1))
    (values,) = getattr(own, verb)(module, rows(10, seed=1), verbose=False)
    assert values == {"loss": merging.last_record.raw["loss"]}
    assert values != {"loss": merging.last_record.views["sma"]["loss"]}


def test_the_learning_rate_finder_leaves_no_snapshot(tmp_path):
    merging, module = ModelMerging(window=3, every=2), Regression()
    own = trainer(tmp_path, merging, max_steps=6, logger=MemoryLogger(tmp_path))
    found = Tuner(own).lr_find(module, rows(), rows(4, seed=1), num_training=10)
    assert len(found.results["lr"]) > 5
    assert merging.last_record is None
    assert not (tmp_path / "merges.jsonl").exists()
    own.fit(module, rows(), rows(4, seed=1))
    assert [(record.step, record.recipes["sma"].steps) for record in records(tmp_path)] == [(4, (2, 4)), (6, (2, 4, 6))]


def test_scaling_the_batch_size_leaves_no_snapshot(tmp_path):
    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return rows(batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return rows(4, seed=1)

    merging, module, data = ModelMerging(window=3, every=2), Regression(), Data()
    own = trainer(tmp_path, merging, max_steps=4)
    Tuner(own).scale_batch_size(module, datamodule=data, max_trials=1, init_val=4, steps_per_trial=2)
    assert merging.last_record is None
    assert not (tmp_path / "merges.jsonl").exists()
    own.fit(module, datamodule=data)
    assert [(record.step, record.recipes["sma"].steps) for record in records(tmp_path)] == [(4, (2, 4))]


def test_p07_the_sanity_check_measures_nothing(tmp_path):
    seen = Seen()
    merging = ModelMerging(window=2, every=1, evaluators={"seen": seen})
    own = trainer(tmp_path, merging, max_steps=1, num_sanity_val_steps=2)
    own.fit(Regression(), rows(), rows(10, seed=1))
    assert seen.weights == []
    assert not any(key.startswith("merge/") for key in own.callback_metrics)
