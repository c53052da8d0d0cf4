"""Copies of the callback, as sweeps and folds make them from one that has run already."""

import copy
import pickle

import pytest
from harness.models import LIGHTNING_REMARKS, Regression, rows, trainer

from pretrain_merge import ModelMerging

pytestmark = LIGHTNING_REMARKS


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_callback_that_ran_can_be_copied_and_the_copy_runs(copied, tmp_path):
    merging = ModelMerging(window=2, every=1, tokens_per_batch=4)
    trainer(tmp_path / "first", merging, max_steps=3).fit(Regression(), rows(), rows(8))

    other = copied(merging)
    assert other.last_record is None
    trainer(tmp_path / "second", other, max_steps=2).fit(Regression(), rows(), rows(8))

    assert other.last_record.step == 2
    assert merging.last_record.step == 3
