"""The files of a window: written once, kept while a checkpoint needs them, and gone with the last one."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks.resumed_runs import MARKS, OPTIONS, ByStep, checkpoint, copied, files, fit, lines, saving, trainer
from harness.models import rows
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from pretrain_merge import ModelMerging
from pretrain_merge.resume import saved_block
from pretrain_merge.resume.sidecar import WindowFolder

pytestmark = MARKS


def test_a_state_asked_for_outside_a_save_pins_no_files(tmp_path):
    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                merging.state_dict()

    merging = ModelMerging(**OPTIONS)
    own = saving(tmp_path, save_top_k=1, monitor="step", mode="max")
    trainer(tmp_path, merging, Asks(), own, max_steps=15).fit(ByStep(), rows(64), rows(4))
    assert {int(name.split("-")[1]) for name in files(tmp_path) if "-" in name} == {10, 12, 14}


@pytest.mark.parametrize("store", ["device", "disk"])
def test_a_snapshot_is_written_once_and_has_its_name_once_it_is_on_the_disk(store, tmp_path, monkeypatch):
    synced, named, replace, sync = set(), [], Path.replace, os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        if target.name.startswith("snapshot-"):
            named.append(target.name)
            assert path.stat().st_ino in synced
            assert path.name.endswith(".tmp")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    fit(tmp_path, store=store, max_steps=9)  # three checkpoints, which share snapshots
    assert [int(name.split("-")[1]) for name in named] == [2, 4, 6, 8]


def test_an_open_block_is_written_once_per_step(tmp_path, monkeypatch):
    written = []
    save = saved_block.save
    monkeypatch.setattr(saved_block, "save", lambda *given: written.append(given[2]) or save(*given))
    fit(tmp_path, average="block", saving=saving(tmp_path, save_last=True), max_steps=9)
    assert written == [3, 6, 9]


def needed(folder: Path, path: Path) -> set[str]:
    state = torch.load(path, weights_only=True)["callbacks"]["ModelMerging[merge]"]["values"]["window"]["values"]
    return {held["file"]["name"] for held in state["snapshots"]}


def test_what_retained_checkpoints_need_is_kept_and_nothing_else(tmp_path):
    fit(tmp_path, saving=saving(tmp_path, save_top_k=2, monitor="step", mode="max"), max_steps=15)
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(kept) == 2
    expected = set().union(*(needed(tmp_path, path) for path in kept))
    assert set(files(tmp_path)) - {"checkpoints.json"} == expected


def test_a_run_that_was_moved_keeps_what_all_its_checkpoints_need(whole, tmp_path):
    fit(tmp_path / "before")
    folder = (tmp_path / "before").rename(tmp_path / "after")
    for step in (12, 9, 6):
        fit(folder, ckpt_path=checkpoint(folder, step))
        assert lines(folder) == lines(whole)


def test_a_checkpoint_under_another_name_keeps_its_snapshots_once_it_was_resumed_from(whole, tmp_path):
    folder, rarely = tmp_path / "run", {"every_n_train_steps": 6}
    fit(folder, saving=saving(folder, **rarely))
    renamed = checkpoint(folder, 6).rename(tmp_path / "elsewhere.ckpt")
    for _ in range(2):
        fit(folder, ckpt_path=renamed, saving=saving(folder, **rarely))
        assert lines(folder) == lines(whole)
    renamed.unlink()
    fit(folder, ckpt_path=checkpoint(folder, 12), saving=saving(folder, **rarely))
    assert not [name for name in files(folder) if name.startswith("snapshot-00000002")]


def test_a_checkpoint_deleted_by_hand_takes_its_snapshots_with_it_at_the_next_start(tmp_path):
    fit(tmp_path, max_steps=12)
    before = set(files(tmp_path))
    for step in (3, 6):
        checkpoint(tmp_path, step).unlink()
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 12), max_steps=13)
    gone = before - set(files(tmp_path))
    assert {int(name.split("-")[1]) for name in gone} == {2}


def there(path: str) -> str | None:
    return str(os.stat(path)) if Path(path).exists() else None


def test_an_overwritten_checkpoint_keeps_its_snapshots_until_the_new_one_is_there(tmp_path):
    own = WindowFolder(tmp_path / "window")
    (own.folder / "snapshot-00000001-00000000.safetensors").touch()
    last = tmp_path / "last.ckpt"
    own.register(str(last), ["snapshot-00000001-00000000.safetensors"])
    last.touch()
    own.prune([], there)
    own.close()
    again = WindowFolder(tmp_path / "window")  # killed while the second one was being written
    (again.folder / "snapshot-00000002-00000000.safetensors").touch()
    again.register(str(last), ["snapshot-00000002-00000000.safetensors"], there(str(last)))
    again.close()
    third = WindowFolder(tmp_path / "window")
    third.prune([], there)
    assert len(list(third.folder.glob("*.safetensors"))) == 2
    third.close()


def test_a_checkpoint_that_is_written_in_the_background_leaves_the_older_one_its_snapshots_until_then(tmp_path):
    may_write, last, missing = threading.Event(), tmp_path / "last.ckpt", []

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
            assert may_write.wait(30)
            super().save_checkpoint(*arguments, **options)

    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                may_write.set()
                trainer.save_checkpoint(last)
                while not last.exists():
                    time.sleep(0.01)
                may_write.clear()
            if trainer.global_step == 12:  # killed now, the run would go on from step 6
                trainer.save_checkpoint(last)
                trainer.save_checkpoint(tmp_path / "another.ckpt")
                missing.extend(needed(tmp_path, last) - set(files(tmp_path)))
                may_write.set()

    merging = ModelMerging(**OPTIONS)
    own = trainer(tmp_path, merging, max_steps=13, plugins=[AsyncCheckpointIO(Slow())])
    own.callbacks.insert(own.callbacks.index(merging) + 1, Asks())
    own.fit(ByStep(), rows(64), rows(4))
    assert missing == []
    assert torch.load(last, weights_only=True)["global_step"] == 12
    fit(tmp_path, ckpt_path=last)
    assert not [name for name in files(tmp_path) if name.startswith("snapshot-00000006")]


def test_a_damaged_list_of_needs_keeps_everything_and_says_so(tmp_path, caplog):
    fit(tmp_path, max_steps=6)
    (tmp_path / "window" / "checkpoints.json").write_text("{")
    before = set(files(tmp_path))
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 6), max_steps=15)
    assert before <= set(files(tmp_path))
    assert any("is damaged" in message for message in caplog.messages)


def test_what_a_killed_run_was_writing_is_gone_when_it_is_resumed(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    half = folder / "merged" / ".step-00000012-sma.12345.tmp"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    fit(folder, ckpt_path=checkpoint(folder, 6))
    assert not half.exists()
