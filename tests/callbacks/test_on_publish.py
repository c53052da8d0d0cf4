"""What is done with each saved model beside training: once, without anybody waiting, and its numbers come home."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from harness.models import LIGHTNING_REMARKS, MemoryLogger, Regression, rows, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pretrain_merge import ModelMerging
from pretrain_merge.errors import ConfigError
from pretrain_merge.merged_models.choosing import chosen
from pretrain_merge.records import read_records

pytestmark = LIGHTNING_REMARKS


def fit(folder: Path, *callbacks: Any, max_steps: int = 8, ckpt_path: Any = None, **options: Any) -> Any:
    merging = ModelMerging(**({"window": 2, "every": 2, "forecast": None, "save": {"every": 2, "keep": 9}} | options))
    own = trainer(folder, merging, *callbacks, max_steps=max_steps, logger=MemoryLogger(folder))
    own.fit(Regression(dropout=0.0), rows(), rows(4, seed=1), ckpt_path=ckpt_path)
    return own


def measured(folder: Path, step: int) -> dict[str, float]:
    """In place of an evaluation of the folder."""
    assert (folder / "model.safetensors").exists()
    return {"acc": step / 10, "tasks": {"easy": 1.0}}


def test_numbers_are_recorded_and_logged_at_the_step_of_the_merge(tmp_path):
    own = fit(tmp_path, on_publish=measured)
    records = read_records(tmp_path / "merges.jsonl")
    assert [record.views["sma"]["published/acc"] for record in records] == [0.4, 0.6, 0.8]
    assert all("val_loss" in record.views["sma"] for record in records)
    logged = {step: line for step, line in own.logger.lines if "merge/sma/published/acc" in line}
    assert logged == {
        step: {"merge/step": step, "merge/sma/published/acc": step / 10, "merge/sma/published/tasks/easy": 1.0}
        for step in (4, 6, 8)
    }


def test_a_command_is_run_in_place_of_a_function(tmp_path):
    fit(tmp_path, on_publish="printf '{\"step\": %s}' {step}", save={"best": "val_loss"})
    (best,) = (tmp_path / "merged").glob("step-*")
    assert json.loads((best / "on_publish.json").read_text())["numbers"] == {"step": float(best.name[5:13])}


def test_training_waits_for_nobody_and_a_folder_stays_while_it_is_used(tmp_path):
    may_end, seen = threading.Event(), []

    class EndsAtTheLastStep(Regression):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 8:
                seen.append(sorted(path.name for path in (tmp_path / "merged").glob("step-*")))
                may_end.set()

    def slow(folder: Path, step: int) -> dict[str, float]:
        assert may_end.wait(20)
        return {"is_there": float((folder / "model.safetensors").exists())}

    merging = ModelMerging(window=2, every=2, forecast=None, save={"every": 2, "keep": 1}, on_publish=slow)
    trainer(tmp_path, merging, max_steps=8).fit(EndsAtTheLastStep(), rows(), rows(4, seed=1))
    assert seen == [["step-00000004-sma", "step-00000006-sma"]]  # of which only the newer one is to be kept
    assert [record.views["sma"]["published/is_there"] for record in read_records(tmp_path / "merges.jsonl")] == [
        1.0
    ] * 3
    assert [path.name for path in (tmp_path / "merged").glob("step-*")] == ["step-00000008-sma"]


def test_what_fails_is_said_once_and_ends_nothing(tmp_path, caplog):
    def broken(folder: Path, step: int) -> None:
        raise ValueError("no such task")

    own = fit(tmp_path, on_publish=broken)
    assert own.global_step == 8
    assert len([message for message in caplog.messages if "no such task" in message]) == 1
    notes = [json.loads(path.read_text())["failure"] for path in (tmp_path / "merged").glob("*/on_publish.json")]
    assert notes == ["ValueError: no such task"] * 3


def test_a_run_that_goes_on_hands_over_what_was_left_and_nothing_twice(tmp_path):
    handed: list[int] = []

    def note(folder: Path, step: int) -> dict[str, float]:
        handed.append(step)
        return {"acc": step / 10}

    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=6, save_top_k=-1, filename="{step}")
    fit(tmp_path, saving, on_publish=note)
    assert handed == [4, 6, 8]
    (tmp_path / "merged" / "step-00000004-sma" / "on_publish.json").unlink()  # as if killed while it was under way
    handed.clear()
    own = fit(tmp_path, on_publish=note, ckpt_path=tmp_path / "kept" / "step=6.ckpt", max_steps=10)
    assert handed == [4, 10]
    values = [record.views["sma"]["published/acc"] for record in read_records(tmp_path / "merges.jsonl")]
    assert values == [0.4, 0.6, 0.8, 1.0]
    assert {step for step, line in own.logger.lines if "merge/sma/published/acc" in line} == {4, 8, 10}


def test_the_end_of_a_run_waits_as_long_as_one_errand_may_take(tmp_path, caplog):
    begun, never = threading.Event(), threading.Event()

    def hangs(folder: Path, step: int) -> None:
        begun.set()
        never.wait(20)

    fit(tmp_path, on_publish=hangs, on_publish_timeout=0.2, save={"at_end": True})
    assert begun.is_set()
    assert any("it took more than 0.2 seconds" in text or "did not come to its end" in text for text in caplog.messages)


def test_a_raw_model_is_published_beside_the_merges_and_is_none_of_them(tmp_path):
    fit(tmp_path, on_publish=measured, save={"every": 4, "keep": 9, "best": "val_loss", "raw": True, "at_end": True})
    names = {path.name for path in (tmp_path / "merged").glob("step-*")}
    assert {"step-00000004-raw", "step-00000008-raw"} <= names
    assert chosen(tmp_path, "last").name == "step-00000008-sma"
    assert not json.loads((tmp_path / "merged" / "best.json").read_text())["folder"].endswith("raw")
    assert read_records(tmp_path / "merges.jsonl")[0].raw["published/acc"] == 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_publish": measured, "save": {}}, "no merged model will be saved"),
        ({"on_publish": 3}, "3 is neither a command nor a function|on_publish: "),
        ({"on_publish": "evaluate {foldr}"}, "did you mean {folder}"),
        ({"on_publish": measured, "on_publish_timeout": 0}, r"on_publish_timeout: 0\.0 is out of range"),
        ({"save": {"best": "val_loss", "raw": True}}, r"save\.raw"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelMerging(**({"save": {"every": 2}} | options))


def test_a_program_that_is_missing_is_refused_in_a_rehearsal_too(tmp_path):
    for options in ({}, {"fast_dev_run": True}):
        merging = ModelMerging(save={"every": 2}, on_publish="no-such-program {folder}")
        with pytest.raises(ConfigError, match="is not a program"):
            trainer(tmp_path, merging, **options).fit(Regression(), rows(), rows(4, seed=1))
