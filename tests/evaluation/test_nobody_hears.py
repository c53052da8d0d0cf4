"""Nobody else hears of an evaluation: no callback, no bar but for its own line, no process that stays."""

import multiprocessing
from typing import Any

import lightning.pytorch as pl
import pytest
from evaluation.measuring import At, measure_once
from harness.models import LIGHTNING_REMARKS, Regression, Rows, rows, trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from pretrain_merge.evaluation import evaluate

pytestmark = LIGHTNING_REMARKS


def test_p05_no_hook_of_a_users_callback_is_called(tmp_path):
    heard = tmp_path / "heard"  # a file, which a memento does not put back
    listening = [False]

    def listen(name: str) -> Any:
        return lambda self, *args, **options: heard.write_text(name) if listening[0] else None

    hooks = [name for name in dir(pl.Callback) if name.startswith("on_")]
    spy = type("Spy", (pl.Callback,), {name: listen(name) for name in hooks})()

    def act(trainer: Any, module: Any) -> None:
        listening[0] = True
        measure_once(trainer, module)
        listening[0] = False

    at = At(2, act)
    trainer(tmp_path, spy, at, max_steps=2).fit(Regression(), rows(), rows(10, seed=1))
    assert "on_validation_batch_start" in hooks
    assert not heard.exists()


def test_a_hook_put_on_an_instance_is_not_called_either(tmp_path):
    spy, heard = pl.Callback(), tmp_path / "heard"

    def act(trainer: Any, module: Any) -> None:
        spy.on_validation_end = lambda *_: heard.touch()
        measure_once(trainer, module)
        del spy.on_validation_end

    trainer(tmp_path, spy, At(2, act), max_steps=2).fit(Regression(), rows(), rows(4, seed=1))
    assert not heard.exists()


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("shown", [True, False])
def test_a_progress_bar_shows_what_is_measured_where_the_user_has_one(kind, shown, tmp_path, capsys):
    def act(trainer: Any, module: Any) -> None:
        with evaluate.isolated(trainer, module) as measure:
            capsys.readouterr()
            for label in ("raw", "sma"):
                measure(label)
                if kind is RichProgressBar and shown:
                    trainer.progress_bar_callback.progress.refresh()  # now, and not when its thread gets to it

    at, bar = At(2, act), kind(**({"console_kwargs": {"force_terminal": True}} if kind is RichProgressBar else {}))
    if not shown:
        bar.disable()
    trainer(tmp_path, at, bar, max_steps=2, enable_progress_bar=True).fit(Regression(), rows(), rows(10, seed=1))
    said = "".join(capsys.readouterr())
    assert ("evaluating raw" in said, "evaluating sma" in said, "/3" in said) == (shown, shown, shown)


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_users_progress_bar_goes_on_after_a_measurement(kind, tmp_path, capsys):
    at = [At(step, lambda trainer, module: measure_once(trainer, module)) for step in (2, 4)]
    bar = kind(refresh_rate=1)
    own = trainer(tmp_path, *at, bar, max_epochs=2, enable_progress_bar=True)
    own.fit(Regression(), rows(), rows(10, seed=1))
    assert "val_loss" in at[1].result
    if kind is RichProgressBar:
        assert bar.progress.tasks[bar.train_progress_bar_id].completed == 6
        assert bar.progress.tasks[bar.val_progress_bar_id].completed == 3
    else:
        assert bar.train_progress_bar.n == 6


def test_no_worker_process_is_left(tmp_path):
    def act(trainer: Any, module: Any) -> set[Any]:
        before = set(multiprocessing.active_children())
        measure_once(trainer, module)
        return set(multiprocessing.active_children()) - before

    at = At(2, act)
    validation = DataLoader(Rows(10, seed=1), 2, num_workers=1)
    trainer(tmp_path, at, max_steps=2, limit_val_batches=2).fit(Regression(), rows(), validation)
    assert at.result == set()
