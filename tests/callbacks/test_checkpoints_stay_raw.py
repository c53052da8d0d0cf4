"""No checkpoint of Lightning's holds merged weights, whoever asks for it and when: read from the files."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import LIGHTNING_REMARKS, Recorder, Regression, Witness, rows, same_bits, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

from pretrain_merge import ModelMerging
from pretrain_merge.runtime import ranks

pytestmark = LIGHTNING_REMARKS


class Asks(Regression):
    """Asks for checkpoints in one of the places that run while merged weights are in the model."""

    def __init__(self, where: str, folder: Path, **arguments: Any) -> None:
        super().__init__()
        self.where, self.folder, self.arguments = where, folder, arguments
        self.waits: list[bool] = []

    def ask(self, where: str) -> None:
        if where == self.where:
            path = self.folder / f"asked-{self.trainer.global_step}.ckpt"
            self.trainer.save_checkpoint(path, **self.arguments)
            type(self).waited.append(not path.exists())

    waited = Witness()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.ask("validation_step")

    def on_validation_epoch_end(self) -> None:
        self.ask("on_validation_epoch_end")

    def evaluator(self, _: Any) -> dict[str, float]:
        self.ask("an evaluator")
        if self.where == "a thread of an evaluator":
            thread = threading.Thread(target=self.ask, args=(self.where,))
            thread.start()
            thread.join()
        return {}


@pytest.fixture
def asks(tmp_path):
    def build(where: str, **arguments: Any) -> Asks:
        return type("Module", (Asks,), {"waited": Witness()})(where, tmp_path, **arguments)

    return build


def fit(folder: Path, module: Any, *callbacks: Any, **options: Any) -> Recorder:
    """Merges at steps 4, 6 and 8, and no validation of the user's own."""
    recorder = Recorder()
    evaluators = {"own": module.evaluator} if isinstance(module, Asks) else {}
    merging = ModelMerging(window=2, every=2, views=["sma", "wma"], evaluators=evaluators)
    options = {"max_steps": 8, "check_val_every_n_epoch": 99} | options
    own = trainer(folder, recorder, merging, *callbacks, **options)
    own.fit(module, rows(), rows(8, seed=1))
    assert own.save_checkpoint.__name__ != "wait", "saving waits for nothing any more"
    return recorder


def read(folder: Path) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt"))}


def are_raw(checkpoints: dict[str, Any], recorder: Recorder) -> bool:
    return all(
        same_bits(dict(checkpoint["state_dict"]), recorder.run.weights[checkpoint["global_step"] - 1])
        for checkpoint in checkpoints.values()
    )


PLACES = ["validation_step", "on_validation_epoch_end", "an evaluator", "a thread of an evaluator"]


@pytest.mark.parametrize("where", PLACES)
def test_a_checkpoint_asked_for_while_a_merge_is_evaluated_waits_for_raw(where, asks, tmp_path):
    module = asks(where)
    recorder = fit(tmp_path, module)
    checkpoints = read(tmp_path)
    assert list(checkpoints) == ["asked-4.ckpt", "asked-6.ckpt", "asked-8.ckpt"]
    assert [checkpoint["global_step"] for checkpoint in checkpoints.values()] == [4, 6, 8]
    assert all(module.waited)
    assert are_raw(checkpoints, recorder)


def test_it_is_the_checkpoint_that_would_be_saved_after_the_step(asks, tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=6, filename="{step}")
    fit(tmp_path, asks("validation_step"), saving)
    checkpoints = read(tmp_path)
    asked, kept = checkpoints["asked-6.ckpt"], checkpoints["step=6.ckpt"]
    own = next(key for key in kept["callbacks"] if key.startswith("ModelCheckpoint"))
    del asked["callbacks"][own], kept["callbacks"][own]  # which names its own file
    states = [checkpoint["callbacks"].pop("ModelMerging[merge]")["values"] for checkpoint in (asked, kept)]
    assert [state.pop("last_merge") for state in states] == [4, 6]  # asked for before the merge of step 6 was recorded
    assert states[0] == states[1]
    assert same_bits(asked, kept)


def test_its_arguments_are_those_it_was_asked_for_with(asks, tmp_path):
    class Io(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            seen.append(storage_options)
            super().save_checkpoint(checkpoint, path)

    seen: list[Any] = []
    recorder = fit(tmp_path, asks("an evaluator", weights_only=True, storage_options="fast"), plugins=[Io()])
    assert seen == ["fast"] * 3
    assert all("optimizer_states" not in checkpoint for checkpoint in read(tmp_path).values())
    assert are_raw(read(tmp_path), recorder)


def test_raw_and_every_view_asking_for_one_file_write_it_once_and_say_so_once(asks, tmp_path, caplog):
    class Io(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            written.append(Path(path).name)

    written: list[str] = []
    module = asks("on_validation_epoch_end")
    fit(tmp_path, module, plugins=[Io()])
    assert len(module.waited) == 9
    assert written == ["asked-4.ckpt", "asked-6.ckpt", "asked-8.ckpt"]
    said = [message for message in caplog.messages if "a checkpoint was asked for" in message]
    assert said == [
        "step 4: a checkpoint was asked for while a merge is evaluated. It is written when the raw weights are back, "
        "and holds them; so is every further one."
    ]


def broken(folder: Path, module: Any, *callbacks: Any, before: Any = None) -> Recorder:
    """A run whose evaluation raises in the first merged pass, after it asked for a checkpoint."""
    recorder = Recorder()

    def breaks(own: Any) -> dict[str, float]:
        module.evaluator(own)
        if not same_bits(weights(own), recorder.run.weights[-1]):
            if before is not None:
                before()
            raise ArithmeticError("broken")
        return {}

    merging = ModelMerging(window=2, every=2, evaluators={"own": breaks})
    own = trainer(folder, recorder, merging, *callbacks, max_steps=8)
    with pytest.raises(ArithmeticError, match="broken"):
        own.fit(module, rows(), rows(8, seed=1))
    assert own.global_step == 4
    return recorder


def test_a_checkpoint_asked_for_before_an_exception_is_written_and_raw(asks, tmp_path):
    recorder = broken(tmp_path, asks("an evaluator"))
    assert list(read(tmp_path)) == ["asked-4.ckpt"]
    assert are_raw(read(tmp_path), recorder)


def test_one_of_several_ranks_that_fails_alone_does_not_wait_in_a_save_for_the_others(asks, tmp_path, monkeypatch):
    broken(tmp_path, asks("an evaluator"), before=lambda: monkeypatch.setattr(ranks, "num_ranks", lambda: 2))
    assert read(tmp_path) == {}


@pytest.mark.parametrize(
    "kind",
    [
        lambda folder: OnExceptionCheckpoint(folder / "kept"),
        lambda folder: ModelCheckpoint(folder / "kept", save_on_exception=True, save_top_k=0),
    ],
    ids=["OnExceptionCheckpoint", "save_on_exception"],
)
@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")
def test_a_checkpoint_saved_because_of_an_exception_is_raw(kind, asks, tmp_path):
    recorder = broken(tmp_path, asks("nowhere"), kind(tmp_path))
    assert len(read(tmp_path)) == 1
    assert are_raw(read(tmp_path), recorder)


def test_checkpoints_of_every_kind_in_one_run_are_raw(asks, tmp_path):
    kept = [
        ModelCheckpoint(tmp_path / "every", every_n_train_steps=1, save_top_k=-1, filename="{step}", save_last=True),
        ModelCheckpoint(tmp_path / "best", monitor="merge/sma/val_loss", filename="{step}", save_top_k=-1),
        ModelCheckpoint(
            tmp_path / "slim", monitor="val_loss", filename="{step}", save_weights_only=True, save_top_k=-1
        ),
    ]
    validating = {"check_val_every_n_epoch": None, "val_check_interval": 2}
    recorder = fit(tmp_path, asks("validation_step"), *kept, **validating, plugins=[AsyncCheckpointIO()])
    checkpoints = read(tmp_path)
    assert {path.parent.name for path in tmp_path.rglob("*.ckpt")} == {"every", "best", "slim", tmp_path.name}
    assert len(checkpoints) > 12
    assert are_raw(checkpoints, recorder)


def test_a_checkpoint_with_merged_weights_would_be_seen(asks, tmp_path):
    recorder = fit(tmp_path, asks("validation_step"))
    checkpoints = read(tmp_path)
    checkpoints["asked-4.ckpt"]["state_dict"]["net.0.bias"][0] += 1e-6
    assert not are_raw(checkpoints, recorder)
