"""A disk that is full, breaks or cannot be written is an error that surfaces, never a wait for ever."""

import contextlib
import errno
import os
import resource
import time
import zlib
from pathlib import Path

import pytest
import torch
from harness.folders import read_only_folder
from safetensors.torch import load_file
from stores.slots import finish, holds, path_of, read, weights, write

from pretrain_merge.errors import CheckpointError
from pretrain_merge.stores.disk import DiskStore

REMEDY = "set store_folder to another"


def write_and_read(store, slot, tensors):
    write(store, slot, tensors)
    return read(store, slot, tensors)


@contextlib.contextmanager
def files_no_larger_than(num_bytes):
    """Writing beyond fails, as on a full disk; Python ignores the signal, so the error is EFBIG instead of ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("staging_bytes", [1024, 10**7], ids=["many buffers", "one buffer"])
def test_a_full_disk_is_an_error_of_the_capture_or_the_next_use_and_never_a_deadlock(folder, new_store, staging_bytes):
    store, tensors = new_store(staging_bytes=staging_bytes), weights(1, count=100_000)
    with files_no_larger_than(100_000):
        with pytest.raises(CheckpointError) as caught:
            write_and_read(store, 0, tensors)
        for part in (str(folder), os.strerror(errno.EFBIG), "Free space there", REMEDY):
            assert part in str(caught.value)
        assert isinstance(caught.value, OSError)
    assert list(folder.glob("slot*")) == []  # nothing half-written
    with contextlib.suppress(CheckpointError):  # said again where the capture itself had returned
        write(store, 1, tensors)
    write(store, 0, tensors)  # there is room again
    assert holds(store, 0, tensors)


def test_a_failed_capture_leaves_the_files_of_other_slots(folder, new_store):
    store, small = new_store(), weights(1)
    write(store, 0, small)
    finish(store, 1, small)
    large = weights(2, count=100_000)
    with files_no_larger_than(100_000), pytest.raises(CheckpointError):
        write_and_read(store, 0, large)
    assert holds(store, 1, small)
    assert torch.equal(load_file(path_of(folder, 1))["layer.0"], small["layer.0"])
    with pytest.raises(CheckpointError):  # however often it is asked for, the lost slot is no empty one
        store.merge_([torch.zeros(100_000)] * 3, [1, 0], [0.5, 0.5])
    with pytest.raises(CheckpointError):
        read(store, 0, large)


@pytest.mark.parametrize("use", ["capture", "merge", "read"])
def test_a_disk_that_breaks_after_the_capture_returned_surfaces_at_the_next_use(new_store, monkeypatch, use):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store, tensors = new_store(), weights(1)
    monkeypatch.setattr(os, "fsync" if use == "capture" else "replace", fail)
    monkeypatch.setattr(Path, "replace", fail)
    write(store, 0, tensors)
    while not store._writing.done():
        time.sleep(0.01)
    out = [torch.zeros(1000)] * 3
    action = {
        "capture": lambda: write(store, 1, tensors),
        "merge": lambda: store.merge_(out, [0], [1.0]),
        "read": lambda: store.read_(out, 0),
    }[use]
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        action()
    assert REMEDY in str(caught.value)


def test_clearing_after_a_failure_raises_nothing_and_leaves_nothing(folder, new_store):
    store, tensors = new_store(), weights(1, count=100_000)
    with files_no_larger_than(100_000):
        write(store, 0, tensors)
        store.clear()
    assert list(folder.iterdir()) == []


def test_a_capture_that_breaks_off_leaves_no_slot_and_the_store_usable(folder, new_store):
    store, tensors = new_store(staging_bytes=64), weights(1)
    broken = {"first": torch.ones(1000), "nowhere": torch.empty(1000, device="meta")}
    with pytest.raises(NotImplementedError):
        write(store, 0, broken)
    with pytest.raises(CheckpointError, match="broke off"):
        read(store, 0, broken)
    assert list(folder.glob("slot*")) == []
    for slot in range(3):
        write(store, slot, tensors)
    assert holds(store, 0, tensors)


def test_a_place_where_no_folder_can_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        DiskStore(tmp_path / "file" / "window")
    assert "Set store_folder" in str(caught.value)
    assert str(tmp_path / "file" / "window") in str(caught.value)


def test_a_read_only_folder_is_refused_at_once():
    with read_only_folder() as folder, pytest.raises(CheckpointError, match=r"Permission denied.*Set store_folder"):
        DiskStore(folder)


def test_a_link_that_cannot_take_its_name_leaves_the_slot_as_it_was(folder, new_store, monkeypatch):
    store, tensors = new_store(), weights(1)
    write(store, 0, tensors)
    renamed = Path.replace

    def fails_once(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", renamed)
        raise OSError(errno.EIO, "Input/output error")

    store.save(0, folder, "snapshot-00000001")
    before = path_of(folder, 0).read_bytes()
    monkeypatch.setattr(Path, "replace", fails_once)
    kept = store.save(0, folder, "snapshot-00000002")
    assert path_of(folder, 0).read_bytes() == before
    assert path_of(folder, 0).stat().st_ino != (folder / kept.name).stat().st_ino
    assert zlib.crc32((folder / kept.name).read_bytes()) == kept.crc32
    assert holds(store, 0, tensors)
