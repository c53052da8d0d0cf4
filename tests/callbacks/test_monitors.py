"""`EarlyStopping` and `ModelCheckpoint` on merged metrics: they look when there is something new to see."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from harness.models import LIGHTNING_REMARKS, Regression, regression_of, rows, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from pretrain_merge import ModelMerging
from pretrain_merge.callbacks.monitors import Monitors
from pretrain_merge.records import MergeRecord, read_records

pytestmark = LIGHTNING_REMARKS

METRIC = "merge/sma/own/x"
RECORD = MergeRecord("merge", 4, 0, 0, 2, 0.1, {"x": 1.0}, {"sma": {"x": 1.0}})
EVERY_STEP = {"val_check_interval": 1 / 6}  # of an epoch of six batches


class Given:
    """An evaluator with given values for the merged model, one per merge point; raw is always 9."""

    def __init__(self, *values: float) -> None:
        self.values, self.calls = values, 0

    def __call__(self, module: Any) -> dict[str, float]:
        merge_point, is_merged = divmod(self.calls, 2)
        self.calls += 1
        return {"x": self.values[min(merge_point, len(self.values) - 1)] if is_merged else 9.0}


def fit(folder: Path, values: tuple[float, ...], *callbacks: Any, **options: Any) -> Any:
    """Merges at steps 4, 6, 8, ... and a validation after every step; twelve steps unless stopped."""
    merging = ModelMerging(window=2, every=2, evaluators={"own": Given(*values)})
    own = trainer(folder, merging, *callbacks, **({"max_steps": 12} | EVERY_STEP | options))
    own.fit(Regression(), rows(), rows(4, seed=1))
    return own


def test_p29_early_stopping_survives_until_the_first_merge(tmp_path):
    stopping = EarlyStopping(METRIC, patience=1)
    own = fit(tmp_path, (1.0,), stopping, max_steps=3)  # three validations, no merge
    assert own.global_step == 3
    assert stopping.wait_count == 0


def test_early_stopping_would_raise_without_us(tmp_path):
    own = trainer(tmp_path, EarlyStopping(METRIC), max_steps=3, **EVERY_STEP)
    with pytest.raises(RuntimeError, match=f"Early stopping conditioned on metric `{METRIC}` which is not available"):
        own.fit(Regression(), rows(), rows(4, seed=1))


@pytest.mark.parametrize(
    ("values", "patience", "stops_after"),
    [
        ((1.0, 2.0), 1, 6),  # worse at the second merge
        ((1.0, 2.0, 3.0), 2, 8),
        ((1.0, 2.0, 0.5, 2.0, 2.0), 2, 12),
        ((5.0, 4.0, 3.0, 2.0, 1.0), 1, 12),  # always better
        ((1.0, float("nan")), 9, 6),  # check_finite
    ],
)
def test_early_stopping_counts_merges_and_not_validations(values, patience, stops_after, tmp_path):
    stopping = EarlyStopping(METRIC, patience=patience)
    assert fit(tmp_path, values, stopping).global_step == stops_after


def test_early_stopping_at_the_end_of_epochs_counts_merges_too(tmp_path):
    # an epoch of two steps; the merges at 4, 8 and 12 fall into every second epoch
    stopping = EarlyStopping(METRIC, patience=2, check_on_train_epoch_end=True)
    merging = ModelMerging(window=2, every=2, merge_every=4, evaluators={"own": Given(1.0, 2.0, 3.0)})
    own = trainer(tmp_path, merging, stopping, max_epochs=10)
    own.fit(Regression(), rows(8), rows(4, seed=1))
    assert own.global_step == 12
    assert stopping.wait_count == 2


def test_early_stopping_of_a_users_own_metric_is_not_touched(tmp_path):
    stopping = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    own = fit(tmp_path, (1.0,), stopping)
    assert own.global_step == 2
    assert "on_validation_end" not in vars(stopping)


def test_early_stopping_works_in_the_pytorch_lightning_trainer(tmp_path):
    stopping = pytorch_lightning.callbacks.EarlyStopping(METRIC, patience=1)
    merging = ModelMerging(window=2, every=2, evaluators={"own": Given(1.0, 2.0)})
    own = trainer(tmp_path, merging, stopping, library=pytorch_lightning, max_steps=12, **EVERY_STEP)
    own.fit(regression_of(pytorch_lightning)(), rows(), rows(4, seed=1))
    assert own.global_step == 6


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "kept").glob("*.ckpt")) if (folder / "kept").exists() else []


def test_p29_a_checkpoint_waits_for_the_first_merge_and_then_follows_the_metric(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", monitor=METRIC, filename="{step}", save_top_k=1)
    fit(tmp_path, (3.0, 1.0, 2.0, 1.5, 4.0), saving)
    assert kept(tmp_path) == ["step=6.ckpt"]
    assert float(saving.best_model_score) == 1.0


def test_a_checkpoint_is_not_written_twice_for_one_merge(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", monitor=METRIC, filename="{step}", save_top_k=-1)
    fit(tmp_path, (3.0, 2.0, 1.0), saving, max_steps=9)
    assert kept(tmp_path) == ["step=4.ckpt", "step=6.ckpt", "step=8.ckpt"]


def test_a_checkpoint_every_few_steps_takes_the_metric_of_its_own_step(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", monitor=METRIC, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(tmp_path, (3.0, 2.0, 1.0), saving, max_steps=9, val_check_interval=3)
    assert kept(tmp_path) == ["step=4.ckpt", "step=8.ckpt"]
    assert {Path(path).name: float(score) for path, score in saving.best_k_models.items()} == {
        "step=4.ckpt": 3.0,
        "step=8.ckpt": 1.0,
    }


def test_a_checkpoint_at_the_end_of_epochs_survives_epochs_without_a_merge(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", monitor=METRIC, filename="{step}", save_top_k=-1)
    merging = ModelMerging(window=2, every=2, merge_every=4, evaluators={"own": Given(1.0, 2.0, 3.0)})
    trainer(tmp_path, merging, saving, max_epochs=6).fit(Regression(), rows(8), rows(4, seed=1))
    assert kept(tmp_path) == ["step=12.ckpt", "step=4.ckpt", "step=8.ckpt"]


def test_a_run_without_a_merge_ends_without_a_checkpoint(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", monitor=METRIC, save_top_k=3)
    fit(tmp_path, (1.0,), saving, max_steps=3)
    assert kept(tmp_path) == []


def test_a_monitored_checkpoint_resumes(tmp_path):
    def callbacks() -> list[Any]:
        saving = ModelCheckpoint(tmp_path / "kept", monitor=METRIC, filename="{step}", save_top_k=-1)
        return [saving, EarlyStopping(METRIC, patience=2)]

    fit(tmp_path, (1.0, 2.0), *callbacks(), max_steps=6)
    merging = ModelMerging(window=2, every=2, evaluators={"own": Given(3.0)})
    second = callbacks()
    own = trainer(tmp_path, merging, *second, max_steps=12, **EVERY_STEP)
    own.fit(Regression(), rows(), rows(4, seed=1), ckpt_path=tmp_path / "kept" / "step=6.ckpt")
    # one of two patiences was spent before
    assert [record.step for record in read_records(tmp_path / "merges.jsonl")] == [4, 6, 8]
    assert own.global_step == 8


@pytest.mark.parametrize("kind", [EarlyStopping, lambda monitor: ModelCheckpoint(monitor=monitor)])
def test_hooks_are_given_back_after_fit(kind, tmp_path):
    callback = kind(METRIC)
    fit(tmp_path, (1.0,), callback, max_steps=4)
    assert not {"on_validation_end", "on_train_epoch_end"} & vars(callback).keys()


def test_hooks_are_given_back_after_an_exception_and_work_in_the_next_fit(tmp_path):
    class Broken(Regression):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 5:
                raise RuntimeError("broken")

    stopping = EarlyStopping(METRIC, patience=1)
    merging = ModelMerging(window=2, every=2, evaluators={"own": Given(1.0, 2.0, 3.0)})
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, merging, stopping, max_steps=12, **EVERY_STEP).fit(Broken(), rows(), rows(4, seed=1))
    assert not {"on_validation_end", "on_train_epoch_end"} & vars(stopping).keys()
    own = trainer(tmp_path, merging, stopping, max_steps=12, **EVERY_STEP)
    own.fit(Regression(), rows(), rows(4, seed=1))
    assert own.global_step == 4  # the first merge of this fit is worse than the one before the exception


class _Watching(pl.Callback):
    def __init__(self, monitor: Any) -> None:
        self.monitor, self.calls = monitor, []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append("validation")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append("epoch")


def _trainer_with(*callbacks: Any) -> Any:
    return SimpleNamespace(callbacks=callbacks, lr_scheduler_configs=[], fit_loop=SimpleNamespace(epoch_loop=None))


def test_each_hook_runs_once_for_each_new_value():
    callback = _Watching("merge/sma/x")
    monitors = Monitors(_trainer_with(callback), "merge/")
    with monitors.waiting():
        callback.on_validation_end(None, None)
        for _ in range(2):
            monitors.new_values(RECORD)
            for _ in range(2):
                callback.on_validation_end(None, None)
                callback.on_train_epoch_end(None, None)
        assert callback.calls == ["validation", "epoch"] * 2
    callback.on_validation_end(None, None)
    assert callback.calls == [*["validation", "epoch"] * 2, "validation"]


def test_a_check_that_raises_is_made_again():
    class Fails(_Watching):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_end(trainer, pl_module)
            if len(self.calls) == 1:
                raise OSError("disk full")

    callback = Fails("merge/sma/x")
    monitors = Monitors(_trainer_with(callback), "merge/")
    monitors.new_values(RECORD)
    with monitors.waiting():
        with pytest.raises(OSError, match="disk full"):
            callback.on_validation_end(None, None)
        callback.on_validation_end(None, None)
    assert len(callback.calls) == 2


@pytest.mark.parametrize("monitor", [None, "val_loss", "merged/sma/x", "late/sma/x"])
def test_other_metrics_are_not_ours(monitor):
    callback = _Watching(monitor)
    with Monitors(_trainer_with(callback, pl.Callback()), "merge/").waiting():
        callback.on_validation_end(None, None)
    assert callback.calls == ["validation"]


def test_published_numbers_are_exact(tmp_path):
    own = fit(tmp_path, (1 / 3,), max_steps=4)
    assert own.callback_metrics[METRIC].dtype == torch.float64
    assert own.callback_metrics[METRIC].item() == 1 / 3
