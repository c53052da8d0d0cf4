"""Situations in which Lightning 2.6.6's `WeightAveraging` goes wrong, each with `ModelMerging` in its place."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from harness.models import (
    LIGHTNING_REMARKS,
    Regression,
    TiedModel,
    TwoOptimizers,
    Witness,
    documents,
    rows,
    same_bits,
    trainer,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from pretrain_merge import ModelMerging, load_merged
from pretrain_merge.records import read_records

pytestmark = LIGHTNING_REMARKS


class RawAtEachStep(pl.Callback):
    """Put before the merging callback: raw weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(weights(pl_module))


class Noting(Regression):
    """Says with which weights each hook and step ran; can be tested too."""

    noted: list[tuple[str, float]]

    def _note(self, hook: str) -> None:
        # outside of what an evaluation gives back
        type(self).noted.append((hook, float(self.net[0].weight.detach().double().sum())))

    def on_validation_epoch_start(self) -> None:
        self._note("start")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._note("step")
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._note("end")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))


@pytest.fixture
def noting() -> type[Noting]:
    return type("Noting", (Noting,), {"noted": Witness()})


def test_d1_p09_a_weights_only_checkpoint_under_a_merged_metric_is_raw_and_the_merged_weights_have_files(
    tmp_path, caplog
):
    saving = ModelCheckpoint(
        tmp_path / "kept", monitor="merge/sma/val_loss", save_weights_only=True, every_n_train_steps=4, save_top_k=-1,
        filename="{step}",
    )  # fmt: skip
    raw, merging = RawAtEachStep(), ModelMerging(window=2, every=4, save={"every": 4, "keep": 9})
    module = Regression()
    trainer(tmp_path, raw, merging, saving, max_steps=8).fit(module, rows(), rows(10, seed=1))
    checkpoint = torch.load(tmp_path / "kept" / "step=8.ckpt", weights_only=True)
    assert same_bits(dict(checkpoint["state_dict"]), raw.weights[7])
    assert any("RAW weights" in message and str(tmp_path / "merged") in message for message in caplog.messages)
    merged = Regression()
    load_merged(merged, tmp_path / "merged" / "step-00000008-sma")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, (raw.weights[3][name] + raw.weights[7][name]) / 2)


def test_d2_a_test_of_the_best_checkpoint_and_of_the_best_merge_are_each_what_they_say(tmp_path, noting):
    saving = ModelCheckpoint(tmp_path / "kept", monitor="merge/sma/val_loss", every_n_train_steps=4)
    merging = ModelMerging(window=2, every=4, save={"best": "val_loss"})
    module, data = noting(), rows(10, seed=1)
    own = trainer(tmp_path, merging, saving, max_steps=12)
    own.fit(module, rows(), data)
    best = min(read_records(tmp_path / "merges.jsonl"), key=lambda record: record.views["sma"]["val_loss"])
    (of_checkpoint,) = own.test(module, data, ckpt_path="best", verbose=False, weights_only=True)
    load_merged(module, merging.best_model_path)
    (of_merge,) = own.test(module, data, verbose=False)
    assert of_merge["test_loss"] == best.views["sma"]["val_loss"]
    assert of_checkpoint["test_loss"] == best.raw["val_loss"]
    assert of_checkpoint != of_merge


def test_d3_a_start_that_is_never_reached_leaves_the_trained_weights(tmp_path):
    raw, module = RawAtEachStep(), Regression()
    before = weights(module)
    trainer(tmp_path, raw, ModelMerging(window=2, every=2, start=1000), max_steps=6).fit(
        module, rows(), rows(4, seed=1)
    )
    assert same_bits(weights(module), raw.weights[-1])
    assert not same_bits(weights(module), before)
    assert not (tmp_path / "merges.jsonl").exists()


def test_d4_a_validation_before_the_first_snapshot_sees_the_live_weights(tmp_path, noting):
    module, raw = noting(), RawAtEachStep()
    own = trainer(tmp_path, raw, ModelMerging(window=2, every=50), max_steps=2, val_check_interval=1)
    own.fit(module, rows(), rows(4, seed=1))
    live = [float(step["net.0.weight"].double().sum()) for step in raw.weights]
    assert module.noted == [(hook, value) for value in live for hook in ("start", "step", "end")]


@pytest.mark.parametrize("breaks_in", ["raw", "merged"])
def test_d5_a_checkpoint_saved_on_an_exception_holds_raw_weights(breaks_in, tmp_path):
    raw = RawAtEachStep()

    class Module(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if same_bits(weights(self), raw.weights[-1]) == (breaks_in == "raw") and len(raw.weights) == 4:
                raise RuntimeError("out of luck")
            super().validation_step(batch, batch_idx)

    saving = ModelCheckpoint(tmp_path / "kept", filename="broken", save_on_exception=True, save_top_k=0)
    own = trainer(tmp_path, raw, ModelMerging(window=2, every=2), saving, max_steps=8)
    with pytest.raises(RuntimeError, match="out of luck"):
        own.fit(Module(), rows(), rows(4, seed=1))
    checkpoint = torch.load(tmp_path / "kept" / "broken.ckpt", weights_only=True)
    assert same_bits(dict(checkpoint["state_dict"]), raw.weights[3])
    moments = checkpoint["optimizer_states"][0]["state"]
    assert moments[0]["step"] == 4


@pytest.mark.parametrize("average", ["last", "block"])
def test_d6_bool_buffers_and_d7_integer_buffers_are_never_averaged(average, tmp_path):
    seen = []

    def look(module: Any) -> dict[str, float]:
        seen.append((int(module.steps_seen), bool(module.is_warm), module.steps_seen.dtype, module.is_warm.dtype))
        return {}

    module = TiedModel()
    merging = ModelMerging(window=3, every=1, average=average, evaluators={"look": look}, save={"at_end": True})
    trainer(tmp_path, merging, max_steps=7).fit(module, documents(), documents(4, seed=1))
    assert seen[-2:] == [(7, True, torch.int64, torch.bool)] * 2  # raw, then merged: 7 stays 7
    saved = TiedModel()
    load_merged(saved, tmp_path / "merged" / "step-00000007-sma")
    assert (int(saved.steps_seen), bool(saved.is_warm)) == (7, True)


def test_d8_two_optimizer_steps_in_a_batch_do_not_jump_over_the_interval(tmp_path):
    # Lightning's global_step goes 2, 4, 6, ...; an interval of 2 or 3 steps is one of ours all the same
    own = trainer(tmp_path, ModelMerging(window=2, every=3), max_epochs=2)
    own.fit(TwoOptimizers(), rows(), rows(4, seed=1))
    assert own.global_step == 24
    assert [record.step for record in read_records(tmp_path / "merges.jsonl")] == [6, 9, 12]


def test_d9_any_coefficients_can_be_asked_for(tmp_path):
    coefficients = [-0.25, 0.5, 0.75]
    raw, shown = RawAtEachStep(), []
    views = [{"name": "own", "kind": "custom", "weights": coefficients}, "ema"]
    evaluators = {"look": lambda module: shown.append(weights(module)) or {}}
    merging = ModelMerging(window=3, every=1, views=views, evaluators=evaluators)
    trainer(tmp_path, raw, merging, max_steps=3).fit(Regression(), rows(), rows(4, seed=1))
    _, own, _ = shown[-3:]
    for name, value in own.items():
        expected = sum(c * step[name].double() for c, step in zip(coefficients, raw.weights, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_d10_p21_two_instances_live_in_one_trainer_and_resume_their_own_state(tmp_path):
    def both() -> list[ModelMerging]:
        return [ModelMerging(window=2, every=2), ModelMerging(window=2, every=3, name="slow")]

    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=7, filename="{step}")
    trainer(tmp_path, *both(), saving, max_steps=7).fit(Regression(), rows(), rows(4, seed=1))
    own = trainer(tmp_path, *both(), saving, max_steps=13)
    own.fit(Regression(), rows(), rows(4, seed=1), ckpt_path=tmp_path / "kept" / "step=7.ckpt")
    steps = {
        folder.name: [record.step for record in read_records(folder / "merges.jsonl")]
        for folder in (tmp_path, tmp_path / "slow")
    }
    assert steps == {tmp_path.name: [4, 6, 8, 10, 12], "slow": [6, 9, 12]}
    assert {"merge/step", "slow/step"} <= own.callback_metrics.keys()


def test_d11_every_validation_hook_of_the_module_sees_the_same_weights(tmp_path, noting):
    module, raw = noting(), RawAtEachStep()
    own = trainer(tmp_path, raw, ModelMerging(window=2, every=2), max_steps=4, check_val_every_n_epoch=99)
    own.fit(module, rows(), rows(4, seed=1))
    live = [float(step["net.0.weight"].double().sum()) for step in raw.weights]
    (first, *_), hooks = module.noted, [hook for hook, _ in module.noted]
    assert hooks == ["start", "step", "end"] * 2
    assert {value for _, value in module.noted[:3]} == {live[3]} == {first[1]}
    (merged,) = {value for _, value in module.noted[3:]}
    assert merged == pytest.approx((live[1] + live[3]) / 2, abs=1e-6)
    assert merged != live[3]


def test_no_weights_of_ours_are_in_lightnings_checkpoints(tmp_path: Path):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, filename="{step}")
    module = Regression()
    trainer(tmp_path, ModelMerging(window=2, every=2), saving, max_steps=4).fit(module, rows(), rows(4, seed=1))
    checkpoint = torch.load(tmp_path / "kept" / "step=4.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()
    assert not any(isinstance(value, Tensor) for value in checkpoint["callbacks"]["ModelMerging[merge]"].values())
