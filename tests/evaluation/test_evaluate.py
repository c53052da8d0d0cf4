"""Paired evaluation: Lightning's own numbers, on the same batches, and nobody else hears of it."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torchmetrics
from harness.models import (
    LIGHTNING_REMARKS,
    MemoryLogger,
    Recorder,
    Regression,
    Rows,
    Witness,
    regression_of,
    rows,
    same_bits,
    trainer,
    weights,
)
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pretrain_merge import ModelMerging
from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import evaluate
from pretrain_merge.evaluation.loaders import EvaluationInterrupted
from pretrain_merge.runtime import ranks, signals

pytestmark = LIGHTNING_REMARKS


@pytest.fixture(autouse=True)
def _seeded():
    pl.seed_everything(0, verbose=False)


class At(pl.Callback):
    """Calls a function after one step, where a merge would be measured."""

    def __init__(self, step: int, act: Callable[[Any, Any], Any]) -> None:
        self.step, self.act, self.result = step, act, None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.result = self.act(trainer, pl_module)


def measure_once(trainer: Any, module: Any, **options: Any) -> dict[str, float]:
    with evaluate.isolated(trainer, module, **options) as measure:
        return measure("raw")


def measured(folder: Any, module: Any, validation: Any, *callbacks: Any, **options: Any) -> dict[str, float]:
    """What one measurement after step 2 gives."""
    isolated = options.pop("isolated", {})
    at = At(2, lambda trainer, module: measure_once(trainer, module, **isolated))
    trainer(folder, at, *callbacks, max_steps=2, **options).fit(module, rows(), validation)
    return at.result


class Pairs(pl.Callback):
    """After each validation: Lightning's own metrics beside those that a merge at the same step logged of raw."""

    def __init__(self) -> None:
        self.pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        ours = {
            key.removeprefix("merge/raw/"): value
            for key, value in trainer.callback_metrics.items()
            if key.startswith("merge/raw/")
        }
        if ours and not trainer.sanity_checking:
            self.pairs.append(({key: trainer.callback_metrics[key] for key in ours}, ours))


class _LogsMuch(Regression):
    """Reductions, steps and epochs, sums and torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()
        self.several = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError(), torchmetrics.R2Score()])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch)
        self.log_dict({"val_loss": loss, "twice": 2 * loss})
        self.log("largest", loss, reduce_fx="max")
        self.log("sum", loss, reduce_fx="sum")
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("of_three", loss, batch_size=3)
        if dataloader_idx == 0:
            prediction = self.net(batch[0])
            self.error(prediction, batch[1])
            self.several.update(prediction, batch[1])
            self.log("error", self.error)
            self.log_dict(dict(self.several.items()))

    def on_validation_epoch_start(self) -> None:
        self.log("at_start", float(self.net[0].weight.sum()))

    def on_validation_epoch_end(self) -> None:
        self.log("at_end", float(self.net[3].weight.sum()))


class _PerName(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name, part in batch.items():
            if part is not None:
                self.log(f"loss_{name}", self.loss(part), batch_size=len(part[0]))


class _DrawsNumbers(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) + torch.rand(()))


class _TakesTheIterator(Regression):
    def validation_step(self, dataloader_iter: Any) -> None:
        batch, _, _ = next(dataloader_iter)
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))


class _Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = Rows(8, seed=1)
        index = 0
        while True:
            yield source[index % 8]
            index += 1


LOADERS = {
    "a ragged last batch": (Regression, lambda: rows(10, seed=1), {}),
    "a batch count": (Regression, lambda: rows(22, seed=1), {"limit_val_batches": 2}),
    "a share of the batches": (Regression, lambda: rows(22, seed=1), {"limit_val_batches": 0.5}),
    "several loaders": (Regression, lambda: [rows(10, seed=1), rows(7, seed=2)], {}),
    "a mapping of loaders": (Regression, lambda: {"a": rows(10, seed=1), "b": rows(7, seed=2)}, {}),
    "loaders side by side": (
        _PerName,
        lambda: CombinedLoader({"a": rows(10, seed=1), "b": rows(7, seed=2)}, "max_size"),
        {},
    ),
    "an endless stream": (Regression, lambda: DataLoader(_Endless(), 4), {"limit_val_batches": 3}),
    "a step that takes the iterator": (_TakesTheIterator, lambda: rows(12, seed=1), {}),
    "overfitting": (Regression, lambda: rows(10, seed=1), {"overfit_batches": 3, "val_check_interval": 1.0}),
    "everything logged": (_LogsMuch, lambda: rows(10, seed=1), {}),
    "everything logged of two loaders": (_LogsMuch, lambda: [rows(10, seed=1), rows(8, seed=2)], {}),
    "shuffled": (_DrawsNumbers, lambda: rows(10, seed=1, shuffle=True), {}),
    "bf16-mixed": (Regression, lambda: rows(10, seed=1), {"precision": "bf16-mixed"}),
    "bf16-true": (Regression, lambda: rows(10, seed=1), {"precision": "bf16-true"}),
    "64-true": (Regression, lambda: rows(10, seed=1), {"precision": "64-true"}),
}


@pytest.mark.parametrize("situation", LOADERS)
def test_p16_the_raw_metric_is_lightnings_own_bit_for_bit(situation, tmp_path):
    module, validation, options = LOADERS[situation]
    pairs = Pairs()
    merging = ModelMerging(window=3, every=3)
    options = {"max_steps": 9, "val_check_interval": 3} | options
    trainer(tmp_path, merging, pairs, **options).fit(module(), rows(), validation())
    assert len(pairs.pairs) == 2  # merges at steps 6 and 9
    for lightnings, ours in pairs.pairs:
        assert {name: float(value) for name, value in lightnings.items()} == {
            name: float(value) for name, value in ours.items()
        }
        assert lightnings


def test_the_raw_metric_is_that_of_the_pytorch_lightning_trainer_too(tmp_path):
    module = regression_of(pytorch_lightning)()
    merging = ModelMerging(window=2, every=3)
    options = {"library": pytorch_lightning, "max_steps": 6, "val_check_interval": 3}
    own = trainer(tmp_path, merging, **options)
    own.fit(module, rows(), [rows(10, seed=1), rows(7, seed=2)])
    for name in ("val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"):
        assert own.callback_metrics[name] == own.callback_metrics[f"merge/raw/{name}"]
        assert own.callback_metrics[name] != own.callback_metrics[f"merge/sma/{name}"]


def test_a_ragged_last_batch_counts_by_its_size(tmp_path):
    module, validation = Regression(dropout=0.0), rows(10, seed=1)
    value = measured(tmp_path, module, validation)["val_loss"]
    with torch.no_grad():
        by_row = (module.net(validation.dataset.x) - validation.dataset.y).double().square()
    by_batch = [float(by_row[start : start + 4].mean()) for start in (0, 4, 8)]
    assert value == pytest.approx(float(by_row.mean()), rel=1e-6)
    assert value != pytest.approx(sum(by_batch) / 3, rel=1e-3)  # what a mean of batch means would say


def test_loaders_are_told_apart_by_lightnings_names(tmp_path):
    values = measured(tmp_path, Regression(), [rows(10, seed=1), rows(7, seed=2)])
    assert sorted(values) == ["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]


def test_p16_without_validation_batches_there_are_evaluators_only(tmp_path):
    values = measured(
        tmp_path,
        Regression(),
        rows(10, seed=1),
        limit_val_batches=0,
        isolated={"evaluators": {"one": lambda _: {"a": 1}}},
    )
    assert values == {"one/a": 1.0}


def test_validation_can_be_left_out(tmp_path):
    isolated = {"validate": False, "evaluators": {"one": lambda _: {"a": torch.tensor([1.5])}}}
    assert measured(tmp_path, Regression(), rows(10, seed=1), isolated=isolated) == {"one/a": 1.5}


def test_loaders_are_asked_for_where_the_run_has_not_validated_yet(tmp_path):
    assert "val_loss" in measured(tmp_path, Regression(), rows(10, seed=1), check_val_every_n_epoch=5)


def test_a_module_without_validation_measures_nothing(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert measured(tmp_path, Module(), None) == {}


# --- the module's own hooks ---


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


# --- nobody else hears of it ---


def test_p05_no_hook_of_a_users_callback_is_called(tmp_path):
    heard: list[str] = []
    listening = [False]

    def listen(name: str) -> Any:
        return lambda self, *args, **options: heard.append(name) if listening[0] else None

    hooks = [name for name in dir(pl.Callback) if name.startswith("on_")]
    spy = type("Spy", (pl.Callback,), {name: listen(name) for name in hooks})()

    def act(trainer: Any, module: Any) -> None:
        listening[0] = True
        measure_once(trainer, module)
        listening[0] = False

    at = At(2, act)
    trainer(tmp_path, spy, at, max_steps=2).fit(Regression(), rows(), rows(10, seed=1))
    assert "on_validation_batch_start" in hooks
    assert heard == []


def test_a_hook_put_on_an_instance_is_not_called_either(tmp_path):
    spy, heard = pl.Callback(), []

    def act(trainer: Any, module: Any) -> None:
        spy.on_validation_end = lambda *_: heard.append("on_validation_end")
        measure_once(trainer, module)
        del spy.on_validation_end

    trainer(tmp_path, spy, At(2, act), max_steps=2).fit(Regression(), rows(), rows(4, seed=1))
    assert heard == []


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
    folders, logger = Witness(), MemoryLogger(tmp_path / "logs")

    class Module(Regression):
        def on_validation_epoch_end(self) -> None:
            folders.append((self.trainer.log_dir, self.logger.save_dir))
            self.logger.log_metrics({"a": 1.0}, step=1)
            self.log("logged", 2.0, logger=True, prog_bar=True)
            for each in self.trainer.loggers:
                each.log_metrics({"b": 1.0})

    def act(trainer: Any, module: Any) -> Any:
        lines, shown = list(logger.lines), dict(trainer.progress_bar_metrics)
        values = measure_once(trainer, module)
        return values, logger.lines == lines, trainer.progress_bar_metrics == shown, "logged" in trainer.logged_metrics

    at = At(2, act)
    trainer(tmp_path, at, max_steps=2, logger=logger, check_val_every_n_epoch=9).fit(Module(), rows(), rows(4, seed=1))
    values, no_lines, same_bar, in_logged = at.result
    assert values["logged"] == 2.0
    assert no_lines
    assert same_bar
    assert not in_logged
    assert folders == [(tmp_path / "logs",) * 2]


def test_a_metric_of_training_is_not_taken_for_one_of_validation(tmp_path):
    assert sorted(measured(tmp_path, Regression(), rows(4, seed=1))) == ["val_loss"]


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


# --- the same batches ---


def test_raw_and_merged_see_the_same_random_numbers(tmp_path):
    def act(trainer: Any, module: Any) -> list[dict[str, float]]:
        with evaluate.isolated(trainer, module, evaluators={"own": lambda _: {"x": float(torch.rand(()))}}) as measure:
            return [measure(label) for label in ("raw", "sma", "wma")]

    at = At(2, act)
    trainer(tmp_path, at, max_steps=2).fit(_DrawsNumbers(), rows(), rows(10, seed=1, shuffle=True))
    assert at.result[0] == at.result[1] == at.result[2]


class _OtherEachTime(Rows):
    """Different rows at each pass, by the clock of the data set itself."""

    def __init__(self) -> None:
        super().__init__(10, seed=1)
        self.reads = [0]
        self.queue = SimpleQueue()  # so that its clock is not put back

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads[0] += 1
        x, y = super().__getitem__(index)
        return x + self.reads[0], y


class _Shrinks(IterableDataset):
    def __init__(self) -> None:
        self.passes = [0]
        self.queue = SimpleQueue()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes[0] += 1
        source = Rows(12, seed=1)
        return (source[index] for index in range(12 - 4 * (self.passes[0] - 1)))


@pytest.mark.parametrize(
    ("data", "said"), [(_OtherEachTime, "batch 0 of this pass is another"), (_Shrinks, "2 batches after 3")]
)
def test_other_batches_at_the_second_pass_are_an_error_and_raw_is_back(data, said, tmp_path):
    module, raw = Regression(), Recorder()
    own = trainer(tmp_path, raw, ModelMerging(window=2, every=2), max_steps=6)
    with pytest.raises(EvaluationError, match=said) as error:
        own.fit(module, rows(), DataLoader(data(), 4))
    for piece in ("validation loader 0", "raw and merged", "same items at each iteration"):
        assert piece in str(error.value)
    assert own.global_step == 4
    assert same_bits(weights(module), raw.run.weights[-1])


class _Position(IterableDataset):
    """A stream that says where it is, as resumable data sets do."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = Rows(8, seed=1)
        return (source[index] for index in range(8))

    def state_dict(self) -> dict[str, int]:
        return {"position": 0}

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


def test_data_with_a_position_of_their_own_are_refused(tmp_path):
    with pytest.raises(EvaluationError) as error:
        measured(tmp_path, Regression(), DataLoader(_Position(), 4))
    for piece in ("validation loader 0", "_Position", "position of its own", "starts over", "stateful_data='iterate'"):
        assert piece in str(error.value)


def test_data_with_a_position_of_their_own_are_iterated_on_request(tmp_path):
    assert "val_loss" in measured(
        tmp_path, Regression(), DataLoader(_Position(), 4), isolated={"stateful_data": "iterate"}
    )


# the first two calls set up the loaders
@pytest.mark.parametrize("at_call", [4, 5, 8], ids=["before a batch", "between batches", "before a pass"])
def test_a_signal_on_any_rank_ends_the_measurement_on_all(at_call, tmp_path, monkeypatch):
    calls: list[list[int]] = []

    def with_another_rank(flags: list[int]) -> list[int]:
        calls.append(flags)
        return [*flags[:2], int(len(calls) == at_call), *flags[3:]]  # this rank has no signal

    def act(trainer: Any, module: Any) -> list[str]:
        done = []
        with pytest.raises(EvaluationInterrupted), evaluate.isolated(trainer, module) as measure:  # noqa: PT012
            for label in ("raw", "sma", "wma"):
                measure(label)
                done.append(label)
        return done

    monkeypatch.setattr(ranks, "_summed", with_another_rank)
    at = At(2, act)
    trainer(tmp_path, at, max_steps=2).fit(Regression(), rows(), rows(4 if at_call == 8 else 8, seed=1))
    assert len(calls) == at_call
    assert at.result == (["raw"] if at_call == 8 else [])


def test_a_waiting_signal_ends_the_pass_before_its_next_batch(tmp_path, monkeypatch):
    seen = Witness()

    class Signalled(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)
            monkeypatch.setattr(signals, "pending", lambda: True)

    def act(trainer: Any, module: Any) -> None:
        with pytest.raises(EvaluationInterrupted):
            measure_once(trainer, module)

    trainer(tmp_path, At(2, act), max_steps=2, limit_val_batches=2, check_val_every_n_epoch=9).fit(
        Signalled(), rows(), rows(12, seed=1)
    )
    assert seen == [0]


# --- evaluators ---


def test_evaluators_measure_raw_and_merged_alike(tmp_path):
    seen: list[tuple[str, float, bool, bool]] = []

    def total(module: Any) -> dict[str, float]:
        value = sum(float(parameter.sum()) for parameter in module.parameters())
        seen.append(("called", value, module.training, torch.is_grad_enabled()))
        return {"total": value}

    merging = ModelMerging(window=2, every=2, views=["sma", "wma"], evaluators={"own": total})
    own = trainer(tmp_path, merging, max_steps=4)
    own.fit(Regression(), rows(), rows(4, seed=1))
    assert [mode for _, _, *mode in seen] == [[False, False]] * 3
    values = [value for _, value, *_ in seen]
    assert len(set(values)) == 3
    for label, value in zip(("raw", "sma", "wma"), values, strict=True):
        assert own.callback_metrics[f"merge/{label}/own/total"] == pytest.approx(value)


@pytest.mark.parametrize("given", [{"a": "high"}, {"a": torch.ones(2)}, {"a": None}, 3.0, None], ids=str)
def test_an_evaluator_that_gives_no_numbers_is_an_error(given, tmp_path):
    with pytest.raises(EvaluationError, match=r"own gave .* not every value is a number.*Return a mapping"):
        measured(tmp_path, Regression(), rows(4, seed=1), isolated={"evaluators": {"own": lambda _: given}})


def test_a_stop_asked_for_while_measuring_does_not_stop_the_run(tmp_path):
    class Module(Regression):
        def on_validation_epoch_end(self) -> None:
            self.trainer.should_stop = True

    own = trainer(
        tmp_path, At(2, lambda trainer, module: measure_once(trainer, module)), max_steps=5, check_val_every_n_epoch=9
    )
    own.fit(Module(), rows(), rows(4, seed=1))
    assert own.global_step == 5


def _names(values: Sequence[dict[str, float]]) -> list[list[str]]:
    return [sorted(value) for value in values]


def test_every_measurement_gives_the_same_names(tmp_path):
    def act(trainer: Any, module: Any) -> list[dict[str, float]]:
        with evaluate.isolated(trainer, module) as measure:
            return [measure("raw"), measure("sma")]

    at = At(2, act)
    trainer(tmp_path, at, max_steps=2).fit(_LogsMuch(), rows(), [rows(10, seed=1), rows(7, seed=2)])
    raw, merged = _names(at.result)
    assert raw == merged


def test_a_module_that_validates_with_weights_of_its_own_is_told_once(tmp_path, caplog):
    class Swaps(Regression):
        def on_validation_epoch_start(self) -> None:
            for parameter in self.parameters():
                parameter.data.fill_(0.5)

    trainer(tmp_path, ModelMerging(window=2, every=2), max_steps=6, check_val_every_n_epoch=9).fit(
        Swaps(), rows(), rows(4, seed=1)
    )
    assert sum("raw and merged metrics are equal bit for bit" in line for line in caplog.messages) == 1
