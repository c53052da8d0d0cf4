"""A run that is resumed from any of its checkpoints is the uninterrupted run."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks.resumed_runs import (
    MARKS,
    OPTIONS,
    STEPS,
    ByStep,
    Events,
    checkpoint,
    copied,
    fit,
    lines,
    saving,
    trainer,
)
from harness.models import TwoOptimizers, rows, same_bits, weights
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from pretrain_merge import ModelMerging
from pretrain_merge.records import read_records

pytestmark = MARKS


class Breaks(ByStep):
    """Fails after so many steps."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == self.at:
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


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


def test_records_that_an_earlier_checkpoint_cut_are_said_to_be_missing(tmp_path, caplog):
    fit(tmp_path, max_steps=12)
    fit(tmp_path, max_steps=5, ckpt_path=checkpoint(tmp_path, 3))
    caplog.clear()
    fit(tmp_path, max_steps=13, ckpt_path=checkpoint(tmp_path, 12))
    assert any("lacks merges up to step 12" in message for message in caplog.messages)


def test_every_merge_of_a_resumed_run_is_recorded_once(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    fit(folder, ckpt_path=checkpoint(folder, 6))
    steps = [record.step for record in read_records(folder / "merges.jsonl")]
    assert steps == sorted(set(steps))
