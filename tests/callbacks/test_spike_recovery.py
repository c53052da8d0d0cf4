"""A diverged run goes back in memory, changes what lasts, and goes on; until then nothing is changed."""

import json
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from callbacks.recovering_runs import BAD, HARMED, RATE, SMALL, Model, assert_same, fit, harmed
from torch import nn

from pretrain_merge import ModelMerging, SpikeRecovery
from pretrain_merge.errors import CheckpointError, ConfigError, DivergenceError

# a resumed run saves into the folder that it came from
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def test_a_diverged_run_goes_back_before_the_damage_and_trains_on(tmp_path):
    recovery = SpikeRecovery(**SMALL)
    _, model = fit(tmp_path, recovery, model=harmed())
    (done,) = recovery.recoveries
    assert HARMED < done.onset <= HARMED + 5
    assert done.onset - SMALL["distrust"] - SMALL["every"] < done.back_to[0] <= done.onset - SMALL["distrust"]
    assert torch.equal(model.weights[done.step], model.weights[done.back_to[0]])  # before the batch of that index
    assert max(model.losses[-10:]) < 2 * max(model.losses[HARMED - 10 : HARMED])
    (line,) = (tmp_path / "recoveries.jsonl").read_text().splitlines()
    assert json.loads(line)["back_to"] == list(done.back_to)
    assert json.loads(line)["cause"] is None


def test_restart_points_from_before_the_damage_outlast_a_spike_that_is_confirmed_late(tmp_path):
    recovery = SpikeRecovery(**SMALL | {"confirm": 30})
    fit(tmp_path, recovery, model=harmed(92))
    (done,) = recovery.recoveries
    assert done.step > done.onset + 30
    assert done.back_to[0] <= done.onset - SMALL["distrust"]


@pytest.mark.parametrize("steps", [20, 40])
def test_files_of_a_killed_process_are_gone_even_where_nothing_is_left_to_train(steps, tmp_path):
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=20)
    fit(tmp_path, SpikeRecovery(**SMALL), steps=20, saves=[saving])
    point = tmp_path / "restart_points" / "rank-0" / "point-00000015.safetensors"
    point.parent.mkdir(parents=True)
    leftovers = [point, *(tmp_path / f".{name}.0123abcd.tmp" for name in ("recoveries.jsonl", "merges.config.yaml"))]
    for path in leftovers:
        path.write_text("half")
    merging = ModelMerging(window=2, every=5, validate=False, batch_norm="live", forecast=None)
    recovery = SpikeRecovery(**SMALL, store="disk")
    fit(tmp_path, recovery, *[merging] * (steps > 20), steps=steps, ckpt=saving.best_model_path, saves=[saving])
    assert [path for path in leftovers if path.exists()] == leftovers[2:] * (steps == 20)


def test_without_a_divergence_training_is_bit_for_bit_that_of_a_run_without(tmp_path):
    plain, _ = fit(tmp_path / "a", model=Model(bad=()), steps=80)
    watched, model = fit(tmp_path / "b", SpikeRecovery(**SMALL), model=Model(bad=()), steps=80)
    assert_same(watched, plain)
    assert model.rates == [RATE] * 80
    assert not (tmp_path / "b" / "recoveries.jsonl").exists()


def test_a_spike_that_passes_by_itself_costs_nothing(tmp_path):
    bad = range(90, 93)
    plain, _ = fit(tmp_path / "a", model=Model(bad=bad, shift=30.0))
    watched, _ = fit(tmp_path / "b", SpikeRecovery(**SMALL), model=Model(bad=bad, shift=30.0))
    assert_same(watched, plain)


def test_weights_go_deep_at_a_lower_rate_and_data_to_the_newest_weights_from_before_at_the_rate_of_before(tmp_path):
    late = range(170, 190)
    recovery = SpikeRecovery(**SMALL)
    _, model = fit(tmp_path, recovery, model=Model(bad=late, harmed=(HARMED, 240)), steps=290)
    of_weights, of_data, again = recovery.recoveries
    assert [item.cause for item in recovery.recoveries] == [None, "data", None]
    assert [item.lr_factor for item in recovery.recoveries] == [0.5, 0.5, 0.25]
    assert of_weights.back_to[0] <= of_weights.onset - SMALL["distrust"]
    assert of_data.onset - SMALL["every"] <= of_data.back_to[0] < of_data.onset
    assert again.back_to[0] <= again.onset - SMALL["distrust"]
    assert model.rates[late[0] - 1] == model.rates[239] == RATE / 2
    assert model.rates[-1] == RATE / 4


def test_weights_of_before_do_not_learn_from_data_that_are_bad_still(tmp_path):
    bad = range(150, 186)  # beyond the step at which it goes back
    recovery = SpikeRecovery(**SMALL | {"distrust": 60})
    _, model = fit(tmp_path, recovery, model=Model(bad=bad), steps=220)
    (done,) = recovery.recoveries
    assert done.step < bad[-1] < done.resumed <= bad[-1] + 11
    assert torch.equal(model.weights[done.resumed], model.weights[done.back_to[0]])
    ramp = [rate / RATE for rate in model.rates[done.resumed :]]
    expected = [0.0] * 4 + [(n + 1) / SMALL["rewarm"] for n in range(4, SMALL["rewarm"])]
    assert ramp[: SMALL["rewarm"]] == pytest.approx(expected)
    assert all(torch.equal(weights, model.weights[done.step]) for weights in model.weights[done.step :][:5])
    line = json.loads((tmp_path / "recoveries.jsonl").read_text())
    assert (line["resumed"], line["cause"]) == (done.resumed, "data")


def test_the_cause_is_told_also_by_weights_from_long_before(tmp_path):
    recovery = SpikeRecovery(**SMALL | {"distrust": 150, "every": 50})
    fit(tmp_path, recovery, model=Model(bad=range(390, 430)), steps=440)
    (done,) = recovery.recoveries  # more steps lie between than a loss is judged by
    assert (done.cause, done.back_to) == ("data", (350,))


def test_the_cause_is_told_however_few_steps_are_distrusted(tmp_path):
    recovery = SpikeRecovery(**SMALL | {"distrust": 5})
    fit(tmp_path, recovery)
    assert [item.cause for item in recovery.recoveries] == ["data"]


def test_weights_between_those_gone_back_to_and_the_damage_are_never_trusted(tmp_path):
    recovery = SpikeRecovery(**SMALL)
    fit(tmp_path, recovery, model=harmed(HARMED, 112))
    first, second = recovery.recoveries
    assert second.onset - SMALL["distrust"] > first.onset  # they would be old enough by now
    assert second.back_to == first.back_to


@pytest.mark.parametrize(
    ("make", "options"),
    [(Model, {}), (harmed, {}), (Model, {"optimizer": "newest", "store": "disk", "weights": "merge", "keep": 2})],
)
def test_a_run_resumed_in_the_middle_of_a_recovery_ends_with_the_same_bytes(tmp_path, make, options):
    whole, _ = fit(tmp_path / "a", SpikeRecovery(**SMALL | options), model=make())
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=5, save_top_k=-1)
    before = SpikeRecovery(**SMALL | options)
    fit(tmp_path / "b", before, steps=130, model=make(), saves=[saving])
    (done,) = before.recoveries
    # before the spike is confirmed, before its cause is told, and after that
    for step in (done.step - 10, done.step, done.step + 5):
        after = SpikeRecovery(**SMALL | options)
        path = next((tmp_path / "saved").glob(f"*step={step}.ckpt"))
        resumed, model = fit(tmp_path / "b", after, model=make(), ckpt=path, saves=[saving])
        assert_same(resumed, whole)
        assert after.recoveries == (done,)
        assert len(model.losses) == 140 - step
    assert not list(tmp_path.rglob("point-*"))  # files of restart points go with the run


def test_the_state_of_an_earlier_version_which_told_no_cause_goes_on(tmp_path):
    whole, _ = fit(tmp_path / "a", SpikeRecovery(**SMALL), model=harmed())
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", every_n_train_steps=105)
    fit(tmp_path / "b", SpikeRecovery(**SMALL), model=harmed(), steps=110, saves=[saving])
    path = tmp_path / "saved" / "step=105.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (done,) = checkpoint["callbacks"]["SpikeRecovery"]["recoveries"]
    assert done.pop("cause", "") is None
    torch.save(checkpoint, path)
    resumed, _ = fit(tmp_path / "b", SpikeRecovery(**SMALL), model=harmed(), ckpt=path, saves=[saving])
    assert_same(resumed, whole)


def test_the_lower_rate_lasts_whatever_sets_the_rate_between_steps(tmp_path):
    class ByHand(Model):
        def on_train_batch_start(self, batch, index):
            self.optimizers().param_groups[0]["lr"] = RATE * 0.999**self.trainer.global_step

    recovery = SpikeRecovery(**SMALL)
    trainer, model = fit(tmp_path, recovery, model=ByHand(bad=(), harmed=(HARMED,)))
    (done,) = recovery.recoveries
    for step, rate in enumerate(model.rates):
        at = step - done.step + 1
        factor = 1.0 if at < 1 else 0.0 if at < 5 else 0.5 * min(1.0, at / SMALL["rewarm"])
        assert rate == pytest.approx(RATE * 0.999**step * factor)
    assert trainer.optimizers[0].param_groups[0]["lr"] == RATE * 0.999**139  # between steps it is the user's


def test_gradients_are_clipped_from_then_on_and_not_before(tmp_path):
    recovery = SpikeRecovery(**SMALL, clip=0.1)
    _, model = fit(tmp_path, recovery)
    step = recovery.recoveries[0].step
    assert max(model.norms[: BAD[0]]) > 0.2
    assert max(model.norms[step:]) <= 0.1 + 1e-6


def test_a_raw_optimizer_in_a_manual_loop_is_clipped_and_slowed_too(tmp_path):
    class Manual(Model):
        automatic_optimization = False

        @property
        def step(self):  # Lightning counts no step of an optimizer that is stepped by hand
            return len(self.losses)

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.trainer.optimizers[0].zero_grad()
            loss.backward()
            self.trainer.optimizers[0].step()
            return loss

    recovery = SpikeRecovery(**SMALL, clip=0.1)
    _, model = fit(tmp_path, recovery, model=Manual(bad=(), harmed=(HARMED,)), max_epochs=1, limit_train_batches=140)
    (done,) = recovery.recoveries
    assert max(model.norms[done.step :]) <= 0.1 + 1e-6
    assert model.rates[-1] == RATE / 2


def test_nan_is_a_divergence_and_after_the_last_attempt_there_is_an_error(tmp_path):
    model = Model(bad=range(90, 1000), shift=math.nan)
    recovery = SpikeRecovery(**SMALL, attempts=2)
    with pytest.raises(DivergenceError, match=r"2 of 2 attempts.* the data were to blame.* raise attempts, and resume"):
        fit(tmp_path, recovery, model=model, steps=400)
    assert [(item.cause, item.lr_factor) for item in recovery.recoveries] == [("data", 1.0)] * 2
    assert all(item.resumed - item.step <= SMALL["distrust"] for item in recovery.recoveries)
    assert len((tmp_path / "recoveries.jsonl").read_text().splitlines()) == 2


def test_each_attempt_reaches_the_loggers_and_the_log(tmp_path, caplog):
    logger = pl.loggers.CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, SpikeRecovery(**SMALL), logger=logger, log_every_n_steps=1000)
    metrics = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "recovery/attempt" in metrics
    assert "Attempt 1 of 3: back to the weights of step" in caplog.text
    assert "keeps up to 3 restart points" in caplog.text


def test_a_marked_switch_to_harder_data_is_not_a_divergence(tmp_path):
    class Marks(pl.Callback):
        def __init__(self, at):
            self.at = at

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == self.at:
                recovery.mark_phase("harder")

    harder = range(70, 1000)
    for at, is_taken_back in ((1000, True), (70, False)):
        recovery = SpikeRecovery(**SMALL)
        fit(tmp_path / str(at), Marks(at), recovery, model=Model(bad=harder, shift=30.0), steps=110)
        assert bool(recovery.recoveries) is is_taken_back


def test_a_run_resumed_from_a_checkpoint_without_our_state_counts_its_own_steps(tmp_path):
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=20)
    fit(tmp_path, steps=20, saves=[saving])
    recovery = SpikeRecovery(**SMALL)
    fit(tmp_path, recovery, ckpt=saving.best_model_path, saves=[saving])
    (done,) = recovery.recoveries
    assert BAD[0] < done.onset <= BAD[0] + 5


def test_merges_do_not_reach_across_a_recovery(tmp_path):
    breaks = {"lr": False, "spikes": False}  # neither the lower rate nor the spike itself parts them here
    merging = ModelMerging(window=4, every=5, validate=False, batch_norm="live", forecast=None, breaks=breaks)
    recovery = SpikeRecovery(**SMALL)
    fit(tmp_path, merging, recovery, model=harmed())
    (done,) = recovery.recoveries
    records = [json.loads(line) for line in (tmp_path / "merges.jsonl").read_text().splitlines()]
    across = [
        steps
        for record in records
        for steps in (recipe["steps"] for recipe in record["recipes"].values())
        if steps[0] <= done.step < steps[-1]
    ]
    assert not across
    assert records[-1]["recipes"]  # and it merges again
    assert records[-1]["lr"] == [RATE / 2]  # at the rate that its steps really used


def test_a_checkpoint_of_another_model_is_refused_with_the_way_out(tmp_path):
    class Wider(Model):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = self.state_dict()
            checkpoint["optimizer_states"] = []

    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=20)
    fit(tmp_path, SpikeRecovery(**SMALL), steps=20, saves=[saving])
    wider = Wider()
    wider.layers[3] = nn.Linear(8, 5)
    with pytest.raises(CheckpointError, match=r"is of another model.*in_checkpoints=False"):
        fit(tmp_path, SpikeRecovery(**SMALL), model=wider, ckpt=saving.best_model_path, saves=[saving])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr: 0.0 is not a factor"),
        ({"lr": math.nan}, "lr: nan"),
        ({"clip": -1}, "clip: -1 is not a norm"),
        ({"lr": 1.0, "clip": None}, "change nothing that lasts"),
        ({"optimizer": "old"}, "optimizer: 'old' is not one of fresh, newest"),
        ({"weights": "merge", "keep": 1}, "keep: 1"),
        ({"attempts": 0}, "attempts: 0"),
        ({"store_folder": "points"}, "store_folder: 'points' is for store: disk"),
        ({"distrusts": 3}, "did you mean 'distrust'"),
    ],
)
def test_impossible_keys_are_refused_by_name(options, words):
    with pytest.raises(ConfigError, match=words):
        SpikeRecovery(**options)


def test_steps_without_a_loss_are_refused(tmp_path):
    class Silent(Model):
        automatic_optimization = False

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.manual_backward(loss)
            self.optimizers().step()

    with pytest.raises(ConfigError, match="returned no loss"):
        fit(tmp_path, SpikeRecovery(), model=Silent(), steps=3)
