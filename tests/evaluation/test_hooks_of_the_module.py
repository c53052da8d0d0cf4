"""The module's own hooks run as in a validation: in Lightning's order, in eval mode, and the run is where it was."""

from typing import Any

import torch
from evaluation.measuring import At, measure_once, measured
from harness.models import LIGHTNING_REMARKS, MemoryLogger, Regression, Witness, rows, trainer
from lightning.pytorch.callbacks import EarlyStopping

pytestmark = LIGHTNING_REMARKS


def test_the_modules_hooks_run_in_lightnings_order(tmp_path):
    called = Witness()
    names = [
        "on_validation_model_eval",
        "on_validation_start",
        "on_validation_epoch_start",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
        "on_validation_end",
        "on_validation_model_train",
    ]
    hooks = {name: (lambda self, *args, hook=name: called.append(hook)) for name in names}
    measured(tmp_path, type("Module", (Regression,), hooks)(), rows(4, seed=1))
    assert called[: len(names)] == names


def test_validation_runs_in_eval_mode_without_gradients_as_a_validation(tmp_path):
    seen = Witness()

    class Module(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            trainer = self.trainer
            modes = (self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            seen.append((*modes, trainer.validating, trainer.state.fn.value))
            assert not trainer.sanity_checking
            assert len(trainer.val_dataloaders) == trainer.num_val_batches[0] == 1

    measured(tmp_path, Module(), rows(4, seed=1), limit_train_batches=2)
    assert seen[0] == seen[-1] == (False, False, False, True, "fit")  # ours, then Lightning's own


def test_p04_a_run_stays_in_training_where_it_was(tmp_path):
    def state(trainer: Any, module: Any) -> Any:
        before = (trainer.state.stage, trainer.callbacks, trainer.loggers, trainer.profiler)
        before += (trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector)
        first = trainer._logger_connector._first_loop_iter
        measure_once(trainer, module)
        after = (trainer.state.stage, trainer.callbacks, trainer.loggers, trainer.profiler)
        after += (trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector)
        after_first = trainer._logger_connector._first_loop_iter
        return [x is y for x, y in zip((*before, first), (*after, after_first), strict=True)]

    at = At(2, state)
    trainer(tmp_path, at, max_steps=2, logger=MemoryLogger()).fit(Regression(), rows(), rows(4, seed=1))
    assert all(at.result)


def test_hooks_of_the_module_find_the_trainers_callbacks(tmp_path):
    found = Witness()

    class Module(Regression):
        def on_validation_epoch_end(self) -> None:
            found.append((self.trainer.early_stopping_callback.patience, len(self.trainer.callbacks)))

    at = At(2, lambda trainer, module: measure_once(trainer, module))
    own = trainer(tmp_path, at, EarlyStopping("val_loss", patience=7), max_steps=2, check_val_every_n_epoch=9)
    own.fit(Module(), rows(), rows(4, seed=1))
    assert found == [(7, len(own.callbacks))]


def test_hooks_of_the_module_find_a_silent_logger_with_the_users_folder(tmp_path):
    diary = tmp_path / "diary"

    class Logger(MemoryLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            # what an object keeps would be put back
            diary.write_text(f"{diary.read_text()}{metrics}")

    folders, logger = Witness(), Logger(tmp_path / "logs")
    diary.write_text("")

    class Module(Regression):
        def on_validation_epoch_end(self) -> None:
            folders.append((self.trainer.log_dir, self.logger.save_dir))
            self.logger.log_metrics({"a": 1.0}, step=1)
            self.log("logged", 2.0, logger=True, prog_bar=True)
            for each in self.trainer.loggers:
                each.log_metrics({"b": 1.0})

    def act(trainer: Any, module: Any) -> Any:
        lines, shown = diary.read_text(), dict(trainer.progress_bar_metrics)
        values = measure_once(trainer, module)
        return (
            values,
            diary.read_text() == lines,
            trainer.progress_bar_metrics == shown,
            "logged" in trainer.logged_metrics,
        )

    at = At(2, act)
    trainer(tmp_path, at, max_steps=2, logger=logger, check_val_every_n_epoch=9).fit(Module(), rows(), rows(4, seed=1))
    values, no_lines, same_bar, in_logged = at.result
    assert values["logged"] == 2.0
    assert no_lines
    assert same_bar
    assert not in_logged
    assert folders == [(tmp_path / "logs",) * 2]


def test_a_stop_asked_for_while_measuring_does_not_stop_the_run(tmp_path):
    class Module(Regression):
        def on_validation_epoch_end(self) -> None:
            self.trainer.should_stop = True

    own = trainer(
        tmp_path, At(2, lambda trainer, module: measure_once(trainer, module)), max_steps=5, check_val_every_n_epoch=9
    )
    own.fit(Module(), rows(), rows(4, seed=1))
    assert own.global_step == 5
