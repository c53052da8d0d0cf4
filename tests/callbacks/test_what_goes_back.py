"""What a run that goes back takes with it: optimizers, the scale of gradients, averages of weights."""

import math

import lightning.pytorch as pl
import pytest
import torch
from callbacks.recovering_runs import HARMED, RATE, SMALL, Model, assert_same, fit, harmed
from torch import nn

from pretrain_merge import SpikeRecovery

# a resumed run saves into the folder that it came from
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


@pytest.mark.parametrize(("optimizer", "is_afresh"), [("fresh", True), ("newest", False)])
def test_the_optimizer_begins_afresh_unless_its_state_is_to_be_kept(optimizer, is_afresh, tmp_path):
    class Counting(Model):
        def remember(self, optimizer):
            super().remember(optimizer)
            self.counts = [*getattr(self, "counts", []), *{int(state["step"]) for state in optimizer.state.values()}]

    recovery = SpikeRecovery(**SMALL, optimizer=optimizer)
    _, model = fit(tmp_path, recovery, model=Counting(bad=(), harmed=(HARMED,)))
    (done,) = recovery.recoveries
    assert model.counts[: done.step] == [*range(1, done.step + 1)]
    assert model.counts[done.step] == (1 if is_afresh else done.back_to[0] + 1)


def test_a_checkpoint_saved_where_the_run_goes_back_has_a_state_of_optimizers_to_load_under_fsdp2(tmp_path):
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", every_n_train_steps=100)
    recovery = SpikeRecovery(**SMALL)
    fit(tmp_path, recovery, model=harmed(), steps=105, saves=[saving])
    assert recovery.recoveries[0].step == 100
    (state,) = torch.load(tmp_path / "saved" / "step=100.ckpt", weights_only=True)["optimizer_states"]
    assert state["state"]


def test_after_nan_gradients_are_scaled_as_before(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    half = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    fit(tmp_path, SpikeRecovery(**SMALL), model=Model(bad=range(90, 105), shift=math.nan), plugins=[half])
    assert scaler.get_scale() == 2.0**10  # and not halved by each of the steps that were skipped


@pytest.mark.parametrize(
    ("average", "counter", "every"),
    [
        (pl.callbacks.EMAWeightAveraging, lambda average: average._average_model.n_averaged, 1),
        (
            lambda: pl.callbacks.StochasticWeightAveraging(RATE, swa_epoch_start=1),
            lambda average: average.n_averaged,
            20,
        ),
    ],
    ids=["ema", "swa"],
)
def test_an_average_of_weights_does_not_keep_what_diverged(average, counter, every, tmp_path):
    average, recovery = average(), SpikeRecovery(**SMALL)
    model = Model(shift=math.nan)
    trainer, _ = fit(tmp_path, average, recovery, model=model, max_epochs=7, limit_train_batches=20)
    assert int(counter(average)) * every <= trainer.global_step - recovery.recoveries[-1].step
    assert all(value.isfinite().all() for value in average._average_model.state_dict().values())
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_an_average_in_frozen_weights_of_the_module_goes_back_too_also_in_a_resumed_run(tmp_path):
    class Teaches(Model):
        def __init__(self):
            super().__init__(shift=math.nan)
            self.teacher, self.never = nn.Linear(8, 8).requires_grad_(False), nn.Linear(9, 9).requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.layers.parameters(), lr=RATE)

        def on_train_batch_end(self, *_):
            if self.trainer.global_step % 10 == 0:
                for mine, live in zip(self.teacher.parameters(), self.layers[0].parameters(), strict=True):
                    mine.lerp_(live.detach(), 0.5)

    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", every_n_train_steps=92)
    whole, model = fit(tmp_path, SpikeRecovery(**SMALL), model=Teaches(), saves=[saving])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    checkpoint = tmp_path / "saved" / "step=92.ckpt"
    resumed, _ = fit(tmp_path, SpikeRecovery(**SMALL), model=Teaches(), ckpt=checkpoint, saves=[saving])
    assert_same(resumed, whole)
    points = torch.load(checkpoint, weights_only=True)["callbacks"]["SpikeRecovery"]["points"]
    assert "weight/teacher.weight" in points[-1]["ranks"][0]
    assert "weight/never.weight" not in points[-1]["ranks"][0]  # what nothing writes into takes no memory
