"""A store's folder is one run's alone while it lives, and clean when the next one comes."""

import errno
import fcntl
import subprocess
import sys
import zlib

import pytest
from stores.slots import holds, path_of, weights, write

from pretrain_merge.errors import CheckpointError
from pretrain_merge.stores.disk import DiskStore


@pytest.fixture
def other_run(folder):
    """Another process that holds the folder as a store does, until its input ends."""
    folder.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_folder_that_another_run_uses_is_refused_until_that_run_ends(folder, new_store, other_run):
    with pytest.raises(CheckpointError, match=r"in use by another process.*Set store_folder to .* of this run alone"):
        DiskStore(folder)
    other_run.kill()
    other_run.wait()
    write(new_store(), 0, weights(1))


def test_a_store_holds_its_folder_until_it_is_cleared(folder, new_store):
    probe = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'wb'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", probe, str(folder / "lock")]
    store = new_store()
    assert b"BlockingIOError" in subprocess.run(command, capture_output=True).stderr
    store.clear()
    assert subprocess.run(command).returncode == 0


def test_a_file_system_without_locks_is_no_obstacle(new_store, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fail)
    store, tensors = new_store(), weights(1)
    write(store, 0, tensors)
    assert holds(store, 0, tensors)


def test_what_a_killed_run_left_is_removed_and_nothing_else(folder, new_store):
    folder.mkdir()
    for name in (path_of(folder, 0).name, "slot-001.0-7f.tmp", "notes.txt"):
        (folder / name).write_bytes(b"x")
    new_store()
    assert sorted(folder.iterdir()) == [folder / "lock", folder / "notes.txt"]


def test_what_is_kept_of_a_slot_is_its_own_file_though_another_store_has_its_place(folder, new_store):
    first, second = new_store(), new_store()
    for store, seed in ((first, 1), (second, 2)):
        write(store, 0, weights(seed))
        store.save(0, folder, f"snapshot-0000000{seed}")  # waits for the disk
    kept = first.save(0, folder, "snapshot-00000003")
    assert zlib.crc32((folder / kept.name).read_bytes()) == kept.crc32
    first.clear()
    assert path_of(folder, 0).exists()
    assert holds(second, 0, weights(2))
