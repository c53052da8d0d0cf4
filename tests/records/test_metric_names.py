"""Names of metrics as people write them, against those that were measured."""

import pytest

from pretrain_merge.errors import ConfigError
from pretrain_merge.records.metric_names import measured_name


def test_of_several_loaders_the_first_is_offered():
    measured = ["acc/dataloader_idx_0", "val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]
    with pytest.raises(ConfigError, match=r"Did you mean 'val_loss/dataloader_idx_0'\?"):
        measured_name("save.best", "val_loss", measured)
