"""Forecasts in a run: logged beside what they are forecasts of, from the records that the run has written so far."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from harness.models import LIGHTNING_REMARKS, MemoryLogger, rows, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from pretrain_merge import ModelMerging
from pretrain_merge.callbacks.forecasts import RunForecasts
from pretrain_merge.config import parse_settings
from pretrain_merge.forecast import forecast_anneal
from pretrain_merge.records import Expected, MergeRecord, Recipe, read_records
from pretrain_merge.records.read_run import read_run
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce

pytestmark = LIGHTNING_REMARKS
FORECASTS = {
    "ahead": {"steps": 8, "kind": "forecast"},
    "now": {"steps": 16, "kind": "nowcast", "shape": "cosine", "coverage": 0.8},
}
OPTIONS = {"window": 9, "every": 2, "merge_every": 8, "span": None, "forecast": FORECASTS}


class NoisyRegression(pl.LightningModule):
    """A linear problem whose targets are noisy: the loss falls, and SGD at constant rate stays above its floor."""

    def __init__(self, schedule: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.schedule = schedule

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        generator = torch.Generator().manual_seed(self.trainer.global_step)  # P26
        x = torch.randn(8, 4, generator=generator)
        return (self.layer(x) - x.sum(1, keepdim=True) - torch.randn(8, 1, generator=generator)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", (self.layer(x) - y).square().mean() + 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule or (lambda step: 1.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(folder: Path, *callbacks: Any, max_steps: int = 80, schedule: Any = None, **options: Any) -> pl.Trainer:
    fit_options = {key: options.pop(key) for key in list(options) if key in ("logger", "ckpt_path")}
    merging = ModelMerging(**(OPTIONS | options))
    logger = fit_options.pop("logger", False)
    ours = trainer(folder, merging, *callbacks, max_steps=max_steps, logger=logger)
    ours.fit(NoisyRegression(schedule), rows(800), rows(32, seed=1), **fit_options)
    return ours


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with forecasts: its folder, its logger's lines, the metrics at its end."""
    folder = tmp_path_factory.mktemp("run")
    logger = MemoryLogger(folder)
    kept = ModelCheckpoint(folder / "kept", every_n_train_steps=24, save_top_k=-1, filename="{step}")
    ended = fit(folder, kept, logger=logger, save={"every": 24, "keep": 9, "at_end": True})
    return folder, logger.lines, dict(ended.callback_metrics)


def forecast_records(folder: Path) -> list[MergeRecord]:
    return [record for record in read_records(folder / "merges.jsonl") if "ahead" in record.forecasts]


def test_a_forecast_is_logged_with_its_interval_beside_raw_and_merged(run):
    folder, lines, metrics = run
    assert forecast_records(folder)
    for record in forecast_records(folder):
        (line,) = (values for step, values in lines if step == record.step and "merge/raw/val_loss" in values)
        for name in record.forecasts:
            low, mean, high = (line[f"merge/forecast/{name}/val_loss{end}"] for end in ("/low", "", "/high"))
            assert low < mean < high
            ends = record.step + 8 * (name == "ahead")
            assert line[f"merge/forecast/{name}/step"] == record.forecasts[name]["val_loss"].step == ends
    assert set(record.forecasts) == set(FORECASTS)  # once the window is full
    assert float(metrics["merge/forecast/ahead/val_loss/low"]) == record.forecasts["ahead"]["val_loss"].low


def test_a_forecast_in_the_run_is_that_of_its_records_after_the_run(run):
    folder, _, _ = run
    records = read_records(folder / "merges.jsonl")
    for index, record in enumerate(records):
        for name, expected in record.forecasts.items():
            answer = forecast_anneal(records[: index + 1], **FORECASTS[name])
            assert expected == {"val_loss": answer.expected}


def test_spans_that_a_forecast_needs_are_measured_and_not_saved(run):
    folder, _, _ = run
    measured = forecast_records(folder)[-1]
    assert set(measured.views) == {"sma", "forecast/sma2", "forecast/sma3", "forecast/sma5"}
    assert set(measured.shown) == {"sma"}
    assert "merge/forecast/sma5/val_loss" in measured.metrics()
    saved = [path.name.split("-")[2] for path in (folder / "merged").iterdir()]
    assert len(saved) > 2
    assert set(saved) == {"sma"}


def test_a_resumed_run_forecasts_what_the_uninterrupted_one_did(run, tmp_path):
    folder, _, _ = run
    fit(tmp_path, ckpt_path=folder / "kept" / "step=48.ckpt", save={"every": 24, "keep": 9, "at_end": True})
    whole, resumed = (read_records(path / "merges.jsonl") for path in (folder, tmp_path))
    assert [record.forecasts for record in resumed] == [record.forecasts for record in whole]


def test_a_forecast_that_is_refused_says_why_once_and_in_every_record(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="pretrain_merge"):
        fit(tmp_path, schedule=lambda step: 1.0 if step < 68 else 0.5, breaks={"lr": False})
    last = read_records(tmp_path / "merges.jsonl")[-1]
    assert last.forecasts == {}
    assert "learning rate" in last.skipped["forecast/now"]
    said = [message for message in caplog.messages if "forecast 'now'" in message]
    assert len(said) == len({message.partition(":")[0] for message in said})


def test_a_length_in_tokens_is_counted_in_the_steps_that_its_snapshots_took():
    keys = {"window": 5, "every": "100 tokens", "forecast": {"now": {"steps": "200 tokens", "kind": "nowcast"}}}
    settings = parse_settings(keys)
    forecasts = RunForecasts(settings, WarnOnce())
    recipe = Recipe((10, 30, 50, 70, 90), (0.2,) * 5)
    record = MergeRecord("merge", 90, 0, 450, 5, 0.1, {}, {}, {"sma": recipe})
    assert forecasts._steps(settings.forecasts["now"], "val_loss", record) == 40


def test_other_ranks_take_rank_0s_forecasts_and_keep_no_records(monkeypatch):
    expected = {"now": {"val_loss": Expected(1.0, 0.9, 1.1, 90)}}
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "gather", lambda value: [(expected, {"ahead": "too early"}), value])
    forecasts = RunForecasts(parse_settings({"window": 9, "every": 2, "forecast": FORECASTS}), WarnOnce())
    record = MergeRecord("merge", 90, 0, 0, 5, 0.1, {"val_loss": 1.0}, {})
    for _ in range(3):
        told = forecasts.with_forecasts(record)
        assert (told.forecasts, told.skipped) == (expected, {"forecast/ahead": "too early"})
    assert all(history._newest is None for history in forecasts._histories.values())


def test_a_forecast_is_logged_where_its_anneal_ends_too(run):
    folder, lines, _ = run
    for record in forecast_records(folder):
        expected = record.forecasts["ahead"]["val_loss"]
        name = "merge/forecast/ahead/at_end/val_loss"
        assert (
            expected.step,
            {
                "merge/step": expected.step,
                name: expected.mean,
                f"{name}/low": expected.low,
                f"{name}/high": expected.high,
            },
        ) in lines


def test_without_a_key_two_forecasts_are_logged_and_one_more_mean_is_measured(tmp_path):
    fit(tmp_path, forecast="auto", window=9, every=2, merge_every=8, max_steps=96)
    records = read_records(tmp_path / "merges.jsonl")
    assert set(records[-1].views) == {"sma", "forecast/sma5"}
    assert set(records[-1].forecasts) == {"now", "ahead"}
    last = records[-1].forecasts["ahead"]["val_loss"]
    assert last.step - records[-1].step == 16  # what nine snapshots span
    # a window that spans more than the law was measured for answers over the shorter mean
    assert min(item.forecasts["ahead"]["val_loss"].step - item.step for item in records if item.forecasts) == 8
    assert ModelMerging().config.forecast == "auto"


@pytest.mark.parametrize("off", [None, False, "off", {}])
def test_forecasts_are_turned_off(off, tmp_path):
    fit(tmp_path, forecast=off, max_steps=40)
    last = read_records(tmp_path / "merges.jsonl")[-1]
    assert (set(last.views), last.forecasts, last.skipped) == ({"sma"}, {}, {})


class _NoLoss(NoisyRegression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("acc", 1.0)


def test_where_no_loss_is_measured_nobody_is_bothered_and_nothing_more_is_measured(tmp_path, caplog):
    merging = ModelMerging(window=9, every=2, merge_every=8)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, merging, max_steps=40).fit(_NoLoss(), rows(400), rows(32, seed=1))
    records = read_records(tmp_path / "merges.jsonl")
    assert [set(record.views) for record in records[1:]] == [{"sma"}] * (len(records) - 1)
    assert not [
        record for record in caplog.records if record.levelno >= logging.WARNING and "forecast" in record.message
    ]
    assert any("forecast: measured is acc, and a forecast is of a loss" in text for text in caplog.messages)


def test_a_csv_gives_the_means_back_that_a_forecast_reads(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, forecast="auto", logger=logger, max_steps=64)
    records = read_records(Path(logger.log_dir) / "merges.jsonl")
    read = read_run(Path(logger.log_dir) / "metrics.csv", every=2)
    assert [record.step for record in read] == [record.step for record in records]
    assert read[-1].recipes["forecast/sma5"] == records[-1].recipes["forecast/sma5"]
    last = records[-1].forecasts["now"]["val_loss"]
    assert forecast_anneal(read, steps=16, kind="nowcast").mean == pytest.approx(last.mean, rel=1e-6)


def test_the_mean_of_a_forecast_that_nobody_asked_for_spans_half_of_what_the_users_spans(tmp_path):
    fit(tmp_path, forecast="auto", window=20, every=1, merge_every=40, span=0.2, max_steps=160)
    last = read_records(tmp_path / "merges.jsonl")[-1]
    lengths = {view: recipe.steps[-1] - recipe.steps[0] for view, recipe in last.recipes.items()}
    assert lengths == {"sma": 19, "forecast/sma": 16}
    assert last.forecasts["ahead"]["val_loss"].step == 160 + 19
