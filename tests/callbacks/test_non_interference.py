"""Promise 1: with the callback on or off, a run is the same bit for bit, whatever the run does."""

import functools
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from harness.models import (
    LIGHTNING_REMARKS,
    MemoryLogger,
    Recorder,
    Regression,
    Run,
    differences,
    rows,
    same_bits,
    trainer,
)
from harness.situations import data, hooks, modules, trainers, validation
from harness.situations.data import (
    one_generator_for_train_and_validation,
    random_augmentation,
    several_validation_loaders,
    two_workers,
)
from harness.situations.modules import (
    accumulated_gradients,
    compiled,
    gradients_that_live_across_merges,
    tied_weights,
    two_optimizers_by_hand,
)
from harness.situations.situation import Situation
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader

from pretrain_merge import ModelMerging

pytestmark = LIGHTNING_REMARKS


def run(folder: Any, build: Callable[[], Situation], *callbacks: Any) -> Run:
    pl.seed_everything(7, verbose=False)
    situation = build()
    recorder = Recorder(*situation.generators)
    options = {"logger": MemoryLogger(folder), "log_every_n_steps": 1, "max_epochs": 2} | situation.options
    first, others = (situation.callbacks, ()) if situation.callbacks_first else ((), situation.callbacks)
    own = trainer(folder, *first, *callbacks, *others, recorder, **options)
    own.fit(situation.module, situation.train, situation.validation, situation.data)
    return recorder.run


def merging(**options: Any) -> ModelMerging:
    # half of the time of a run is that of its merges: three of them in twelve steps, two in one epoch
    return ModelMerging(**({"window": 3, "every": 2, "merge_every": 4, "views": ["sma", "wma"]} | options))


def merged_run(folder: Any, build: Callable[[], Situation], *others: Any, **options: Any) -> Run:
    callback = merging(**options)
    with_merging = run(folder / "on", build, callback, *others)
    assert callback.last_record is not None, "no merge was made, so nothing was tried"
    assert callback.last_record.views, "no view was measured"
    return with_merging


def on_and_off(folder: Any, build: Callable[[], Situation], *others: Any, **options: Any) -> list[str]:
    return differences(merged_run(folder, build, *others, **options), run(folder / "off", build))


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> Callable[[Callable[[], Situation]], Run]:
    """The run without merging of a situation, made once for the tests that compare several runs with it."""
    return functools.cache(lambda build: run(tmp_path_factory.mktemp("off"), build))


SITUATIONS = [
    Situation,
    *(build for module in (data, modules, validation, hooks, trainers) for build in module.SITUATIONS),
]


@pytest.mark.parametrize("build", SITUATIONS, ids=lambda build: build.__name__)
def test_a_run_is_the_same_with_and_without_merging(build, tmp_path):
    assert on_and_off(tmp_path, build, batch_norm="live", breaks={"lr": False}) == []


KINDS = {
    "plain": Situation,
    "gradient accumulation": accumulated_gradients,
    "two optimizers by hand": two_optimizers_by_hand,
    "compiled": compiled,
    "dropout and workers that augment": two_workers,
    "tied weights": tied_weights,
    "several validation loaders": several_validation_loaders,
    "two callbacks": random_augmentation,
}
# In float32 most kinds are situations above. Autocast is of the evaluation alone, so it meets the kinds of evaluations.
ALONE = [("compiled", "32-true"), ("two callbacks", "32-true")]
MIXED = [(kind, "bf16-mixed") for kind in ("plain", "compiled", "two optimizers by hand", "several validation loaders")]


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "bf16-true") for kind in KINDS), *MIXED, *ALONE])
def test_a_run_of_every_kind_is_the_same_in_every_precision(kind, precision, tmp_path):
    def build() -> Situation:
        situation = KINDS[kind]()
        situation.options = situation.options | {"precision": precision}
        return situation

    others = [merging(name="late", every=3, average="block")] if kind == "two callbacks" else []
    assert on_and_off(tmp_path, build, *others) == []
    assert all(other.last_record is not None for other in others)


def test_an_evaluator_that_calls_backward_leaves_the_gradients_that_accumulate(tmp_path):
    @torch.enable_grad()
    def sharpness(module: Any) -> dict[str, float]:
        assert all(parameter.grad is None for parameter in module.parameters())
        module.loss((torch.ones(2, 4), torch.zeros(2, 1))).backward()
        return {"norm": float(torch.stack([weight.grad.norm() for weight in module.parameters()]).norm())}

    evaluators = {"sharpness": sharpness}
    assert on_and_off(tmp_path, gradients_that_live_across_merges, evaluators=evaluators) == []


def _empties(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data = torch.empty(0)


def _frees(module: Any) -> None:
    for parameter in module.parameters():
        parameter.untyped_storage().resize_(0)


LEFT_BEHIND = {
    "another dtype": nn.Module.double,
    "no memory": _empties,
    "memory that was freed": _frees,
    "the meta device": lambda module: module.to("meta"),
    "a parametrization": lambda module: parametrizations.weight_norm(module.net[0]),
    "a pruned layer": lambda module: prune.l1_unstructured(module.net[0], "weight", 0.5),
    "another layer": lambda module: module.net.__setitem__(0, nn.Linear(4, 6)),
}


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_whatever_an_evaluator_leaves_behind_is_undone_before_gradients_come_back(what, tmp_path, without):
    evaluators = {"leaves": lambda module: (LEFT_BEHIND[what](module), {"x": 1.0})[1]}
    left = merged_run(tmp_path, gradients_that_live_across_merges, evaluators=evaluators)
    assert differences(left, without(gradients_that_live_across_merges)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"average": "block"},
        {"average": "block", "every": 3, "sample_every": 2},
        {"merge_every": 2},
        {"every": "8 samples"},
        {"evaluators": {"draws": lambda module: {"number": float(torch.rand(())) + random.random()}}},
        {"save": {"every": 2, "best": "val_loss", "at_end": True}},
        {"validate": False, "evaluators": {"trains": lambda module: {"mode": float(module.train().training)}}},
    ],
    ids=[
        "blocks",
        "sampled blocks",
        "a merge with every snapshot",
        "by samples",
        "random evaluator",
        "saving",
        "evaluator in train mode",
    ],
)
def test_a_run_is_the_same_whatever_the_callback_does(options, tmp_path, without):
    assert differences(merged_run(tmp_path, random_augmentation, **options), without(random_augmentation)) == []


def test_batch_size_scaling_gives_the_same_run(tmp_path):
    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> DataLoader:
            return rows(shuffle=True, batch_size=self.batch_size)

        def val_dataloader(self) -> DataLoader:
            return rows(10, seed=1, batch_size=self.batch_size)

    def scaled(folder: Any, *callbacks: Any) -> Run:
        pl.seed_everything(7, verbose=False)
        recorder = Recorder()
        finder = BatchSizeFinder(max_trials=1, init_val=4, steps_per_trial=2)
        trainer(folder, *callbacks, finder, recorder, max_epochs=2).fit(Regression(), datamodule=Data())
        return recorder.run

    callback = merging()
    assert differences(scaled(tmp_path / "on", callback), scaled(tmp_path / "off")) == []
    assert callback.last_record.step == 12


def test_p05_checkpoints_hold_the_same_but_for_our_counters(tmp_path):
    def checkpoints(folder: Any, *callbacks: Any) -> dict[str, Any]:
        saving = ModelCheckpoint(
            folder / "kept", monitor="val_loss", every_n_train_steps=3, save_top_k=-1, save_last=True
        )
        stopping = EarlyStopping("val_loss", patience=1)
        run(folder, lambda: Situation(callbacks=(saving, stopping), options={"val_check_interval": 3}), *callbacks)
        return {path.name: torch.load(path, weights_only=True) for path in sorted((folder / "kept").iterdir())}

    on, off = checkpoints(tmp_path / "on", merging()), checkpoints(tmp_path / "off")
    assert on.keys() == off.keys()
    assert len(on) > 1
    for name in on:
        assert on[name]["callbacks"].pop("ModelMerging[merge]")
        for checkpoint in (on[name], off[name]):
            for state in checkpoint["callbacks"].values():
                state.pop("dirpath", None), state.pop("best_model_path", None)
                state.pop("kth_best_model_path", None), state.pop("last_model_path", None)
                state["best_k_models"] = list(state.get("best_k_models", {}).values())
        assert same_bits(on[name], off[name]), name


def test_a_profile_counts_the_same_calls_but_for_our_hooks(tmp_path):
    def profile(folder: Any, *callbacks: Any) -> dict[str, int]:
        profiler = SimpleProfiler()
        run(folder, lambda: Situation(options={"profiler": profiler}), *callbacks)
        return {
            action: len(durations)
            for action, durations in profiler.recorded_durations.items()
            if "ModelMerging" not in action
        }

    assert profile(tmp_path / "on", merging()) == profile(tmp_path / "off")


class _Meddles(pl.Callback):
    def __init__(self, meddle: Callable[[Any, Any], object]) -> None:
        self.meddle = meddle

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            self.meddle(trainer, pl_module)


@pytest.mark.parametrize(
    ("meddle", "seen"),
    [
        (lambda trainer, module: torch.rand(1), "random_state"),
        (lambda trainer, module: random.random(), "random_state"),
        (lambda trainer, module: next(iter(trainer.val_dataloaders)), "generators"),
        (lambda trainer, module: module.net[0].weight.data.view(-1)[0].add_(1e-6), "weights after step 4"),
        (lambda trainer, module: module.net[2].eval(), "modes"),
        (lambda trainer, module: trainer.loggers[0].log_metrics({"x": 1.0}), "lines"),
        (lambda trainer, module: trainer.optimizers[0].state.clear(), "optimizers"),
    ],
)
def test_a_callback_that_meddles_would_be_seen(meddle, seen, tmp_path, without):
    meddled = run(tmp_path, one_generator_for_train_and_validation, _Meddles(meddle))
    assert seen in differences(meddled, without(one_generator_for_train_and_validation))
