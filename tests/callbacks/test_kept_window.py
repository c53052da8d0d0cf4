"""The window beside the checkpoints: a resumed run goes on exactly, or says why not; nothing needed is deleted."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from harness.models import LIGHTNING_REMARKS, Regression, TwoOptimizers, rows, same_bits, weights
from harness.models import trainer as plain_trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain_merge import ModelMerging
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.merged_models import merged
from pretrain_merge.records import read_records
from pretrain_merge.resume import saved_block
from pretrain_merge.resume.sidecar import WindowFolder

pytestmark = [
    *LIGHTNING_REMARKS,
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]
STEPS = 16
OPTIONS = {"window": 3, "every": 2, "merge_every": 4, "views": ["sma", "wma"], "tokens_per_batch": 5}


class ByStep(pl.LightningModule):
    """Learns from data that depend on the step only, so that a resumed run sees what the whole one saw (P26)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.head = nn.Linear(3, 1).to(torch.bfloat16)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.trainer.global_step))
        return (self.head(self.layer(x).tanh().bfloat16()).float() - x.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(torch.ones(2, 4)).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Breaks(ByStep):
    """Fails after so many steps."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == self.at:
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


class Events(pl.Callback):
    """What happens in a run besides steps: a phase begins."""

    def __init__(self, merging: ModelMerging) -> None:
        self.merging = merging

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            self.merging.mark_phase("second")


def trainer(folder: Path, merging: ModelMerging, *callbacks: Any, **options: Any) -> pl.Trainer:
    return plain_trainer(folder, *callbacks, merging, **({"max_steps": STEPS, "enable_checkpointing": True} | options))


def saving(folder: Path, **options: Any) -> ModelCheckpoint:
    defaults = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    return ModelCheckpoint(folder / "kept", **(defaults | options))


def fit(folder: Path, *, module: Any = None, ckpt_path: Path | None = None, **options: Any) -> Any:
    own = {key: options.pop(key) for key in list(options) if key in ("max_steps", "logger", "accumulate_grad_batches")}
    kept = options.pop("saving", None) or saving(folder)
    merging = ModelMerging(**(OPTIONS | options))
    module = module or ByStep()
    trainer(folder, merging, Events(merging), kept, **own).fit(module, rows(64), rows(4), ckpt_path=ckpt_path)
    return module, merging


def lines(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "merges.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in read]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "window").iterdir())


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "kept" / f"step={step}.ckpt"


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end with all its checkpoints, to be copied and never changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder)
    return folder


# --- exact resume ---


@pytest.mark.parametrize("average", ["last", "block"])
@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_a_run_resumed_from_any_checkpoint_is_the_uninterrupted_run(store, average, tmp_path):
    options = {"store": store, "average": average, "save": {"every": 4, "keep": 9}}
    raw, _ = fit(tmp_path / "whole", **options)
    # every store is resumed at every step, and so is every average at two of them
    for step in (3, 9) if average == "last" else (6, 12):
        folder = tmp_path / f"resumed at {step}"
        fit(folder, max_steps=step, **options)
        resumed, _ = fit(folder, ckpt_path=checkpoint(folder, step), **options)
        assert lines(folder) == lines(tmp_path / "whole")
        assert same_bits(weights(resumed), weights(raw))
        for model in sorted((tmp_path / "whole" / "merged").iterdir()):
            ours, theirs = (load_file(path / "model.safetensors") for path in (folder / "merged" / model.name, model))
            assert same_bits(ours, theirs)


def test_a_run_resumed_with_gradient_accumulation_and_two_optimizers_goes_on_exactly(tmp_path):
    for build, options in ((ByStep, {"accumulate_grad_batches": 2}), (TwoOptimizers, {})):
        whole, parts = tmp_path / f"{build.__name__} whole", tmp_path / f"{build.__name__} parts"
        for folder in (whole, parts):
            fit(folder, module=build(), max_steps=6 if folder == parts else 12, **options)
        (newest,) = sorted((parts / "kept").glob("*=6.ckpt"))
        fit(parts, module=build(), max_steps=12, ckpt_path=newest, **options)
        counters = [
            [(line["step"], line["tokens"], line["recipes"]["sma"]["steps"]) for line in lines(folder)]
            for folder in (whole, parts)
        ]
        assert counters[0] == counters[1]
        assert counters[0]


def test_p26_the_window_of_an_older_checkpoint_is_that_of_its_step(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    fit(folder, ckpt_path=checkpoint(folder, 9))
    assert lines(folder) == lines(whole)


def test_a_resumed_run_in_a_new_folder_finds_the_window_and_begins_with_the_records_before(tmp_path):
    for resume in ({"max_steps": 9}, {"ckpt_path": checkpoint(tmp_path, 9)}):
        fit(tmp_path, logger=CSVLogger(tmp_path, name="logs"), **resume)
    first, second = tmp_path / "logs" / "version_0", tmp_path / "logs" / "version_1"
    fit(tmp_path / "whole")
    assert lines(second) == lines(tmp_path / "whole")
    assert lines(first) == lines(second)[:2]


def test_a_run_that_was_moved_finds_its_window_beside_the_checkpoint(whole, tmp_path):
    folder = copied(whole, tmp_path / "before")
    folder.rename(tmp_path / "after")
    state = torch.load(checkpoint(tmp_path / "after", 9), weights_only=True)["callbacks"]["ModelMerging[merge]"]
    assert not Path(state["values"]["window_folder"]).is_relative_to(tmp_path)
    elsewhere = tmp_path / "new"
    fit(elsewhere, ckpt_path=checkpoint(tmp_path / "after", 9), on_missing="error")
    assert lines(elsewhere)[-1] == lines(whole)[-1]


def test_a_checkpoint_that_is_saved_after_the_run_goes_on_exactly(tmp_path):
    merging = ModelMerging(**OPTIONS)
    own = trainer(tmp_path, merging, Events(merging), saving(tmp_path), max_steps=10)
    own.fit(ByStep(), rows(64), rows(4))
    own.save_checkpoint(tmp_path / "final.ckpt")
    fit(tmp_path, ckpt_path=tmp_path / "final.ckpt")
    fit(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*was called without a model.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
@pytest.mark.parametrize(
    "kept",
    [
        lambda folder: saving(folder, save_on_exception=True, every_n_train_steps=100),
        lambda folder: OnExceptionCheckpoint(folder / "kept"),
    ],
    ids=["save_on_exception", "OnExceptionCheckpoint"],
)
def test_an_exception_leaves_a_checkpoint_that_goes_on_exactly_where_one_is_saved_on_it(kept, tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, module=Breaks(at=11), saving=kept(tmp_path))
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    fit(tmp_path, ckpt_path=path)
    fit(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_an_exception_before_the_first_snapshot_leaves_a_checkpoint_too(tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, module=Breaks(at=1), saving=saving(tmp_path, save_on_exception=True, every_n_train_steps=100))
    assert len(list((tmp_path / "kept").glob("*.ckpt"))) == 1


def test_a_larger_window_goes_on_with_the_snapshots_that_are_there(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    fit(folder, ckpt_path=checkpoint(folder, 9), window=5)
    assert lines(folder)[-1]["window"] > lines(whole)[-1]["window"]


def test_a_merge_that_a_signal_broke_off_is_made_when_the_run_is_resumed(tmp_path):
    class Terminated(ByStep):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 12:
                signal.raise_signal(signal.SIGTERM)
            super().validation_step(batch, batch_idx)

    kept = saving(tmp_path, save_on_exception=True, every_n_train_steps=100)
    with pytest.raises(BaseException):  # noqa: B017 - Lightning's own, of no public class
        fit(tmp_path, module=Terminated(), saving=kept)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8]
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    fit(tmp_path, ckpt_path=path)
    fit(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_a_checkpoint_asked_for_inside_a_merge_is_resumed_without_a_step_twice(tmp_path):
    class Asks(ByStep):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 12:
                self.trainer.save_checkpoint(tmp_path / "asked.ckpt")
            super().validation_step(batch, batch_idx)

    fit(tmp_path, module=Asks())
    before = lines(tmp_path)
    fit(tmp_path, ckpt_path=tmp_path / "asked.ckpt")
    assert lines(tmp_path) == before


def test_a_checkpoint_inside_an_accumulation_is_lightnings_and_ours_goes_on_with_the_weights_as_they_are(tmp_path):
    """ModelCheckpoint saves again in the first micro-batch after a resume; the gradients until then are in no file."""
    weights_at: dict[int, dict[str, Any]] = {}

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            weights_at[trainer.global_step] = weights(pl_module)

    def go_on(folder: Path, steps: int, **resume: Any) -> None:
        merging = ModelMerging(**OPTIONS, save={"every": 4, "keep": 9})
        callbacks = (Events(merging), Notes(), saving(folder))
        own = trainer(folder, merging, *callbacks, max_steps=steps, accumulate_grad_batches=2)
        own.fit(ByStep(), rows(64), rows(4), **resume)

    go_on(tmp_path / "whole", STEPS)
    uninterrupted = dict(weights_at)
    run = tmp_path / "run"
    go_on(run, 9)
    go_on(run, 10, ckpt_path=checkpoint(run, 9))
    loops = torch.load(checkpoint(run, 9), weights_only=True)["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["total"]["ready"] == 19  # 9 steps and one micro-batch
    go_on(run, STEPS, ckpt_path=checkpoint(run, 9))
    assert not same_bits(weights_at[STEPS], uninterrupted[STEPS])  # so it says nothing against us
    keys = ("step", "samples", "tokens", "recipes", "window")
    found, expected = ([{key: line[key] for key in keys} for line in lines(f)] for f in (run, tmp_path / "whole"))
    assert found == expected
    merged_now = load_file(run / "merged" / "step-00000016-sma" / "model.safetensors")
    for name, value in merged_now.items():
        mean = torch.stack([weights_at[step][name].double() for step in (12, 14, 16)]).mean(0)
        torch.testing.assert_close(value, mean.to(value.dtype), rtol=1e-6, atol=0)


def test_a_run_resumed_in_a_copy_of_its_folder_leaves_the_original_alone(tmp_path):
    options = {"save": {"every": 4, "keep": 1}}
    fit(tmp_path / "original", max_steps=9, **options)
    copy = copied(tmp_path / "original", tmp_path / "copy")
    before = {path: path.read_bytes() for path in (tmp_path / "original").rglob("*") if path.is_file()}
    fit(copy, ckpt_path=checkpoint(copy, 9), **options)
    assert {path: path.read_bytes() for path in (tmp_path / "original").rglob("*") if path.is_file()} == before
    assert {path.name for path in (copy / "merged").iterdir()} == {
        f"step-000000{STEPS}-{view}" for view in ("sma", "wma")
    }


class Terminated(ByStep):
    """Gets SIGTERM in the validation of a merge point."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)
        super().validation_step(batch, batch_idx)


def terminated(folder: Path, step: int, **options: Any) -> None:
    with pytest.raises(SystemExit):
        fit(folder, module=Terminated(step), **options)


def test_a_second_signal_in_the_repeated_merge_leaves_it_owed_before_another_step(tmp_path):
    def kept() -> ModelCheckpoint:
        return saving(tmp_path, save_on_exception=True, every_n_train_steps=100)

    terminated(tmp_path, 12, saving=kept())
    for _ in range(2):
        (path,) = (tmp_path / "kept").glob("*.ckpt")
        assert path == checkpoint(tmp_path, 12)
        terminated(tmp_path, 12, saving=kept(), ckpt_path=path)
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 12))
    fit(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_a_merge_of_the_last_step_that_a_signal_broke_off_is_made_though_no_step_is_left(tmp_path):
    options = {"save": {"every": 4, "keep": 9, "at_end": True}, "store": "disk"}
    terminated(tmp_path, STEPS, saving=saving(tmp_path, every_n_train_steps=STEPS), **options)
    fit(tmp_path / "whole", **options)
    assert lines(tmp_path) == lines(tmp_path / "whole")[:-1]
    for _ in range(2):  # once more changes nothing
        raw, merging = fit(tmp_path, ckpt_path=checkpoint(tmp_path, STEPS), **options)
        assert lines(tmp_path) == lines(tmp_path / "whole")
        assert {path.name for path in (tmp_path / "merged").iterdir()} == {
            path.name for path in (tmp_path / "whole" / "merged").iterdir()
        }
    assert merging.last_record.step == STEPS
    assert same_bits(weights(raw), torch.load(checkpoint(tmp_path, STEPS), weights_only=True)["state_dict"])


def test_a_complete_run_that_was_killed_at_its_end_is_tidied_up_when_it_is_resumed(tmp_path, caplog):
    fit(tmp_path, store="disk", saving=saving(tmp_path, every_n_train_steps=8))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    left = [tmp_path / "window" / "lock", tmp_path / "window" / ".snapshot-00000014.1.tmp"]
    left += [tmp_path / "window" / "rank-0000" / name for name in ("lock", "slot-002.safetensors")]
    for path in left:
        path.touch()
    fit(tmp_path, store="disk", ckpt_path=checkpoint(tmp_path, STEPS), saving=saving(tmp_path, every_n_train_steps=8))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not any("without a merge" in message for message in caplog.messages)


def test_a_merge_that_another_signal_broke_off_is_made_at_once(tmp_path):
    asked: list[int] = []

    class Asked(ByStep):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 12 and not asked:
                signal.raise_signal(signal.SIGUSR1)
            super().validation_step(batch, batch_idx)

    def requeue(number: int, _: Any) -> None:
        asked.append(number)
        module.trainer.save_checkpoint(tmp_path / "requeue.ckpt")

    module, before = Asked(), signal.signal(signal.SIGUSR1, requeue)
    try:
        fit(tmp_path, module=module)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 12, 16]
    uninterrupted = lines(tmp_path)
    fit(tmp_path, ckpt_path=tmp_path / "requeue.ckpt")  # in which it was owed
    assert lines(tmp_path) == uninterrupted


def test_records_that_an_earlier_checkpoint_cut_are_said_to_be_missing(tmp_path, caplog):
    fit(tmp_path, max_steps=12)
    fit(tmp_path, max_steps=5, ckpt_path=checkpoint(tmp_path, 3))
    caplog.clear()
    fit(tmp_path, max_steps=13, ckpt_path=checkpoint(tmp_path, 12))
    assert any("lacks merges up to step 12" in message for message in caplog.messages)


# --- what cannot be restored ---


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    tensors = load_file(path)
    path.unlink()
    if how == "truncated":
        path.write_bytes(data[:-5])
    elif how in ("a flipped bit of the header", "a flipped bit of a tensor"):
        data[20 if "header" in how else -3] ^= 4
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a pickle":
        path.write_bytes(pickle.dumps({"layer.weight": [1.0]}))
    elif how == "a header of 2^63 bytes":
        path.write_bytes((2**63).to_bytes(8, "little") + data[8:])
    elif how == "a loop":
        path.symlink_to(path)
    elif how == "a link out of the folder":
        outside = path.parent.parent / "outside.safetensors"
        outside.write_bytes(data)
        path.symlink_to(outside)
    elif how == "a folder":
        path.mkdir()
    else:
        name = next(iter(tensors))
        changed = {
            "another dtype": {**tensors, name: tensors[name].double()},
            "another shape": {**tensors, name: tensors[name].flatten()},
            "a missing tensor": {key: value for key, value in tensors.items() if key != name},
            "an extra tensor": {**tensors, "extra": torch.ones(1)},
            "foreign safetensors": {"foreign": torch.ones(3)},
        }[how]
        save_file(changed, path)


@pytest.mark.parametrize(
    "how",
    [
        "truncated", "a flipped bit of the header", "a flipped bit of a tensor", "empty", "a pickle",
        "a header of 2^63 bytes", "a link out of the folder", "another dtype", "another shape", "a missing tensor",
        "an extra tensor", "foreign safetensors",
    ],
)  # fmt: skip
def test_a_bad_file_is_an_error_that_names_it_and_both_ways_out(how, whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    state = torch.load(checkpoint(folder, 9), weights_only=True)["callbacks"]["ModelMerging[merge]"]
    name = state["values"]["window"]["values"]["snapshots"][0]["file"]["name"]
    spoil(folder / "window" / name, how)
    with pytest.raises(CheckpointError) as caught:
        fit(folder, ckpt_path=checkpoint(folder, 9), window_folder=str(folder / "window"))
    message = str(caught.value)
    assert name in message
    assert "window_folder" in message
    assert "on_missing='refill'" in message


@pytest.mark.parametrize("how", ["a loop", "a folder"])
def test_what_is_no_file_is_an_error(how, tmp_path):
    fit(tmp_path, max_steps=9)
    spoil(next((tmp_path / "window").glob("snapshot-00000008-*")), how)
    with pytest.raises(CheckpointError, match=r"snapshot-00000008-.*on_missing='refill'"):
        fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9))


def test_a_checkpoint_older_than_the_windows_that_are_kept_is_an_error_that_names_the_bound(tmp_path):
    fit(tmp_path, keep_windows=1)
    with pytest.raises(
        CheckpointError, match=r"is not there.*keep_windows: 1 keeps no older ones.*on_missing='refill'"
    ):
        fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9), keep_windows=1)


def test_a_window_that_is_gone_is_an_error_or_an_empty_window_that_is_said(tmp_path, caplog):
    fit(tmp_path, max_steps=9)
    shutil.rmtree(tmp_path / "window")
    with pytest.raises(CheckpointError, match=r"is not there.*window_folder.*on_missing='refill'"):
        fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9))
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9), on_missing="refill")
    assert any("the window starts empty" in message for message in caplog.messages)
    assert lines(tmp_path)[-1]["step"] == STEPS
    assert lines(tmp_path)[-1]["recipes"]["sma"]["steps"] == [12, 14, 16]


@pytest.mark.parametrize("options", [{"every": 3}, {"average": "block"}, {"slot_dtype": "bfloat16"}, {"window": 2}])
def test_a_configuration_that_makes_other_snapshots_is_an_error(options, whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    (key,) = options
    with pytest.raises(ConfigError, match=rf"{key}: .*on_missing='refill'"):
        fit(folder, ckpt_path=checkpoint(folder, 12), **options)


def test_another_model_is_an_error_that_says_what_differs(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    module = ByStep()
    module.head.float()
    with pytest.raises(CheckpointError, match=r"of another model: .*head\.weight is .*Build the model"):
        fit(folder, module=module, ckpt_path=checkpoint(folder, 9))


def test_a_checkpoint_whose_manifest_was_changed_is_an_error(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    content = torch.load(checkpoint(folder, 9), weights_only=True)
    content["callbacks"]["ModelMerging[merge]"]["values"]["progress"]["tokens"] += 1
    torch.save(content, checkpoint(folder, 9))
    with pytest.raises(CheckpointError, match="damaged"):
        fit(folder, ckpt_path=checkpoint(folder, 9))


@pytest.mark.parametrize("how", ["another key", "no key", "no callbacks"])
def test_p21_a_checkpoint_that_lost_our_state_is_an_error_and_no_empty_window(how, tmp_path, caplog):
    fit(tmp_path, max_steps=9)
    content = torch.load(checkpoint(tmp_path, 9), weights_only=True)
    ours = content["callbacks"].pop("ModelMerging[merge]")
    if how == "another key":
        content["callbacks"]["ModelMergi\x0eg[merge]"] = ours
    if how == "no callbacks":
        del content["callbacks"]
    torch.save(content, checkpoint(tmp_path, 9))
    with pytest.raises(CheckpointError, match=r"damaged.*on_missing='refill'"):
        fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9))
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9), on_missing="refill")
    assert any("the window starts empty" in message for message in caplog.messages)


def test_p21_another_name_is_an_error_and_a_further_instance_is_none(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"`name` was changed.*Set the name back"):
        fit(folder, ckpt_path=checkpoint(folder, 9), name="other")
    further = ModelMerging(**OPTIONS, name="further")
    merging = ModelMerging(**OPTIONS)
    trainer(folder, merging, Events(merging), further).fit(ByStep(), rows(64), rows(4), ckpt_path=checkpoint(folder, 9))
    assert lines(folder) == lines(whole)
    assert lines(folder / "further")[0]["step"] == 12


def test_a_run_without_the_callback_can_be_gone_on_with(tmp_path, caplog):
    plain_trainer(tmp_path, saving(tmp_path), max_steps=9, enable_checkpointing=True).fit(ByStep(), rows(64), rows(4))
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9))
    assert any("without counters of 'merge'" in message for message in caplog.messages)
    assert lines(tmp_path)[0]["step"] == 12


# --- retention ---


def test_a_state_asked_for_outside_a_save_pins_no_files(tmp_path):
    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                merging.state_dict()

    merging = ModelMerging(**OPTIONS)
    own = saving(tmp_path, save_top_k=1, monitor="step", mode="max")
    trainer(tmp_path, merging, Asks(), own, max_steps=15).fit(ByStep(), rows(64), rows(4))
    assert {int(name.split("-")[1]) for name in files(tmp_path) if "-" in name} == {10, 12, 14}


@pytest.mark.parametrize("store", ["device", "disk"])
def test_a_snapshot_is_written_once_and_has_its_name_once_it_is_on_the_disk(store, tmp_path, monkeypatch):
    synced, named, replace, sync = set(), [], Path.replace, os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        if target.name.startswith("snapshot-"):
            named.append(target.name)
            assert path.stat().st_ino in synced
            assert path.name.endswith(".tmp")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    fit(tmp_path, store=store, max_steps=9)  # three checkpoints, which share snapshots
    assert [int(name.split("-")[1]) for name in named] == [2, 4, 6, 8]


def test_an_open_block_is_written_once_per_step(tmp_path, monkeypatch):
    written = []
    save = saved_block.save
    monkeypatch.setattr(saved_block, "save", lambda *given: written.append(given[2]) or save(*given))
    fit(tmp_path, average="block", saving=saving(tmp_path, save_last=True), max_steps=9)
    assert written == [3, 6, 9]


def needed(folder: Path, path: Path) -> set[str]:
    state = torch.load(path, weights_only=True)["callbacks"]["ModelMerging[merge]"]["values"]["window"]["values"]
    return {held["file"]["name"] for held in state["snapshots"]}


def test_what_retained_checkpoints_need_is_kept_and_nothing_else(tmp_path):
    fit(tmp_path, saving=saving(tmp_path, save_top_k=2, monitor="step", mode="max"), max_steps=15)
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(kept) == 2
    expected = set().union(*(needed(tmp_path, path) for path in kept))
    assert set(files(tmp_path)) - {"checkpoints.json"} == expected


def test_a_run_that_was_moved_keeps_what_all_its_checkpoints_need(whole, tmp_path):
    fit(tmp_path / "before")
    folder = (tmp_path / "before").rename(tmp_path / "after")
    for step in (12, 9, 6):
        fit(folder, ckpt_path=checkpoint(folder, step))
        assert lines(folder) == lines(whole)


def test_a_checkpoint_under_another_name_keeps_its_snapshots_once_it_was_resumed_from(whole, tmp_path):
    folder, rarely = tmp_path / "run", {"every_n_train_steps": 6}
    fit(folder, saving=saving(folder, **rarely))
    renamed = checkpoint(folder, 6).rename(tmp_path / "elsewhere.ckpt")
    for _ in range(2):
        fit(folder, ckpt_path=renamed, saving=saving(folder, **rarely))
        assert lines(folder) == lines(whole)
    renamed.unlink()
    fit(folder, ckpt_path=checkpoint(folder, 12), saving=saving(folder, **rarely))
    assert not [name for name in files(folder) if name.startswith("snapshot-00000002")]


def test_a_checkpoint_deleted_by_hand_takes_its_snapshots_with_it_at_the_next_start(tmp_path):
    fit(tmp_path, max_steps=12)
    before = set(files(tmp_path))
    for step in (3, 6):
        checkpoint(tmp_path, step).unlink()
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 12), max_steps=13)
    gone = before - set(files(tmp_path))
    assert {int(name.split("-")[1]) for name in gone} == {2}


def there(path: str) -> str | None:
    return str(os.stat(path)) if Path(path).exists() else None


def test_an_overwritten_checkpoint_keeps_its_snapshots_until_the_new_one_is_there(tmp_path):
    own = WindowFolder(tmp_path / "window")
    (own.folder / "snapshot-00000001-00000000.safetensors").touch()
    last = tmp_path / "last.ckpt"
    own.register(str(last), ["snapshot-00000001-00000000.safetensors"])
    last.touch()
    own.prune([], there)
    own.close()
    again = WindowFolder(tmp_path / "window")  # killed while the second one was being written
    (again.folder / "snapshot-00000002-00000000.safetensors").touch()
    again.register(str(last), ["snapshot-00000002-00000000.safetensors"], there(str(last)))
    again.close()
    third = WindowFolder(tmp_path / "window")
    third.prune([], there)
    assert len(list(third.folder.glob("*.safetensors"))) == 2
    third.close()


def test_a_checkpoint_that_is_written_in_the_background_leaves_the_older_one_its_snapshots_until_then(tmp_path):
    may_write, last, missing = threading.Event(), tmp_path / "last.ckpt", []

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
            assert may_write.wait(30)
            super().save_checkpoint(*arguments, **options)

    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                may_write.set()
                trainer.save_checkpoint(last)
                while not last.exists():
                    time.sleep(0.01)
                may_write.clear()
            if trainer.global_step == 12:  # killed now, the run would go on from step 6
                trainer.save_checkpoint(last)
                trainer.save_checkpoint(tmp_path / "another.ckpt")
                missing.extend(needed(tmp_path, last) - set(files(tmp_path)))
                may_write.set()

    merging = ModelMerging(**OPTIONS)
    own = trainer(tmp_path, merging, max_steps=13, plugins=[AsyncCheckpointIO(Slow())])
    own.callbacks.insert(own.callbacks.index(merging) + 1, Asks())
    own.fit(ByStep(), rows(64), rows(4))
    assert missing == []
    assert torch.load(last, weights_only=True)["global_step"] == 12
    fit(tmp_path, ckpt_path=last)
    assert not [name for name in files(tmp_path) if name.startswith("snapshot-00000006")]


def test_a_damaged_list_of_needs_keeps_everything_and_says_so(tmp_path, caplog):
    fit(tmp_path, max_steps=6)
    (tmp_path / "window" / "checkpoints.json").write_text("{")
    before = set(files(tmp_path))
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 6), max_steps=15)
    assert before <= set(files(tmp_path))
    assert any("is damaged" in message for message in caplog.messages)


# --- one run in one folder ---


def test_a_second_run_in_the_folder_is_refused_and_the_holder_is_named(tmp_path):
    code = "import sys, time; from pathlib import Path; from pretrain_merge.resume.sidecar import WindowFolder\n"
    code += "own = WindowFolder(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(tmp_path / "window")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(CheckpointError, match=rf"in use by process {holder.pid} on .* since "):
                fit(tmp_path)
        finally:
            holder.kill()
    fit(tmp_path, max_steps=4)  # a killed run holds nothing
    assert "lock" not in files(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(CheckpointError, match="Set window_folder to a folder that can be written"):
        fit(tmp_path, window_folder=str(tmp_path / "blocked" / "window"))


def test_a_read_only_folder_is_an_error_with_a_remedy():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "window"
        folder.mkdir(mode=0o555)
        user = os.geteuid()
        if user == 0:  # permissions do not bind root
            Path(name).chmod(0o755)
            os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError, match=r"cannot write to .*Permission denied.*Set window_folder"):
                WindowFolder(folder)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain_merge.callbacks.run_folder.RunFolder.keep_config", lambda *_: None)
    monkeypatch.setattr("pretrain_merge.files.snapshot_file.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free space there, or set window_folder"):
        fit(tmp_path, store="device")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "merges" not in path.name] == []


# --- merged models ---


def test_a_merged_model_that_reads_back_differently_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain_merge.merged_models.whole_weights.same_bits", lambda *_: False)
    with pytest.raises(CheckpointError, match="what was read back is not what was written"):
        merged.save_merged(Regression(), tmp_path / "step-1-sma", {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_was_writing_is_gone_when_it_is_resumed(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    half = folder / "merged" / ".step-00000012-sma.12345.tmp"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    fit(folder, ckpt_path=checkpoint(folder, 6))
    assert not half.exists()


def test_every_merge_of_a_resumed_run_is_recorded_once(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    fit(folder, ckpt_path=checkpoint(folder, 6))
    steps = [record.step for record in read_records(folder / "merges.jsonl")]
    assert steps == sorted(set(steps))
