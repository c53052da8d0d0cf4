"""Set-ups that are refused before the first step, with the reason and the way out."""

import lightning.pytorch as pl
import pytest
from harness.models import LIGHTNING_REMARKS, Regression, rows, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from pretrain_merge import ModelMerging
from pretrain_merge.errors import UnsupportedModelError

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
