"""The callback in real Trainers: what it measures, and that raw weights are back whatever happens."""

import json
import logging
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
from harness.models import (
    LIGHTNING_REMARKS,
    MemoryLogger,
    Recorder,
    Regression,
    TiedModel,
    Witness,
    documents,
    regression_of,
    rows,
    same_bits,
    trainer,
    weights,
)
from harness.oracles import Array
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

import pretrain_merge.callbacks.merge_point
import pretrain_merge.callbacks.run
import pretrain_merge.evaluation.evaluate
import pretrain_merge.evaluation.isolation
import pretrain_merge.merging.rolling_merger
import pretrain_merge.runtime.signals
import pretrain_merge.window.observed
from pretrain_merge import ModelMerging
from pretrain_merge.callbacks.run import Run
from pretrain_merge.errors import ConfigError, EvaluationError, UnsupportedModelError
from pretrain_merge.evaluation import isolation
from pretrain_merge.records import read_records

pytestmark = LIGHTNING_REMARKS


def records(folder: Path) -> list[Any]:
    path = folder / "merges.jsonl"
    return read_records(path) if path.exists() else []


class Seen:
    """An evaluator that keeps the weights it was shown."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def __call__(self, module: nn.Module) -> dict[str, float]:
        self.weights.append({name: value.detach().clone() for name, value in module.named_parameters()})
        return {"number": float(len(self.weights))}


def mean_in_float64(snapshots: list[dict[str, Tensor]], coefficients: Any) -> dict[str, Array]:
    return {
        name: sum(c * snapshot[name].double().numpy() for c, snapshot in zip(coefficients, snapshots, strict=True))
        for name in snapshots[0]
    }


def _absolute(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.abs() for name, value in tensors.items()}


# --- what is measured ---


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


# --- raw is back ---


class _Breaks(Regression):
    """Raises in the validation of the merged model, after its first batch."""

    error: Any = RuntimeError("validation broke")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 1 and not same_bits(weights(self), self.trainer.raw):
            raise self.error


class _RawAfterStep(pl.Callback):
    """Put before the merging callback: raw weights as training left them."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        trainer.raw = weights(pl_module)


def interrupted(folder: Path, module: Any, *callbacks: Any, error: Any, **options: Any) -> Any:
    merging = ModelMerging(**({"window": 2, "every": 2, "views": ["sma", "wma"]} | options))
    saving = ModelCheckpoint(folder / "kept", filename="at-exception", save_on_exception=True, save_top_k=0)
    own = trainer(folder, _RawAfterStep(), merging, saving, *callbacks, max_steps=8)
    with pytest.raises(error):
        own.fit(module, rows(), rows(10, seed=1))
    assert own.global_step == 4
    return own


def raw_everywhere(own: Any, module: Any, folder: Path) -> bool:
    checkpoint = torch.load(folder / "kept" / "at-exception.ckpt", weights_only=True)
    return same_bits(weights(module), own.raw) and same_bits(dict(checkpoint["state_dict"]), own.raw)


def test_raw_is_back_and_saved_after_an_exception_in_validation(tmp_path):
    module = _Breaks()
    own = interrupted(tmp_path, module, error=RuntimeError)
    assert raw_everywhere(own, module, tmp_path)


def test_raw_is_back_and_saved_after_an_exception_in_an_evaluator(tmp_path):
    module, calls = Regression(), []

    def breaks(module: Any) -> dict[str, float]:
        calls.append(weights(module))
        return {"a": 1 / (3 - len(calls))}

    own = interrupted(tmp_path, module, error=ZeroDivisionError, evaluators={"breaks": breaks})
    assert not same_bits(calls[-1], own.raw)
    assert raw_everywhere(own, module, tmp_path)


@pytest.mark.parametrize("average", ["last", "block"])
def test_raw_is_back_after_an_evaluator_that_writes_into_the_weights(average, tmp_path):
    @torch.no_grad()
    def rounds(module: Any) -> dict[str, float]:
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
        return {"a": 1.0}

    module, raw = Regression(), _RawAfterStep()
    own = trainer(
        tmp_path, raw, ModelMerging(window=2, every=2, average=average, evaluators={"rounds": rounds}), max_steps=4
    )
    own.fit(module, rows(), rows(4, seed=1))
    assert len(records(tmp_path)) == 1
    assert same_bits(weights(module), own.raw)


def test_raw_is_back_and_saved_after_a_keyboard_interrupt(tmp_path):
    module = _Breaks()
    module.error = KeyboardInterrupt
    own = interrupted(tmp_path, module, error=SystemExit)
    assert raw_everywhere(own, module, tmp_path)


def test_raw_is_back_and_saved_where_the_batches_change(tmp_path):
    class Moving(torch.utils.data.Dataset):
        reads = Witness()  # which an evaluation does not take back
        reads.append(0)

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            self.reads[0] += 1
            return torch.full((4,), float(self.reads[0])), torch.zeros(1)

    module = Regression()
    merging = ModelMerging(window=2, every=2)
    own = trainer(tmp_path, _RawAfterStep(), merging, max_steps=8)
    with pytest.raises(EvaluationError):
        own.fit(module, rows(), torch.utils.data.DataLoader(Moving(), 4))
    assert same_bits(weights(module), own.raw)


def test_a_block_mean_gives_raw_back_too(tmp_path):
    module = _Breaks()
    own = interrupted(tmp_path, module, error=RuntimeError, average="block")
    assert raw_everywhere(own, module, tmp_path)


_OURS = {
    str(Path(module.__file__))
    for module in (
        pretrain_merge.callbacks.merge_point,
        pretrain_merge.callbacks.run,
        pretrain_merge.evaluation.evaluate,
        pretrain_merge.evaluation.isolation,
        pretrain_merge.window.observed,
        pretrain_merge.merging.rolling_merger,
        pretrain_merge.runtime.signals,
    )
}


def _with_signal(folder: Path, signum: int, at: tuple[str, int] | None) -> dict[str, Any]:
    """A run with a signal at the first visit of a line at a merge point: lines visited, and what it left behind."""
    module, visited, raised = Regression(), {}, False
    merging = ModelMerging(window=2, every=2, views=["sma", "wma"])
    saving = ModelCheckpoint(folder / "kept", filename="at-exception", save_on_exception=True, save_top_k=0)
    own = trainer(folder, _RawAfterStep(), merging, saving, max_steps=4, logger=MemoryLogger(folder))
    callbacks, loggers = list(own.callbacks), list(own.loggers)
    measure, before = Run._measure, sys.gettrace()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored

    def trace(frame: Any, event: str, _: Any) -> Any:
        line = (frame.f_code.co_filename, frame.f_lineno)
        if line[0] not in _OURS:
            return None
        if event == "line" and line not in visited:
            visited[line] = True
            if line == at:
                signal.raise_signal(signum)
        return trace

    def traced(*arguments: Any) -> Any:
        sys.settrace(trace)
        try:
            return measure(*arguments)
        finally:
            sys.settrace(before)

    try:
        with isolation.replaced(Run, _measure=traced):
            own.fit(module, rows(8), rows(4, seed=1))
    except SystemExit:
        raised = True
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it after Ctrl-C
    return {
        "lines": list(visited),
        "interrupted": raised and own.global_step == 4,
        "raw": raw_everywhere(own, module, folder) if raised else same_bits(weights(module), own.raw),
        "whole": own.callbacks == callbacks and own.loggers == loggers,
    }


@pytest.mark.parametrize(("name", "first"), [("SIGINT", 0), ("SIGTERM", 16)])  # by turns: a run takes a second
def test_p08_raw_is_back_and_saved_after_a_signal_at_any_line_of_ours(name, first, tmp_path):
    signum = getattr(signal, name)
    lines = _with_signal(tmp_path / "none", signum, None)["lines"]
    assert len(lines) > 100
    for line in lines[first::32]:
        found = _with_signal(tmp_path / f"{Path(line[0]).stem}-{line[1]}", signum, line)
        assert found["interrupted"] or line not in found["lines"], f"no {name} at {line}"
        assert found["raw"], f"merged weights were left in the model or a checkpoint by {name} at {line}"
        assert found["whole"], f"stand-ins were left in the Trainer by {name} at {line}"


# --- runs of every kind ---


def test_two_callbacks_have_their_own_names_windows_and_folders(tmp_path):
    first = ModelMerging(window=2, every=2)
    second = ModelMerging(window=3, every=3, views=["wma"], name="long", save={"at_end": True})
    own = trainer(tmp_path, first, second, max_steps=6)
    own.fit(Regression(), rows(), rows(4, seed=1))
    assert {"merge/sma/val_loss", "long/wma/val_loss", "merge/step", "long/step"} <= own.callback_metrics.keys()
    assert "merge/wma/val_loss" not in own.callback_metrics
    assert [record.step for record in records(tmp_path)] == [4, 6]
    assert [(record.name, record.step) for record in records(tmp_path / "long")] == [("long", 6)]
    assert (tmp_path / "long" / "merged" / "step-00000006-wma").is_dir()


def test_two_callbacks_of_one_name_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"`ModelMerging`.*`callback.state_key` must be unique"):
        trainer(tmp_path, ModelMerging(), ModelMerging(window=3))


def test_p24_one_callback_serves_a_second_trainer_and_model(tmp_path):
    merging = ModelMerging(window=2, every=2)
    for name, steps in (("first", 7), ("second", 5)):
        trainer(tmp_path / name, merging, max_steps=steps).fit(TiedModel(), documents(), documents(4, seed=1))
    assert [record.step for record in records(tmp_path / "first")] == [4, 6]
    assert [(record.step, record.tokens) for record in records(tmp_path / "second")] == [(4, 96)]


def test_p24_a_second_fit_of_one_trainer_goes_on_counting(tmp_path):
    merging, module = ModelMerging(window=3, every=2), TiedModel()
    own = trainer(tmp_path, merging, max_steps=5)
    own.fit(module, documents(), documents(4, seed=1))
    own.fit_loop.epoch_loop.max_steps = 11
    own.fit(module, documents(), documents(4, seed=1))
    assert [(record.step, record.recipes["sma"].steps, record.tokens) for record in records(tmp_path)] == [
        (4, (2, 4), 96),
        (8, (6, 8), 192),  # without checkpoints the window is not kept: it starts empty and refills
        (10, (6, 8, 10), 240),
    ]


def test_p24_a_second_fit_of_one_trainer_that_keeps_checkpoints_goes_on_with_its_window(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4)
    merging, module = ModelMerging(window=3, every=2), TiedModel()
    own = trainer(tmp_path, merging, saving, max_steps=5)
    own.fit(module, documents(), documents(4, seed=1))
    own.fit_loop.epoch_loop.max_steps = 7
    own.fit(module, documents(), documents(4, seed=1))
    assert merging.last_record.recipes["sma"].steps == (2, 4, 6)


def test_records_of_an_earlier_run_are_moved_aside(tmp_path):
    for _ in range(2):
        trainer(tmp_path, ModelMerging(window=2, every=2), max_steps=4).fit(Regression(), rows(), rows(4, seed=1))
    assert [record.step for record in records(tmp_path)] == [4]
    assert [record.step for record in read_records(tmp_path / "merges.1.jsonl")] == [4]


def test_records_are_in_the_loggers_folder_where_there_is_one(tmp_path):
    logger = CSVLogger(tmp_path / "logs", name="run", version=3)
    own = trainer(tmp_path, ModelMerging(window=2, every=2), max_steps=4, logger=logger)
    own.fit(Regression(), rows(), rows(4, seed=1))
    assert len(records(Path(logger.log_dir))) == 1
    assert not (tmp_path / "merges.jsonl").exists()


def test_a_fast_dev_run_measures_once_and_writes_nothing(tmp_path):
    seen = Seen()
    merging = ModelMerging(
        window=3,
        every=1000,
        views=["sma3", "wma"],
        evaluators={"seen": seen},
        save={"best": "val_loss", "at_end": True},
    )
    module, raw = Regression(), _RawAfterStep()
    own = trainer(tmp_path, raw, merging, fast_dev_run=3)
    own.fit(module, rows(), rows(10, seed=1))
    assert len(seen.weights) == 4  # raw, two views and the mean of a forecast, at the first step only
    for name, value in seen.weights[0].items():  # the window was filled with this one model
        torch.testing.assert_close(seen.weights[1][name], value, rtol=2**-22, atol=0.0)
    assert sorted(merging.last_record.shown) == ["sma3", "wma"]
    assert "merge/sma3/val_loss" in own.callback_metrics
    assert same_bits(weights(module), own.raw)
    assert list(tmp_path.rglob("*.jsonl")) == list(tmp_path.rglob("merged*")) == []


def test_a_fast_dev_run_shows_that_save_best_names_no_metric(tmp_path):
    merging = ModelMerging(window=2, every=1000, save={"best": "val_los"})
    with pytest.raises(ConfigError, match=r"save\.best: 'val_los' was not measured\. Measured: val_loss"):
        trainer(tmp_path, merging, fast_dev_run=True).fit(Regression(), rows(), rows(10, seed=1))


def test_a_fast_dev_run_after_a_real_run_writes_nothing_either(tmp_path):
    merging = ModelMerging(window=2, every=2, save={"every": 2})
    trainer(tmp_path, merging, max_steps=4).fit(Regression(), rows(), rows(4, seed=1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer(tmp_path, merging, fast_dev_run=2).fit(Regression(), rows(), rows(4, seed=1))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_verbs_of_the_trainer_do_nothing_of_ours(verb, tmp_path):
    class Module(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    own = trainer(tmp_path, ModelMerging(window=2, every=1, save={"at_end": True}), max_steps=2)
    getattr(own, verb)(Module(), rows(4, seed=1))
    assert not any(key.startswith("merge/") for key in own.callback_metrics)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_p24_after_a_fit_other_verbs_see_the_raw_model(verb, tmp_path):
    class Module(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

    module, merging = Module(), ModelMerging(window=2, every=2)
    own = trainer(tmp_path, merging, max_steps=4)
    own.fit(module, rows(), rows(10, seed=1))
    (values,) = getattr(own, verb)(module, rows(10, seed=1), verbose=False)
    assert values == {"loss": merging.last_record.raw["loss"]}
    assert values != {"loss": merging.last_record.views["sma"]["loss"]}


def test_the_learning_rate_finder_leaves_no_snapshot(tmp_path):
    merging, module = ModelMerging(window=3, every=2), Regression()
    own = trainer(tmp_path, merging, max_steps=6, logger=MemoryLogger(tmp_path))
    found = Tuner(own).lr_find(module, rows(), rows(4, seed=1), num_training=10)
    assert len(found.results["lr"]) > 5
    assert merging.last_record is None
    assert not (tmp_path / "merges.jsonl").exists()
    own.fit(module, rows(), rows(4, seed=1))
    assert [(record.step, record.recipes["sma"].steps) for record in records(tmp_path)] == [(4, (2, 4)), (6, (2, 4, 6))]


def test_scaling_the_batch_size_leaves_no_snapshot(tmp_path):
    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return rows(batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return rows(4, seed=1)

    merging, module, data = ModelMerging(window=3, every=2), Regression(), Data()
    own = trainer(tmp_path, merging, max_steps=4)
    Tuner(own).scale_batch_size(module, datamodule=data, max_trials=1, init_val=4, steps_per_trial=2)
    assert merging.last_record is None
    assert not (tmp_path / "merges.jsonl").exists()
    own.fit(module, datamodule=data)
    assert [(record.step, record.recipes["sma"].steps) for record in records(tmp_path)] == [(4, (2, 4))]


def test_p07_the_sanity_check_measures_nothing(tmp_path):
    seen = Seen()
    merging = ModelMerging(window=2, every=1, evaluators={"seen": seen})
    own = trainer(tmp_path, merging, max_steps=1, num_sanity_val_steps=2)
    own.fit(Regression(), rows(), rows(10, seed=1))
    assert seen.weights == []
    assert not any(key.startswith("merge/") for key in own.callback_metrics)


# --- resume ---


@pytest.mark.parametrize("saved_at", [1, 3, 5])
@pytest.mark.parametrize("every", ["2 steps", "48 tokens"])
def test_a_resumed_run_counts_on_as_if_it_had_not_stopped(saved_at, every, tmp_path):
    def fit(folder: Path, steps: int, **options: Any) -> Any:
        saving = ModelCheckpoint(folder / "kept", every_n_train_steps=saved_at, save_top_k=-1, filename="{step}")
        own = trainer(folder, ModelMerging(window=2, every=every), saving, max_steps=steps)
        own.fit(TiedModel(), documents(64), documents(4, seed=1), **options)
        return {record.step: (record.samples, record.tokens) for record in records(folder)}

    whole = fit(tmp_path / "whole", 10)
    fit(tmp_path / "parts", saved_at)
    resumed = fit(tmp_path / "parts", 10, ckpt_path=tmp_path / "parts" / "kept" / f"step={saved_at}.ckpt")
    assert len(resumed) >= 2
    assert resumed == {step: whole[step] for step in resumed}
    assert max(resumed) == max(whole)


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    for options in ({}, {"ckpt_path": tmp_path / "kept" / "step=5.ckpt"}):
        own = trainer(tmp_path, ModelMerging(window=2, every=2), saving, max_steps=10)
        own.fit(Regression(), rows(), rows(4, seed=1), **options)
    assert [record.step for record in records(tmp_path)] == [4, 6, 8, 10]


@pytest.mark.parametrize("saved_at", [4, 6])
def test_a_checkpoint_of_a_run_without_the_callback_gives_its_step(saved_at, tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=saved_at, save_top_k=-1, filename="{step}")
    trainer(tmp_path, saving, max_steps=saved_at).fit(Regression(), rows())
    own = trainer(tmp_path, ModelMerging(window=2, every=2), max_steps=10)
    own.fit(Regression(), rows(), rows(4, seed=1), ckpt_path=tmp_path / "kept" / f"step={saved_at}.ckpt")
    assert [record.step for record in records(tmp_path)] == list(range(saved_at + 4, 11, 2))
    assert any("without counters" in message for message in caplog.messages)


def test_p11_the_state_in_a_checkpoint_is_small_and_plain(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, filename="{step}")
    trainer(tmp_path, ModelMerging(window=2, every=2, save={"every": 2}), saving, max_steps=5).fit(
        TiedModel(), documents(), documents(4, seed=1)
    )
    checkpoint = torch.load(tmp_path / "kept" / "step=5.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["ModelMerging[merge]"]
    assert state["values"]["progress"]["step"] == 5
    assert len(json.dumps(state)) < 4000
    assert not any("merged" in name for name in checkpoint["state_dict"])


# --- refusals ---


@pytest.mark.parametrize(
    ("strategy", "way_out"),
    [(FSDPStrategy, r"also with use_orig_params=True; use FSDP2"), (DeepSpeedStrategy, r"every ZeRO stage; use DDP")],
)
@pytest.mark.parametrize("is_users_own", [False, True])
def test_p19_a_strategy_whose_parameters_are_not_plain_is_refused_at_setup(strategy, way_out, is_users_own, tmp_path):
    own = trainer(tmp_path, ModelMerging())
    kind = type(strategy.__name__, (type(own.strategy),), {})
    own.strategy.__class__ = type("Own", (kind,), {}) if is_users_own else kind
    with pytest.raises(UnsupportedModelError, match=f"{strategy.__name__} is not supported.*{way_out}"):
        own.fit(Regression(), rows())
    assert own.global_step == 0


def test_batch_norm_is_refused_before_the_first_step(tmp_path):
    class Module(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

    own = trainer(tmp_path, ModelMerging(), max_steps=2)
    with pytest.raises(UnsupportedModelError, match="batch_norm='live'"):
        own.fit(Module(), rows())
    assert own.global_step == 0


def test_without_anything_to_measure_a_notice_says_so(tmp_path, caplog):
    trainer(tmp_path, ModelMerging(window=2, every=1), max_steps=4).fit(Regression(), rows())
    assert [message for message in caplog.messages if "nothing is measured" in message] == [
        "merges are made, but nothing is measured: no validation loader and no evaluator, or a validation_step that "
        "logs nothing."
    ]


def test_the_window_is_freed_after_an_exception(tmp_path):
    module, merging = _Breaks(), ModelMerging(window=2, every=2)
    with pytest.raises(RuntimeError, match="validation broke"):
        trainer(tmp_path, _RawAfterStep(), merging, max_steps=8).fit(module, rows(), rows(10, seed=1))
    assert merging._fits.run is None


def test_misconfiguration_of_lightning_is_lightnings_to_say(tmp_path):
    with pytest.raises(MisconfigurationException, match="No `training_step"):
        trainer(tmp_path, ModelMerging()).fit(pl.LightningModule(), rows())
