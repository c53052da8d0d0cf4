"""Traps of Lightning's callback API, P1 to P30: each has a test with its number in its name (`pytest -k p06_`).

Those that are tested best beside a part of the package are there; the last test here finds them all. P27 needs a CUDA
device (on a CPU a capture is over when it returns), so its test in `stores/test_host_store.py` skips elsewhere. Of P20,
the skipped steps of `16-mixed` need a gradient scaler, which Lightning has on CUDA devices only.
"""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from harness.models import (
    LIGHTNING_REMARKS,
    Recorder,
    Regression,
    Rows,
    TwoOptimizers,
    checksum,
    rows,
    same_bits,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pretrain_merge import ModelMerging, load_merged
from pretrain_merge.records import read_records

pytestmark = LIGHTNING_REMARKS

TESTS = Path(__file__).parent.parent


def steps_merged(folder: Path) -> list[tuple[int, ...]]:
    return [record.recipes["sma"].steps for record in read_records(folder / "merges.jsonl")]


class AroundMerges(pl.Callback):
    """Put before and after the merging callback: what a function says of Trainer and module before and after it."""

    def __init__(self, look: Any) -> None:
        self.look, self.before, self.after = look, [], []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        first = len(self.before) == len(self.after)
        (self.before if first else self.after).append(self.look(trainer, pl_module))


def around(folder: Path, module: Any, look: Any, *, validation: Any = None, **options: Any) -> AroundMerges:
    looking = AroundMerges(look)
    merging = ModelMerging(window=2, every=2, views=["sma", "wma"])
    own = trainer(folder, **({"max_steps": 6} | options))
    own.callbacks[:] = [looking, merging, looking]  # a Trainer refuses one callback twice
    own.fit(module, rows(), validation or rows(10, seed=1))
    assert merging.last_record.step == 6
    return looking


def test_p01_a_step_is_a_step_however_often_the_hook_is_called_and_the_counter_jumps(tmp_path):
    class ThreeSteps(TwoOptimizers):
        """Steps in every other batch, and three times then."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx % 2:
                for optimizer in [*self.optimizers(), self.optimizers()[0]]:
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()

    own = trainer(tmp_path, ModelMerging(window=2, every=2), max_epochs=2)
    own.fit(ThreeSteps(), rows(40), rows(4, seed=1))
    assert own.global_step == 30
    assert steps_merged(tmp_path) == [(2, 4), (4, 6), (6, 8), (8, 10)]


def test_p02_no_verb_of_the_trainer_is_called_inside_fit(tmp_path, monkeypatch):
    called: list[str] = []
    own = trainer(tmp_path, ModelMerging(window=2, every=2), max_steps=6)
    for verb in ("validate", "test", "predict"):
        monkeypatch.setattr(own, verb, lambda *_, verb=verb, **__: called.append(verb))
    own.fit(Regression(), rows(), rows(4, seed=1))
    assert len(steps_merged(tmp_path)) == 2
    assert called == []
    assert own.state.fn == "fit"


def test_p03_modes_after_a_merge_are_those_before_it_also_where_they_differ(tmp_path):
    class Mixed(Regression):
        def on_train_epoch_start(self) -> None:
            self.net[2].eval()

    looking = around(tmp_path, Mixed(), lambda _, module: [part.training for part in module.modules()])
    assert looking.before == looking.after
    assert {True, False} == set(looking.after[-1])


def test_p06_an_extra_pass_over_a_loader_would_change_training_and_a_merge_does_not(tmp_path):
    class ExtraPass(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                list(validation)

    def batches(folder: Path, *callbacks: Any) -> list[int]:
        pl.seed_everything(5, verbose=False)
        recorder = Recorder()
        trainer(folder, *callbacks, recorder).fit(Regression(), rows(shuffle=True), validation)
        return recorder.run.train_batches

    validation = rows(10, seed=1)
    alone = batches(tmp_path / "alone")
    assert batches(tmp_path / "extra", ExtraPass()) != alone
    assert batches(tmp_path / "merging", ModelMerging(window=2, every=2)) == alone


def test_p12_a_run_configured_by_omegaconf_resumes_with_lightnings_defaults(tmp_path):
    def fit(steps: int, **options: Any) -> ModelMerging:
        config = OmegaConf.create({"window": 2, "every": 2, "views": ["sma"], "save": {"every": 4}})
        merging = ModelMerging.from_config(config)
        saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, filename="{step}")
        trainer(tmp_path, merging, saving, max_steps=steps).fit(Regression(), rows(), rows(4, seed=1), **options)
        return merging

    fit(5)
    # torch.load refuses anything but plain types here
    assert fit(10, ckpt_path=tmp_path / "kept" / "step=5.ckpt", weights_only=True).last_record.step == 10


class _Counted(Regression):
    """Compiled by a backend that notes, for each graph, whether it was made with gradients."""

    def __init__(self, graphs: list[bool]) -> None:
        super().__init__()

        def backend(graph: Any, _: Any) -> Any:
            graphs.append(torch.is_grad_enabled())
            return graph.forward

        torch._dynamo.reset()  # graphs of runs before count towards a limit
        self.net = torch.compile(self.net, backend=backend)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("num_rows", [24, 26], ids=["even batches", "a ragged last batch in training"])
def test_p14_training_graphs_are_not_compiled_again_and_evaluation_takes_one_per_batch_shape(num_rows, tmp_path):
    def graphs(folder: Path, *callbacks: Any) -> list[bool]:
        made: list[bool] = []
        validation = [rows(10, seed=1), rows(7, seed=2)]  # batches of 4, 2 and 3 rows
        trainer(folder, *callbacks, max_epochs=3).fit(_Counted(made), rows(num_rows), validation)
        return made

    merging = ModelMerging(window=3, every=2, views=["sma", "wma"])
    on, off = graphs(tmp_path / "on", merging), graphs(tmp_path / "off")
    assert merging.last_record.step >= 18
    assert on.count(True) == off.count(True) >= 1
    assert on.count(False) - off.count(False) <= 3


class _Scaled(Regression):
    """State beside the state dict's tensors, as modules with 8-bit scales have it."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [0.0]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.scales)

    def set_extra_state(self, state: Tensor) -> None:
        self.scales = state.tolist()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.scales = [self.scales[0] + 1.0]
        return super().training_step(batch, batch_idx)


def test_p20_extra_state_is_the_live_models(tmp_path):
    seen: list[list[float]] = []
    module = _Scaled()
    evaluators = {"look": lambda own: seen.append(list(own.scales)) or {}}
    merging = ModelMerging(window=2, every=2, evaluators=evaluators, save={"at_end": True})
    trainer(tmp_path, merging, max_steps=6).fit(module, rows(), rows(4, seed=1))
    assert seen == [[4.0], [4.0], [6.0], [6.0]]
    assert module.scales == [6.0]
    loaded = _Scaled()
    load_merged(loaded, tmp_path / "merged" / "step-00000006-sma")
    assert loaded.scales == [6.0]


def test_p21_another_option_changes_no_state_key_so_that_the_state_is_found(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, filename="{step}")
    trainer(tmp_path, ModelMerging(window=2, every=2), saving, max_steps=5).fit(Regression(), rows(), rows(4, seed=1))
    changed = ModelMerging(window=2, every=2, views=["wma"], save={"at_end": True})
    own = trainer(tmp_path, changed, max_steps=10)
    own.fit(Regression(), rows(), rows(4, seed=1), ckpt_path=tmp_path / "kept" / "step=5.ckpt")
    assert changed.last_record.samples == 40  # from its own counters; without them samples count from the resume


def test_p25_the_clock_and_the_counters_of_the_users_own_validation_stay(tmp_path):
    def clock(trainer: Any, _: Any) -> Any:
        loop = trainer.fit_loop.epoch_loop.val_loop
        return trainer._last_val_time, loop.batch_progress.state_dict(), id(loop), loop._has_run

    looking = around(tmp_path, Regression(), clock, val_check_interval="00:00:10:00")
    assert looking.before == looking.after


def test_p26_resumed_inside_an_epoch_a_plain_loader_starts_over_while_the_batch_number_goes_on(tmp_path):
    class Batches(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append((batch_idx, checksum(batch)))

    def fit(steps: int, **options: Any) -> list[tuple[int, int]]:
        batches = Batches()
        saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, filename="{step}", save_top_k=-1)
        trainer(tmp_path, batches, saving, max_steps=steps).fit(Regression(), DataLoader(Rows(), 4), **options)
        return batches.seen

    whole = fit(6)
    resumed = fit(6, ckpt_path=tmp_path / "kept" / "step=3.ckpt")
    assert [index for index, _ in resumed] == [3, 4, 5]
    assert [data for _, data in resumed] == [data for _, data in whole[:3]]
    assert not same_bits([data for _, data in resumed], [data for _, data in whole[3:]])


def test_every_pitfall_has_a_test_with_its_number():
    text = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    numbers = {
        int(number)
        for name in re.findall(r"^def (test_\w+)", text, re.M)
        for number in re.findall(r"_p(\d\d)(?=_)", name)
    }
    assert sorted(set(range(1, 31)) - numbers) == []
