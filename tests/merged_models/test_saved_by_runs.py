"""What a run saves of its merges, and what it says of them; raw is back even where the disk is full."""

import json
from typing import Any

import pytest
import torch
from harness.models import (
    LIGHTNING_REMARKS,
    Recorder,
    Regression,
    TiedModel,
    documents,
    rows,
    same_bits,
    trainer,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from merged_models.saved_models import saved

from pretrain_merge import ModelMerging, load_merged
from pretrain_merge.errors import CheckpointError, ConfigError

pytestmark = LIGHTNING_REMARKS


def test_provenance_says_where_every_number_comes_from(tmp_path):
    merging = ModelMerging(window=3, every=2, views=["wma"], save={"every": 6})
    trainer(tmp_path, merging, max_steps=6).fit(TiedModel(), documents(), documents(4, seed=1))
    about = json.loads((tmp_path / "merged" / "step-00000006-wma" / "provenance.json").read_text())
    assert about["view"] == "wma"
    assert (about["step"], about["samples"], about["tokens"]) == (6, 24, 144)
    assert about["steps"] == [2, 4, 6]
    assert about["coefficients"] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert about["metrics"] == merging.last_record.views["wma"]
    assert (about["config"]["window"], about["config"]["views"]) == (3, ["wma"])
    assert about["dtypes"] == ["bool", "float32", "int64"]
    assert about["ties"] == {"head.weight": "embedding.weight"}
    assert {"torch", "lightning", "pretrain-merge"} <= about["versions"].keys()


def test_at_end_saves_every_view_and_training_ends_raw(tmp_path):
    recorder, module = Recorder(), Regression()
    merging = ModelMerging(window=2, every=2, views=["sma", "wma"], save={"at_end": True})
    trainer(tmp_path, merging, recorder, max_steps=7).fit(module, rows(), rows(4, seed=1))
    assert saved(tmp_path) == ["step-00000006-sma", "step-00000006-wma"]
    assert same_bits(weights(module), recorder.run.weights[-1])
    merged = Regression()
    about = load_merged(merged, tmp_path / "merged" / "step-00000006-wma")
    assert about["steps"] == [4, 6]
    for name, value in merged.state_dict().items():
        raw = [recorder.run.weights[step - 1][name].double() for step in (4, 6)]
        torch.testing.assert_close(value.double(), raw[0] / 3 + 2 * raw[1] / 3, rtol=1e-6, atol=1e-8)


def test_at_end_of_a_run_too_short_to_merge_saves_nothing(tmp_path):
    merging = ModelMerging(window=2, every=2, save={"at_end": True})
    trainer(tmp_path, merging, max_steps=3).fit(Regression(), rows(), rows(4, seed=1))
    assert saved(tmp_path) == []


def test_best_is_the_best_of_the_records(tmp_path):
    merging = ModelMerging(window=3, every=2, views=["sma", "wma"], save={"best": "val_loss"})
    validation = rows(10, seed=1)
    own = trainer(tmp_path, merging, max_steps=12)
    own.fit(Regression(), rows(), validation)
    lines = [json.loads(line) for line in (tmp_path / "merges.jsonl").read_text().splitlines()]
    values = {
        f"step-{line['step']:08d}-{view}": metrics["val_loss"]
        for line in lines
        for view, metrics in line["views"].items()
        if not view.startswith("forecast/")  # means that nobody asked for are not saved
    }
    best = min(values, key=values.get)
    assert saved(tmp_path) == [best] == [merging.best_model_path.name]
    module = Regression()
    load_merged(module, merging.best_model_path)
    (measured,) = trainer(tmp_path).validate(module, validation, verbose=False)
    assert measured["val_loss"] == values[best]


def test_best_survives_a_resume(tmp_path):
    scores = iter([9.0, 1.0, 9.0, 5.0, 9.0, 3.0])  # raw, merged, raw, merged, …

    def fit(steps: int, **options: Any) -> ModelMerging:
        merging = ModelMerging(
            window=2, every=2, save={"best": "own/x"}, evaluators={"own": lambda _: {"x": next(scores)}}
        )
        saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, filename="{step}", save_top_k=-1)
        trainer(tmp_path, merging, saving, max_steps=steps).fit(Regression(), rows(), rows(4, seed=1), **options)
        return merging

    fit(5)
    merging = fit(9, ckpt_path=tmp_path / "kept" / "step=5.ckpt")
    assert merging.last_record.step == 8
    assert merging.best_model_path.name == "step-00000004-sma"
    assert saved(tmp_path) == ["step-00000004-sma"]


def test_a_metric_that_is_not_measured_stops_the_run_at_its_first_merge_with_raw_weights(tmp_path):
    recorder, module = Recorder(), Regression()
    merging = ModelMerging(window=2, every=2, save={"best": "val_los"})
    with pytest.raises(ConfigError, match=r"save\.best: 'val_los' was not measured"):
        trainer(tmp_path, recorder, merging, max_steps=6).fit(module, rows(), rows(4, seed=1))
    assert same_bits(weights(module), recorder.run.weights[3])


def test_merged_models_of_an_earlier_run_are_moved_aside(tmp_path):
    for _ in range(2):
        merging = ModelMerging(window=2, every=2, save={"at_end": True})
        trainer(tmp_path, merging, max_steps=4).fit(Regression(), rows(), rows(4, seed=1))
    assert saved(tmp_path) == ["step-00000004-sma"]
    assert (tmp_path / "merged.1" / "step-00000004-sma" / "model.safetensors").exists()


def test_a_full_disk_is_an_error_and_raw_is_back(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain_merge.merged_models.whole_weights.save_file", full)
    recorder, module = Recorder(), Regression()
    merging = ModelMerging(window=2, every=2, save={"every": 2})
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free space"):
        trainer(tmp_path, recorder, merging, max_steps=6).fit(module, rows(), rows(4, seed=1))
    assert same_bits(weights(module), recorder.run.weights[3])
    assert saved(tmp_path) == []  # nothing half-written
