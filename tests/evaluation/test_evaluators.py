"""Evaluators of the user's: measured on raw and on merges alike, and held to numbers."""

from typing import Any

import pytest
import torch
from evaluation.measuring import measured
from harness.models import LIGHTNING_REMARKS, Regression, rows, trainer

from pretrain_merge import ModelMerging
from pretrain_merge.errors import EvaluationError

pytestmark = LIGHTNING_REMARKS


def test_evaluators_measure_raw_and_merged_alike(tmp_path):
    seen: list[tuple[str, float, bool, bool]] = []

    def total(module: Any) -> dict[str, float]:
        value = sum(float(parameter.sum()) for parameter in module.parameters())
        seen.append(("called", value, module.training, torch.is_grad_enabled()))
        return {"total": value}

    merging = ModelMerging(window=2, every=2, views=["sma", "wma"], evaluators={"own": total})
    own = trainer(tmp_path, merging, max_steps=4)
    own.fit(Regression(), rows(), rows(4, seed=1))
    assert [mode for _, _, *mode in seen] == [[False, False]] * 3
    values = [value for _, value, *_ in seen]
    assert len(set(values)) == 3
    for label, value in zip(("raw", "sma", "wma"), values, strict=True):
        assert own.callback_metrics[f"merge/{label}/own/total"] == pytest.approx(value)


@pytest.mark.parametrize("given", [{"a": "high"}, {"a": torch.ones(2)}, {"a": None}, 3.0, None], ids=str)
def test_an_evaluator_that_gives_no_numbers_is_an_error(given, tmp_path):
    with pytest.raises(EvaluationError, match=r"own gave .* not every value is a number.*Return a mapping"):
        measured(tmp_path, Regression(), rows(4, seed=1), isolated={"evaluators": {"own": lambda _: given}})
