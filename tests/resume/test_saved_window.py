"""Windows as durable files: their snapshots are flushed together, and each is written once."""

import os

import pytest
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.errors import CheckpointError


def saved(merger, model, folder, monkeypatch):
    """The manifest, and how often files and folders were flushed for it."""
    flushed = []
    fsync = os.fsync

    def counted(descriptor):
        flushed.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", counted)
        manifest = merger.manifest(model, folder)
    return manifest, flushed.count(False), flushed.count(True)


def window_of(model, size, **options):
    merger = RollingMerger(window=size, every=1, **options)
    for step in range(1, size + 1):
        merger.observe(model, step)
    return merger


@pytest.mark.parametrize("store", ["device", "disk"])
def test_a_window_is_flushed_file_by_file_and_its_folder_once(tmp_path, monkeypatch, store):
    model = nn.Linear(3, 1)
    folder = tmp_path / "window"
    merger = window_of(model, 30, store=store, store_folder=str(tmp_path / "slots"))
    manifest, num_files, num_folders = saved(merger, model, folder, monkeypatch)
    # slots of a disk are flushed as they are written, the last one perhaps meanwhile
    assert num_files == 30 if store == "device" else num_files <= 1
    assert num_folders == 1
    assert sorted(file.name for file in manifest.files) == sorted(path.name for path in folder.iterdir())
    merger.observe(model, 31)
    _, num_files, num_folders = saved(merger, model, folder, monkeypatch)
    assert num_files <= 1
    assert num_folders == 1
    merger.close()


def test_a_window_whose_flush_failed_is_written_again(tmp_path, monkeypatch):
    model = nn.Linear(3, 1)
    merger = window_of(model, 5)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"cannot write the window to .*window_folder"):
            merger.manifest(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    manifest = merger.manifest(model, tmp_path)
    assert all((tmp_path / file.name).is_file() for file in manifest.files)
