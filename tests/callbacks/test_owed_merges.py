"""A merge that a signal or a checkpoint broke off is made when the run goes on: once, and before another step."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.resumed_runs import MARKS, STEPS, ByStep, checkpoint, fit, lines, saving
from harness.models import same_bits, weights
from lightning.pytorch.callbacks import ModelCheckpoint

pytestmark = MARKS


def test_a_merge_that_a_signal_broke_off_is_made_when_the_run_is_resumed(tmp_path):
    class Terminated(ByStep):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 12:
                signal.raise_signal(signal.SIGTERM)
            super().validation_step(batch, batch_idx)

    kept = saving(tmp_path, save_on_exception=True, every_n_train_steps=100)
    with pytest.raises(BaseException):  # noqa: B017 - Lightning's own, of no public class
        fit(tmp_path, module=Terminated(), saving=kept)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8]
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    fit(tmp_path, ckpt_path=path)
    fit(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_a_checkpoint_asked_for_inside_a_merge_is_resumed_without_a_step_twice(tmp_path):
    class Asks(ByStep):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 12:
                self.trainer.save_checkpoint(tmp_path / "asked.ckpt")
            super().validation_step(batch, batch_idx)

    fit(tmp_path, module=Asks())
    before = lines(tmp_path)
    fit(tmp_path, ckpt_path=tmp_path / "asked.ckpt")
    assert lines(tmp_path) == before


class Terminated(ByStep):
    """Gets SIGTERM in the validation of a merge point."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)
        super().validation_step(batch, batch_idx)


def terminated(folder: Path, step: int, **options: Any) -> None:
    with pytest.raises(SystemExit):
        fit(folder, module=Terminated(step), **options)


def test_a_second_signal_in_the_repeated_merge_leaves_it_owed_before_another_step(tmp_path):
    def kept() -> ModelCheckpoint:
        return saving(tmp_path, save_on_exception=True, every_n_train_steps=100)

    terminated(tmp_path, 12, saving=kept())
    for _ in range(2):
        (path,) = (tmp_path / "kept").glob("*.ckpt")
        assert path == checkpoint(tmp_path, 12)
        terminated(tmp_path, 12, saving=kept(), ckpt_path=path)
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 12))
    fit(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_a_merge_of_the_last_step_that_a_signal_broke_off_is_made_though_no_step_is_left(tmp_path):
    options = {"save": {"every": 4, "keep": 9, "at_end": True}, "store": "disk"}
    terminated(tmp_path, STEPS, saving=saving(tmp_path, every_n_train_steps=STEPS), **options)
    fit(tmp_path / "whole", **options)
    assert lines(tmp_path) == lines(tmp_path / "whole")[:-1]
    for _ in range(2):  # once more changes nothing
        raw, merging = fit(tmp_path, ckpt_path=checkpoint(tmp_path, STEPS), **options)
        assert lines(tmp_path) == lines(tmp_path / "whole")
        assert {path.name for path in (tmp_path / "merged").iterdir()} == {
            path.name for path in (tmp_path / "whole" / "merged").iterdir()
        }
    assert merging.last_record.step == STEPS
    assert same_bits(weights(raw), torch.load(checkpoint(tmp_path, STEPS), weights_only=True)["state_dict"])


def test_a_complete_run_that_was_killed_at_its_end_is_tidied_up_when_it_is_resumed(tmp_path, caplog):
    fit(tmp_path, store="disk", saving=saving(tmp_path, every_n_train_steps=8))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    left = [tmp_path / "window" / "lock", tmp_path / "window" / ".snapshot-00000014.1.tmp"]
    left += [tmp_path / "window" / "rank-0000" / name for name in ("lock", "slot-002.safetensors")]
    for path in left:
        path.touch()
    fit(tmp_path, store="disk", ckpt_path=checkpoint(tmp_path, STEPS), saving=saving(tmp_path, every_n_train_steps=8))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not any("without a merge" in message for message in caplog.messages)


def test_a_merge_that_another_signal_broke_off_is_made_at_once(tmp_path):
    asked: list[int] = []

    class Asked(ByStep):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 12 and not asked:
                signal.raise_signal(signal.SIGUSR1)
            super().validation_step(batch, batch_idx)

    def requeue(number: int, _: Any) -> None:
        asked.append(number)
        module.trainer.save_checkpoint(tmp_path / "requeue.ckpt")

    module, before = Asked(), signal.signal(signal.SIGUSR1, requeue)
    try:
        fit(tmp_path, module=module)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 12, 16]
    uninterrupted = lines(tmp_path)
    fit(tmp_path, ckpt_path=tmp_path / "requeue.ckpt")  # in which it was owed
    assert lines(tmp_path) == uninterrupted
