"""What a run says of itself: what it will do, and then that it did it."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
from harness.models import LIGHTNING_REMARKS, Regression, regression_of, rows, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from pretrain_merge import ModelMerging
from pretrain_merge.callbacks.announcements import rank_zero_info
from pretrain_merge.records import read_records

pytestmark = LIGHTNING_REMARKS


def said(caplog: Any, name: str = "merge") -> list[str]:
    infos = [record for record in caplog.records if record.levelno == logging.INFO]
    return [record.getMessage() for record in infos if record.getMessage().startswith(f"{name}: ")]


def fit(folder: Path, *callbacks: Any, max_steps: int = 40, library: Any = pl, **options: Any) -> Any:
    merging = ModelMerging(**({"window": 3, "every": 2, "breaks": {"lr": False}} | options))
    own = trainer(folder, merging, *callbacks, library=library, max_steps=max_steps)
    own.fit(regression_of(library)(), rows(), rows(4, seed=1))
    return merging


def test_three_lines_at_the_start_and_three_at_the_end(tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=20, save_last=True)
    merging = fit(tmp_path, saving, save={"best": "val_loss"}, views=["sma", "sma2"])
    keeps, merges, files, made, forecast, best = said(caplog)
    # 37 parameters in float32
    assert keeps == (
        "merge: keeps the last 3 snapshots, one every 2 steps: 148 B each, 444 B per rank in store 'device', by the "
        "memory that is free now."
    )
    assert merges == "merge: merges sma, sma2 from step 4 on: up to 19 merges to come."
    assert files == (
        f"merge: files go to {tmp_path}: snapshots for 2 checkpoints, 888 B at most; merged models, 444 B at most."
    )
    last = merging.last_record
    assert made.startswith(f"merge: 19 merges up to step 40: val_loss raw {last.raw['val_loss']:.5g}, sma ")
    assert forecast.startswith("merge: forecast: ")
    assert best == f"merge: best merged model, by val_loss: {merging.best_model_path}"


@pytest.mark.parametrize(
    "options",
    [
        {"every": 3},
        {"every": 3, "merge_every": 7},
        {"every": 4, "merge_every": 2},
        {"every": 3, "start": 10},
        {"every": "10%", "window": 4},
        {"every": "5%", "merge_every": 8},
        {"every": 30},
    ],
)
def test_merge_points_come_where_they_were_announced(options, tmp_path, caplog):
    fit(tmp_path, **options)
    file = tmp_path / "merges.jsonl"
    steps = [record.step for record in read_records(file)] if file.exists() else []
    (line,) = [text for text in said(caplog) if "from step" in text or "no merge will" in text]
    expected = f"from step {steps[0]} on: up to {len(steps)} merges to come." if steps else "no merge will be made"
    assert expected in line


def test_what_a_resumed_run_has_before_it_is_announced(tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=15, save_top_k=-1, filename="{step}")
    fit(tmp_path, saving, max_steps=20, every=4)
    caplog.clear()
    merging = ModelMerging(window=3, every=4, breaks={"lr": False})
    own = trainer(tmp_path, merging, max_steps=40)
    own.fit(Regression(), rows(), rows(4, seed=1), ckpt_path=tmp_path / "kept" / "step=15.ckpt")
    made = [record.step for record in read_records(tmp_path / "merges.jsonl") if record.step > 15]
    assert f"from step {made[0]} on: up to {len(made)} merges to come." in said(caplog)[1]


def test_a_line_at_each_merge_is_the_users_choice(tmp_path, caplog):
    fit(tmp_path / "quiet", max_steps=8)
    assert len(said(caplog)) == 6
    caplog.clear()
    fit(tmp_path / "verbose", max_steps=8, verbose=True)
    lines = [line for line in said(caplog) if line.startswith("merge: step ")]
    assert [line.split(":")[1] for line in lines] == [" step 4", " step 6", " step 8"]
    assert all("val_loss raw" in line and ", sma " in line for line in lines)


def test_a_run_that_measured_nothing_is_not_asked_which_metric_is_its_loss(tmp_path, caplog):
    fit(tmp_path, max_steps=8, validate=False)
    *_, made, forecast, _ = said(caplog)
    assert made.endswith("nothing was measured.")
    assert forecast == "merge: forecast: none, since nothing was measured."


@pytest.mark.parametrize("library", [pl, pytorch_lightning])
def test_lines_go_where_lightnings_own_notices_go(library, tmp_path, caplog, monkeypatch):
    fit(tmp_path / "first", library=library, max_steps=8)
    channels = {record.name for record in caplog.records if "`Trainer.fit` stopped" in record.getMessage()}
    assert {record.name for record in caplog.records if record.getMessage().startswith("merge: ")} == channels
    caplog.clear()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    rank_zero_info("merge: of another rank")
    assert not said(caplog)
