"""A spike of the training loss is a break, in all that is kept, said and recorded; where there is none, nothing is."""

import json

import pytest
import torch
from harness.models import Recorder, Regression, differences, rows, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pretrain_merge import ModelMerging
from pretrain_merge.callbacks.training_loss import TrainingLoss

_SPIKE = range(64, 69)  # steps


class Spiking(Regression):
    """Its loss is scripted, and its gradients are those of the loss without the script."""

    def __init__(self, spike=_SPIKE):
        super().__init__()
        self._spike = spike

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        step = self.global_step + 1
        return loss - loss.detach() + 2.0 + 0.01 * (step * 7 % 11) + 3.0 * (step in self._spike)


def fit(folder, *callbacks, steps=90, spike=_SPIKE, ckpt_path=None):
    torch.manual_seed(7)
    own = trainer(folder, *callbacks, max_steps=steps)
    own.fit(Spiking(spike), rows(400), rows(4, seed=1), ckpt_path=ckpt_path)
    return own


def saving(folder, step):
    return ModelCheckpoint(folder, every_n_train_steps=step, save_top_k=-1)


def merging(**options):
    given = {"window": 8, "every": 10, "merge_every": 30, "forecast": None, "breaks": {"lr": False, "distrust": 25}}
    return ModelMerging(**given | options)


def records(folder):
    (path,) = folder.rglob("merges.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_without_a_spike_is_the_same_with_the_detector_on_and_off(tmp_path):
    runs = []
    for name, spikes in (("on", True), ("off", False)):
        recorder = Recorder()
        fit(tmp_path / name, merging(breaks={"spikes": spikes}), recorder, spike=())
        runs.append(recorder.run)
    assert differences(*runs) == []


def test_a_spike_is_in_every_record(tmp_path, caplog):
    callback = merging()
    own = fit(tmp_path, callback)
    first, *_, last = records(tmp_path)
    assert (first["step"], first["spikes"], first["since"], first["why_since"]) == (30, 0, 0, "")
    assert (last["step"], last["spikes"], last["since"]) == (90, 1, 70)
    assert last["why_since"].startswith("spike from step 64 on: the training loss rose to")
    assert last["recipes"]["sma"]["steps"] == [80, 90]
    assert own.callback_metrics["merge/spikes"] == 1
    assert callback.last_record.why_since == last["why_since"]
    assert "break at step 70 (spike from step 64 on" in caplog.text


def held_steps(checkpoint):
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["ModelMerging[merge]"]["values"]
    return [snapshot["progress"]["step"] for snapshot in state["window"]["values"]["snapshots"]]


@pytest.mark.parametrize(("distrust", "kept"), [(25, [10, 20, 30]), (None, [])])
def test_what_a_checkpoint_keeps_is_without_the_snapshots_that_a_spike_may_have_damaged(distrust, kept, tmp_path):
    own = fit(tmp_path, merging(breaks={"lr": False, "distrust": distrust}), saving(tmp_path, 70), steps=70)
    assert held_steps(own.checkpoint_callback.best_model_path) == kept


def test_a_spike_is_ignored_where_the_user_says_so(tmp_path):
    fit(tmp_path, merging(breaks={"spikes": False}))
    assert records(tmp_path)[-1]["spikes"] == records(tmp_path)[-1]["since"] == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You.re resuming")
@pytest.mark.parametrize("stop", [55, 65, 67])
def test_a_run_that_is_resumed_around_a_spike_sees_it_where_the_run_would_have(stop, tmp_path):
    folder = tmp_path / "first"
    before = fit(folder, merging(), saving(folder, stop), steps=stop)
    fit(folder, merging(), saving(folder, stop), ckpt_path=before.checkpoint_callback.best_model_path)
    fit(tmp_path / "whole", merging())
    resumed, whole = records(tmp_path / "first")[-1], records(tmp_path / "whole")[-1]
    for key in ("step", "since", "why_since", "spikes", "window", "recipes"):
        assert resumed[key] == whole[key], key


@pytest.mark.parametrize(
    ("outputs", "loss"),
    [
        ([torch.tensor(2.0)], 2.0),
        ([{"loss": torch.tensor(2.0), "logits": torch.zeros(3)}], 2.0),
        ([{"loss": torch.tensor(0.5)}, {"loss": torch.tensor(1.5)}], 2.0),
        ([torch.tensor([2.0], dtype=torch.bfloat16)], 2.0),
        ([None], None),
        ([{}], None),
        ([{"logits": torch.zeros(3)}], None),
        ([torch.zeros(3)], None),
        ([torch.tensor(3)], None),
        ([None, torch.tensor(2.0)], 2.0),
    ],
)
def test_the_loss_of_a_step_is_that_of_its_batches(outputs, loss):
    step = TrainingLoss()
    for output in outputs:
        step.add(output)
    assert step.take() == loss
    assert step.take() is None
