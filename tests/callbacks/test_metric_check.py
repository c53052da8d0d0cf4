"""Names of metrics are held against what the first validation measures, not against the first merge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import LIGHTNING_REMARKS, Regression, rows, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from pretrain_merge import ModelMerging
from pretrain_merge.errors import ConfigError
from pretrain_merge.records import read_records

pytestmark = LIGHTNING_REMARKS
LATE = {"window": 2, "every": 2, "merge_every": 1000}  # a merge that never comes


def fit(folder: Path, *callbacks: Any, module: Any = None, max_steps: int = 3, sanity: int = 2, **options: Any) -> Any:
    merging = ModelMerging(**(LATE | options))
    own = trainer(folder, merging, *callbacks, max_steps=max_steps, num_sanity_val_steps=sanity, val_check_interval=2)
    own.fit(module or Regression(), rows(), rows(4, seed=1))
    return own


class Slashed(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))


class Guarded(Regression):
    """Logs less in the sanity check than later, as modules that compute a costly metric do."""

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val_fid", 1.0)


class Plateau(Regression):
    def __init__(self, monitor: str, **options: Any) -> None:
        super().__init__(lr=0.01)
        self.monitor, self.options = monitor, options

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor, **self.options},
        }


@pytest.mark.parametrize("sanity", [2, 0])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": {"best": "val_los"}}, r"save\.best: 'val_los' was not measured\. .* Did you mean 'val_loss'\?"),
        ({"forecast": {"now": {"metric": "va_loss"}}}, r"forecast\.now\.metric: 'va_loss' was not .* mean 'val_loss'"),
    ],
)
def test_a_misspelt_key_is_refused_at_the_first_validation(options, message, sanity, tmp_path):
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, sanity=sanity, **options)


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ("merge/smaa/val_loss", r"'smaa', which is not configured\. .* Did you mean 'merge/sma/val_loss'"),
        ("merge/sma/val_los", r"'merge/sma/val_los' will not be measured\. .* Did you mean 'merge/sma/val_loss'"),
        ("merge/forecast/soon/val_loss", r"'forecast/soon', which is not configured"),
    ],
)
@pytest.mark.parametrize("kind", ["stopping", "checkpoint", "plateau"])
def test_a_misspelt_monitor_is_refused_at_the_first_validation(kind, monitor, message, tmp_path):
    callbacks = {
        "stopping": [EarlyStopping(monitor)],
        "checkpoint": [ModelCheckpoint(tmp_path / "kept", monitor=monitor)],
        "plateau": [],
    }[kind]
    module = Plateau(monitor) if kind == "plateau" else Regression()
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, *callbacks, module=module)


@pytest.mark.parametrize(
    "monitor", ["merge/raw/val_loss", "merge/sma/own/x", "merge/spread", "merge/forecast/now/val_loss/low"]
)
def test_what_will_be_measured_is_not_refused(monitor, tmp_path):
    evaluators = {"own": lambda module: {"x": 1.0}}
    fit(tmp_path, EarlyStopping(monitor), evaluators=evaluators, forecast={"now": {}}, save={"best": "own/x"})


def test_val_loss_is_found_where_it_is_logged_as_val_slash_loss(tmp_path):
    fit(tmp_path, module=Slashed(), max_steps=6, merge_every=2, save={"best": "val_loss"})
    (best,) = (tmp_path / "merged").glob("step-*")
    assert best.name == "step-00000006-sma"


def test_p07_a_metric_that_the_sanity_check_leaves_out_is_not_refused(tmp_path, caplog):
    fit(tmp_path, module=Guarded(), save={"best": "val_fid"})
    assert "'val_fid' was not measured" in caplog.text


def test_p07_one_that_no_validation_measures_is_refused_all_the_same(tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean 'val_fid'"):
        fit(tmp_path, module=Guarded(), save={"best": "val_fidd"})


def test_a_misspelt_key_of_an_evaluator_shows_in_a_fast_dev_run(tmp_path):
    merging = ModelMerging(evaluators={"own": lambda module: {"x": 1.0}})
    own = trainer(tmp_path, merging, EarlyStopping("merge/sma/own/y"), fast_dev_run=True)
    with pytest.raises(ConfigError, match="Did you mean 'merge/sma/own/x'"):
        own.fit(Regression(), rows(), rows(4, seed=1))


def test_a_plateau_of_a_merged_metric_counts_merges(tmp_path):
    # no value is as good as the threshold asks for: the rate is halved once for each merge
    module = Plateau("merge/sma/val_loss", interval="step", frequency=1)
    own = fit(tmp_path, module=module, max_steps=9, merge_every=4, breaks={"lr": False})
    assert [record.step for record in read_records(tmp_path / "merges.jsonl")] == [4, 8]
    assert own.optimizers[0].param_groups[0]["lr"] == 0.0025
