"""Set-ups that are refused before the first step, with the reason and the way out."""

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
from harness.models import LIGHTNING_REMARKS, Regression, rows, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from pretrain_merge import ModelMerging
from pretrain_merge.errors import EvaluationError, UnsupportedModelError

pytestmark = LIGHTNING_REMARKS


@pytest.mark.parametrize(
    ("strategy", "way_out"),
    [(FSDPStrategy, r"also with use_orig_params=True; use FSDP2"), (DeepSpeedStrategy, r"every ZeRO stage; use DDP")],
)
@pytest.mark.parametrize("is_users_own", [False, True])
def test_p19_a_strategy_whose_parameters_are_not_plain_is_refused_at_setup(strategy, way_out, is_users_own, tmp_path):
    own = trainer(tmp_path, ModelMerging())
    kind = type(strategy.__name__, (type(own.strategy),), {})
    own.strategy.__class__ = type("Own", (kind,), {}) if is_users_own else kind
    with pytest.raises(UnsupportedModelError, match=f"{strategy.__name__} is not supported.*{way_out}"):
        own.fit(Regression(), rows())
    assert own.global_step == 0


def test_batch_norm_is_refused_before_the_first_step(tmp_path):
    class Module(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

    own = trainer(tmp_path, ModelMerging(), max_steps=2)
    with pytest.raises(UnsupportedModelError, match="batch_norm='live'"):
        own.fit(Module(), rows())
    assert own.global_step == 0


def test_misconfiguration_of_lightning_is_lightnings_to_say(tmp_path):
    with pytest.raises(MisconfigurationException, match="No `training_step"):
        trainer(tmp_path, ModelMerging()).fit(pl.LightningModule(), rows())


class _Data(pl.LightningDataModule):
    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader, self.num_asked = loader, 0

    def train_dataloader(self) -> Any:
        return rows()

    def val_dataloader(self) -> Any:
        self.num_asked += 1
        return self.loader()


ONE_SHOT = {
    "a generator": (lambda: (batch for batch in rows(8)), "generator"),
    "a chain": (lambda: itertools.chain(rows(8), rows(8, seed=1)), "chain"),
    "pairs": (lambda: zip(rows(8), rows(8), strict=True), "zip"),
    "an iterator of a loader": (lambda: iter(rows(8)), "_SingleProcessDataLoaderIter"),
}


@pytest.mark.parametrize("kind", ONE_SHOT)
@pytest.mark.parametrize("stateful_data", ["refuse", "iterate"])
def test_what_validation_can_read_only_once_is_refused_before_anything_is_read(kind, stateful_data, tmp_path):
    make, named = ONE_SHOT[kind]
    given = make()
    merging = ModelMerging(window=2, every=1, stateful_data=stateful_data)
    own = trainer(tmp_path, merging, max_steps=2, num_sanity_val_steps=2)
    with pytest.raises(EvaluationError, match=rf"loader 1 is an iterator \({named}\).*a DataLoader, or an object"):
        own.fit(Regression(), rows(), [rows(4), given])
    assert len(list(given)) in (2, 4)  # all that there was


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 5}], ids=["asked", "not asked yet"])
def test_what_a_hook_gives_to_be_read_once_is_refused_before_the_first_step(options, tmp_path):
    data = _Data(ONE_SHOT["a generator"][0])
    own = trainer(tmp_path, ModelMerging(window=2, every=1), max_steps=2, **options)
    with pytest.raises(EvaluationError, match=r"loader 0 is an iterator \(generator\)"):
        own.fit(Regression(), datamodule=data)
    assert own.global_step == 0
    assert data.num_asked == 1 - bool(options)  # what we asked for is undone


class _Anew:
    def __iter__(self) -> Any:
        yield from rows(8)


@pytest.mark.parametrize("loader", [_Anew, lambda: {"a": rows(8), "b": [rows(4)]}])
def test_what_starts_over_at_each_iteration_is_welcome(loader, tmp_path):
    own = trainer(tmp_path, ModelMerging(window=2, every=1), max_steps=2)
    own.fit(Regression(), rows(), loader())
    assert "merge/sma/val_loss/dataloader_idx_0" in own.callback_metrics or "merge/sma/val_loss" in own.callback_metrics


def test_a_validation_that_is_not_measured_may_be_read_once(tmp_path):
    own = trainer(tmp_path, ModelMerging(window=2, every=1, validate=False), max_steps=2)
    own.fit(Regression(), rows(), ONE_SHOT["a chain"][0]())
    assert own.global_step == 2
