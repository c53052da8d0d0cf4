"""A spike of the training loss is a break, in all that is kept, said and recorded; where there is none, nothing is."""

import json
from pathlib import Path
from typing import Any

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


def saved(folder):
    (merged,) = folder.rglob("merged")
    about = {path.parent.name: json.loads(path.read_text()) for path in merged.glob("step-*/provenance.json")}
    return json.loads((merged / "best.json").read_text()), {name: item.get("withdrawn") for name, item in about.items()}


SAVING = {"every": 5, "merge_every": 5, "save": {"every": 10, "keep": 4, "best": "own/x"}}


def improving():
    """Each merge is better than those before."""
    scores = iter(range(1000, 0, -1))
    return {"evaluators": {"own": lambda _: {"x": float(next(scores))}}}


def test_a_merge_that_was_saved_before_its_spike_was_seen_is_withdrawn(tmp_path, caplog):
    callback = merging(**SAVING, **improving())
    fit(tmp_path, callback, steps=70)
    best, why = saved(tmp_path)
    reason = why["step-00000060-sma"]
    assert reason.startswith("spike from step 64 on: the training loss rose to")
    assert why["step-00000050-sma"] == reason
    assert why["step-00000030-sma"] is None
    # 64 - 25 = 39 is the last step that is trusted
    assert best["step"] <= 39
    assert best["withdrawn"]["step-00000060-sma"] == reason
    assert str(callback.best_model_path).endswith(best["folder"])
    assert "step-00000060-sma" in caplog.text


def test_a_record_says_which_saved_merges_were_taken_back(tmp_path):
    fit(tmp_path, merging(**SAVING, **improving()), steps=80)
    first, *_, last = records(tmp_path)
    assert first["withdrawn"] == {}
    assert last["withdrawn"]["step-00000060-sma"].startswith("spike from step 64 on")


SCORES = {"evaluators": {"own": lambda module: {"x": -float(module.trainer.global_step)}}}


@pytest.fixture(scope="module")
def withdrawing(tmp_path_factory):
    """A run that is not resumed, and takes back what it saved."""
    folder = tmp_path_factory.mktemp("withdrawing")
    fit(folder, merging(**SAVING, **SCORES), steps=80)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is not resumed."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, merging())
    return folder


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You.re resuming")
@pytest.mark.parametrize("stop", [60, 67, 70])
def test_a_run_that_is_resumed_around_a_spike_withdraws_what_the_run_would_have(stop, tmp_path, withdrawing):
    folder = tmp_path / "first"
    before = fit(folder, merging(**SAVING, **SCORES), saving(folder, stop), steps=75)  # it has seen the spike
    (path,) = Path(before.checkpoint_callback.dirpath).glob(f"*step={stop}.ckpt")
    fit(folder, merging(**SAVING, **SCORES), saving(folder, stop), ckpt_path=path, steps=80)
    (best, why), (best_of_whole, why_of_whole) = saved(folder), saved(withdrawing)
    assert why == why_of_whole
    assert best["folder"] == best_of_whole["folder"]
    # one that was the best alone was deleted by the run before, when it had seen the spike
    withdrawn, of_whole = (records(run)[-1]["withdrawn"] for run in (folder, withdrawing))
    assert withdrawn.items() <= of_whole.items()
    assert withdrawn.keys() == best["withdrawn"].keys() >= {name for name in why if why[name]} != set()


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
def test_a_run_that_is_resumed_around_a_spike_sees_it_where_the_run_would_have(stop, tmp_path, whole):
    before = fit(tmp_path, merging(), saving(tmp_path, stop), steps=stop)
    fit(tmp_path, merging(), saving(tmp_path, stop), ckpt_path=before.checkpoint_callback.best_model_path)
    resumed, expected = records(tmp_path)[-1], records(whole)[-1]
    for key in ("step", "since", "why_since", "spikes", "window", "recipes"):
        assert resumed[key] == expected[key], key


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


def test_a_loss_that_is_nobody_elses_is_kept_and_any_other_read():
    loss = torch.tensor(2.0)
    assert TrainingLoss().take_with({"loss": loss}, is_copy=True) is loss
    read = TrainingLoss().take_with({"loss": loss}, is_copy=False)
    loss.mul_(3.0)
    assert read == 2.0
    assert TrainingLoss().take_with({"loss": None}, is_copy=True) is None


def test_a_callback_that_writes_into_the_loss_after_us_is_noticed_at_the_next_step():
    step, taken = TrainingLoss(), []
    for number in (1.0, 2.0, 3.0):
        loss = torch.tensor(number)
        taken.append(step.take_with({"loss": loss}, is_copy=True))
        loss.mul_(100.0)
    assert taken[1:] == [2.0, 3.0]


def test_lightnings_loss_of_automatic_optimization_is_a_copy_that_nobody_wrote_into(tmp_path):
    given: list[tuple[Any, Any]] = []

    class Static(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.own_loss = super().training_step(batch, batch_idx)
            return self.own_loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            given.append((outputs["loss"], self.own_loss))

    trainer(tmp_path, max_steps=2).fit(Static(), rows(), rows(4, seed=1))
    assert len(given) == 2
    for ours, users in given:
        assert ours.untyped_storage().data_ptr() != users.untyped_storage().data_ptr()
        assert (ours._version, ours.requires_grad) == (0, False)
