"""The callback in real Trainers: what it measures at a merge point, and what it publishes."""

import json
import logging
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
from callbacks.watching import Seen, records
from harness.models import (
    LIGHTNING_REMARKS,
    Recorder,
    Regression,
    TiedModel,
    documents,
    regression_of,
    rows,
    same_bits,
    trainer,
)
from harness.oracles import Array
from torch import Tensor

from pretrain_merge import ModelMerging

pytestmark = LIGHTNING_REMARKS


def mean_in_float64(snapshots: list[dict[str, Tensor]], coefficients: Any) -> dict[str, Array]:
    return {
        name: sum(c * snapshot[name].double().numpy() for c, snapshot in zip(coefficients, snapshots, strict=True))
        for name in snapshots[0]
    }


def _absolute(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.abs() for name, value in tensors.items()}


def test_each_view_is_measured_on_the_weighted_sum_of_the_snapshots(tmp_path):
    seen, recorder = Seen(), Recorder()
    views = ["sma", "wma", "sma2", {"name": "cos", "kind": "decay", "shape": "cosine"}]
    merging = ModelMerging(window=3, every=2, views=views, evaluators={"seen": seen})
    trainer(tmp_path, merging, recorder, max_steps=8).fit(Regression(), rows(), rows(10, seed=1))
    expected = {
        4: {"sma": [2, 4], "wma": [2, 4], "sma2": [2, 4], "cos": [2, 4]},
        6: {"sma": [2, 4, 6], "wma": [2, 4, 6], "sma2": [4, 6], "cos": [2, 4, 6]},
        8: {"sma": [4, 6, 8], "wma": [4, 6, 8], "sma2": [6, 8], "cos": [4, 6, 8]},
    }
    shown = iter(seen.weights)
    assert [record.step for record in records(tmp_path)] == list(expected)
    for record in records(tmp_path):
        assert same_bits(next(shown), recorder.run.weights[record.step - 1])  # raw comes first
        for view, steps in expected[record.step].items():
            recipe = record.recipes[view]
            assert list(recipe.steps) == steps
            snapshots = [recorder.run.weights[step - 1] for step in steps]
            oracle = mean_in_float64(snapshots, recipe.coefficients)
            size = mean_in_float64([_absolute(snapshot) for snapshot in snapshots], recipe.coefficients)
            for name, value in next(shown).items():
                # one rounding of each product, sum and output
                assert np.all(abs(value.double().numpy() - oracle[name]) <= 2**-22 * size[name])


def test_the_merged_metric_is_that_of_a_model_with_the_mean_weights(tmp_path):
    recorder, validation = Recorder(), rows(10, seed=1)
    module = Regression(dropout=0.0)
    trainer(tmp_path, ModelMerging(window=4, every=3), recorder, max_steps=12).fit(module, rows(), validation)
    (record,) = (record for record in records(tmp_path) if record.step == 12)
    mean = mean_in_float64([recorder.run.weights[step - 1] for step in (3, 6, 9, 12)], [0.25] * 4)
    merged = Regression(dropout=0.0)
    merged.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in mean.items()})
    with torch.no_grad():
        loss = float((merged.net(validation.dataset.x) - validation.dataset.y).double().square().mean())
    assert record.views["sma"]["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert record.raw["val_loss"] != pytest.approx(loss, rel=1e-3)


def test_all_of_a_merge_point_is_in_callback_metrics_and_in_one_line(tmp_path):
    merging = ModelMerging(window=3, every=2, views=["sma", "wma"], forecast=None)
    own = trainer(tmp_path, merging, max_steps=6)
    own.fit(TiedModel(), documents(), documents(6, seed=1))
    line = json.loads((tmp_path / "merges.jsonl").read_text().splitlines()[-1])
    expected = {
        "merge/step": 6,
        "merge/tokens": 6 * 24,
        "merge/window": 3,
        "merge/spread": line["spread"],
        "merge/raw/val_loss": line["raw"]["val_loss"],
        "merge/sma/val_loss": line["views"]["sma"]["val_loss"],
        "merge/wma/val_loss": line["views"]["wma"]["val_loss"],
        "merge/sma/span": 4,
        "merge/wma/span": 4,
    }
    published = {key: float(value) for key, value in own.callback_metrics.items() if key.startswith("merge/")}
    assert published == expected
    assert (line["name"], line["step"], line["samples"], line["window"]) == ("merge", 6, 24, 3)
    assert line["spread"] > 0
    assert line["recipes"]["sma"]["steps"] == [2, 4, 6]
    assert {"evaluate_raw", "evaluate_sma", "merge_sma", "restore"} <= line["timing"].keys()
    assert merging.last_record.metrics() == expected


def test_a_merge_every_so_many_steps_uses_snapshots_of_every_few(tmp_path):
    merging = ModelMerging(window=4, every=2, start=3, merge_every=6)
    trainer(tmp_path, merging, max_steps=13).fit(Regression(), rows(), rows(4, seed=1))
    assert [(record.step, record.recipes["sma"].steps) for record in records(tmp_path)] == [
        (6, (4, 6)),
        (12, (6, 8, 10, 12)),
    ]


def test_a_view_that_needs_more_snapshots_is_skipped_and_said_once(tmp_path, caplog):
    merging = ModelMerging(window=4, every=1, views=["sma", "sma4"])
    with caplog.at_level(logging.WARNING, "pretrain_merge"):
        trainer(tmp_path, merging, max_steps=5).fit(Regression(), rows(), rows(4, seed=1))
    assert [sorted(record.shown) for record in records(tmp_path)] == [
        ["sma"],
        ["sma"],
        ["sma", "sma4"],
        ["sma", "sma4"],
    ]
    assert "needs 4 snapshots and the window holds 2" in records(tmp_path)[0].skipped["sma4"]
    assert [message for message in caplog.messages if "'sma4' needs 4" in message] == [
        "step 2: view 'sma4' needs 4 snapshots and the window holds 2 (steps 1 to 2). It will be ready at step 4; "
        "'sma' is ready now."
    ]


def test_merges_do_not_reach_across_a_marked_phase(tmp_path):
    class Switches(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                merging.mark_phase("other data")

    merging = ModelMerging(window=4, every=2)
    trainer(tmp_path, merging, Switches(), max_epochs=2).fit(Regression(), rows(), rows(4, seed=1))
    assert [(record.step, record.recipes["sma"].steps, record.phase) for record in records(tmp_path)] == [
        (4, (2, 4), ""),
        (6, (2, 4, 6), ""),
        (10, (8, 10), "other data"),
        (12, (8, 10, 12), "other data"),
    ]


def test_a_phase_marked_before_fit_is_the_one_that_the_run_is_in(tmp_path):
    merging = ModelMerging(window=4, every=2)
    merging.mark_phase("web")
    own = trainer(tmp_path, merging, max_epochs=1)
    own.fit(Regression(), rows(), rows(4, seed=1))
    merging.mark_phase("books")
    own.fit_loop.max_epochs = 2
    own.fit(own.lightning_module, rows(), rows(4, seed=1))
    assert [(record.step, record.recipes["sma"].steps, record.phase) for record in records(tmp_path)] == [
        (4, (2, 4), "web"),
        (6, (2, 4, 6), "web"),
        (10, (8, 10), "books"),
        (12, (8, 10, 12), "books"),
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"every": "8B"}, "view 'sma' needs 2 snapshots and the window holds 0. It will be ready at step 16000000000."),
        ({"every": 2, "merge_every": 100}, "no merge point was reached."),
    ],
)
def test_a_run_that_ends_without_a_merge_says_why(options, reason, tmp_path, caplog):
    merging = ModelMerging(window=4, **options)
    trainer(tmp_path, merging, max_steps=6).fit(Regression(), rows(), rows(4, seed=1))
    assert caplog.messages.count(f"training ended at step 6 without a merge: {reason}") == 1


def test_a_warm_up_is_not_merged_with_what_follows(tmp_path):
    class WarmsUp(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

    merging = ModelMerging(window=10, every=1)
    trainer(tmp_path, merging, max_steps=7).fit(WarmsUp(), rows(), rows(4, seed=1))
    # steps 1 to 4 use rising rates; the rate that step 4 used is the first of the constant ones
    assert [record.recipes["sma"].steps for record in records(tmp_path)] == [(4, 5), (4, 5, 6), (4, 5, 6, 7)]


@pytest.mark.parametrize("library", [pl, pytorch_lightning], ids=lambda library: library.__name__)
def test_it_works_in_the_trainer_of_either_library(library, tmp_path):
    merging = ModelMerging(window=3, every=2)
    own = trainer(tmp_path, merging, library=library, max_steps=6)
    own.fit(regression_of(library)(), rows(), rows(10, seed=1))
    assert [record.step for record in records(tmp_path)] == [4, 6]
    assert "merge/sma/val_loss" in own.callback_metrics


@pytest.mark.parametrize("library", [pl, pytorch_lightning], ids=lambda library: library.__name__)
def test_a_script_that_was_not_written_for_us_gains_it_in_one_line(library, tmp_path):
    boring = import_module(f"{library.__name__}.demos.boring_classes")
    merging = ModelMerging(window=3, every=8)
    own = trainer(tmp_path, merging, library=library, max_epochs=1)
    own.fit(boring.BoringModel(), datamodule=boring.BoringDataModule())
    assert [record.step for record in records(tmp_path)] == [16, 24, 32, 40, 48, 56, 64]
    assert list(merging.last_record.views) == ["sma"]


def test_from_config_takes_what_yaml_cannot_hold_beside_it(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("window: 3\nevery: 2 steps\nviews: [sma, wma]\n")
    merging = ModelMerging.from_config(path, evaluators={"one": lambda _: {"a": 1.0}}, tokens_per_batch=len)
    trainer(tmp_path, merging, max_steps=4).fit(Regression(), rows(), rows(4, seed=1))
    (record,) = records(tmp_path)
    assert record.views["wma"]["one/a"] == 1.0
    assert record.tokens == 4 * 2  # two tensors in each batch


def test_without_anything_to_measure_a_notice_says_so(tmp_path, caplog):
    trainer(tmp_path, ModelMerging(window=2, every=1), max_steps=4).fit(Regression(), rows())
    assert [message for message in caplog.messages if "nothing is measured" in message] == [
        "merges are made, but nothing is measured: no validation loader and no evaluator, or a validation_step that "
        "logs nothing."
    ]
