"""Links, pipes and folders that lie where this package writes or deletes: nothing beyond them is touched."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.cadence import Progress
from pretrain_merge.cli.results import write_result
from pretrain_merge.config import SaveConfig
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, folder_lock, folders
from pretrain_merge.forecast.calibration import shipped
from pretrain_merge.merged_models.merged import save_merged
from pretrain_merge.merged_models.retention import MergedModels
from pretrain_merge.offline import rates
from pretrain_merge.records import MergeRecord, Recipe, append_record, keep_records_until, plots
from pretrain_merge.resume.sidecar import WindowFolder
from pretrain_merge.stores.disk import DiskStore

RECORD = MergeRecord("merge", 4, 8, 0, 2, 0.1, {"val_loss": 1.0}, {"sma": {"val_loss": 0.9}})
SECRET = "not yours"


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    path.write_text(SECRET)
    yield path
    assert path.read_text() == SECRET
    assert os.listdir(path.parent) == ["victim"]


WRITERS = {
    "records": lambda path: append_record(path, RECORD),
    "a result": lambda path: write_result(path, "{}"),
    "a picture": lambda path: plots.save(plots.curves([RECORD]), path.with_suffix(".png")),
    "a calibration": lambda path: shipped().save(path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("kind", ["a link", "a dangling link", "a pipe"])
def test_nothing_is_written_through_what_lies_at_a_name(write, kind, victim, tmp_path):
    for path in (tmp_path / "target", tmp_path / "target.png"):
        if kind == "a pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(victim if kind == "a link" else victim.with_name("new"))
    with pytest.raises(CheckpointError, match="cannot"):
        write(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_records_are_cut_by_a_new_file_and_not_through_a_link(victim, tmp_path):
    path = tmp_path / "merges.jsonl"
    other = tmp_path / "elsewhere.jsonl"
    append_record(other, RECORD)
    path.symlink_to(other)
    with pytest.raises(CheckpointError, match="is a link"):
        keep_records_until(path, 2)
    assert other.read_text() == RECORD.to_json() + "\n"


@pytest.mark.parametrize("name", [".checkpoints.json.{pid}.tmp", ".merges.jsonl.tmp", ".target.{pid}.tmp"])
def test_a_link_at_a_temporary_name_is_not_opened(name, victim, tmp_path):
    (tmp_path / name.format(pid=os.getpid())).symlink_to(victim)
    atomic.write(tmp_path / "target", "ours")
    append_record(tmp_path / "merges.jsonl", RECORD)
    keep_records_until(tmp_path / "merges.jsonl", 0)
    window = WindowFolder(tmp_path)
    window.register("a.ckpt", ["x"])
    window.close()
    assert (tmp_path / "target").read_text() == "ours"


def planted(folder: Path, victim: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(victim.parent)
    for name in (".old.tmp", ".old.1.tmp", "slot-000.safetensors", "snapshot-00000004-0a1b2c3d.safetensors"):
        (victim.parent / name).mkdir()


@pytest.fixture
def spared(victim):
    names = [".old.tmp", ".old.1.tmp", "slot-000.safetensors", "snapshot-00000004-0a1b2c3d.safetensors"]
    yield victim
    for name in names:
        (victim.parent / name).rmdir()


FOLDERS = {
    "window": lambda folder: WindowFolder(folder),
    "slots": lambda folder: DiskStore(folder),
    "snapshots": lambda folder: observed().manifest(nn.Linear(2, 1), folder),
    "a merged model": lambda folder: save_merged(nn.Linear(2, 1), folder / "step-00000004-sma", {}),
}


def observed() -> RollingMerger:
    module, merger = nn.Linear(2, 1), RollingMerger(window=3, every=1, store="device")
    for step in (1, 2):
        merger.observe(module, step)
    return merger


@pytest.mark.parametrize("use", FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_of_ours_that_is_a_link_is_refused_with_what_to_do(use, spared, tmp_path):
    planted(tmp_path / "run" / "ours", spared)
    with pytest.raises(CheckpointError, match=r"is a link, to .*(Name the folder itself|remove the link)"):
        use(tmp_path / "run" / "ours")


def test_leftovers_are_deleted_in_a_folder_and_not_behind_a_link(spared, tmp_path):
    planted(tmp_path / "merged", spared)
    atomic.remove_leftovers(tmp_path / "merged")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / ".a.tmp").symlink_to(spared.parent)
    (tmp_path / "real" / ".b.tmp").mkdir()
    (tmp_path / "real" / ".b.tmp" / "half").symlink_to(spared)
    atomic.remove_leftovers(tmp_path / "real")
    assert list((tmp_path / "real").iterdir()) == []


def test_a_merged_model_that_was_replaced_by_a_link_is_not_followed_when_it_goes(victim, tmp_path):
    models = MergedModels(tmp_path / "merged", SaveConfig(every=1), {})
    for step in (1, 2):
        models.save_if_due(nn.Linear(1, 1), "sma", Progress(step), Recipe((step,), (1.0,)), {})
        folder = tmp_path / "merged" / f"step-{step:08d}-sma"
        if step == 1:
            folder.rename(tmp_path / "moved")
            folder.symlink_to(victim.parent)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["step-00000002-sma"]


def test_what_lies_at_a_models_name_is_moved_aside_also_where_it_is_a_dangling_link(tmp_path):
    (tmp_path / "merges.jsonl").symlink_to(tmp_path / "nowhere")
    assert folders.move_aside(tmp_path / "merges.jsonl") == tmp_path / "merges.1.jsonl"
    assert not (tmp_path / "nowhere").exists()


def test_a_second_name_of_another_file_is_not_overwritten_by_a_lock(victim, tmp_path):
    (tmp_path / "window").mkdir()
    os.link(victim, tmp_path / "window" / "lock")
    folder_lock.claim(tmp_path / "window", remedy="")
    folder_lock.release(tmp_path / "window")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_users_umask_gives(mask, tmp_path):
    before = os.umask(mask)
    try:
        save_merged(nn.Linear(1, 1), tmp_path / "model", {})
        write_result(tmp_path / "result", "{}")
        append_record(tmp_path / "merges.jsonl", RECORD)
        save_file({"w": torch.zeros(1)}, tmp_path / "theirs")
    finally:
        os.umask(before)
    ours = [*(tmp_path / "model").iterdir(), tmp_path / "result", tmp_path / "merges.jsonl"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in ours} == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "theirs").stat().st_mode) == 0o600  # P38


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "a\nb", "[x]*?", " ", "-rf", "\udc80"])
def test_a_name_that_a_file_system_takes_is_written(name, tmp_path):
    atomic.write(tmp_path / name, "ours")
    assert (tmp_path / name).read_text() == "ours"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_name_that_it_does_not_take_is_an_error_of_ours(tmp_path):
    for name in ("n" * 300, "a\0b"):
        with pytest.raises((CheckpointError, ValueError)):
            write_result(tmp_path / name, "{}")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_whole_or_as_it_was_whatever_breaks_the_writing_off(error, tmp_path):
    def fail() -> None:
        with atomic.draft(tmp_path / "a") as draft:
            draft.file.write(b"half")
            raise error

    atomic.write(tmp_path / "a", "before")
    with pytest.raises(error):
        fail()
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_measuring_a_disk_writes_through_no_link(tmp_path, victim):
    sample, folder = tmp_path / "sample", tmp_path / "out"
    sample.write_bytes(bytes(2**22))  # shorter ones tell nothing, and nothing is written
    folder.mkdir()
    (folder / ".rate.tmp").symlink_to(victim)
    reading, writing = rates.measure([SimpleNamespace(files=(str(sample),))], folder)
    assert reading > 0
    assert writing > 0
