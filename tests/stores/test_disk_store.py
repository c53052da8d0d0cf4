"""The disk store: files that anybody can read, errors of its thread that surface, no capture that waits for ever."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain_merge.errors import CheckpointError
from pretrain_merge.stores.disk import DiskStore

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REMEDY = "set store_folder to another"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "window"


@pytest.fixture
def new_store(folder):
    """Makes stores in one folder, which are cleared at the end even where a write failed."""
    made = []

    def new(**options):
        made.append(DiskStore(folder, **options))
        return made[-1]

    yield new
    for store in made:
        store.clear()


def weights(value, *, count=1000, num_tensors=3):
    return {f"layer.{index}": torch.full((count,), float(value) + index) for index in range(num_tensors)}


def write(store, slot, tensors, dtype=None):
    store.write(slot, tensors, [dtype or tensor.dtype for tensor in tensors.values()])


def finish(store, slot, like):
    """Wait until a slot is on the disk: the next capture does."""
    write(store, slot, like)


def read(store, slot, like):
    out = [torch.full_like(tensor, float("nan")) for tensor in like.values()]
    store.read_(out, slot)
    return out


def write_and_read(store, slot, tensors):
    write(store, slot, tensors)
    return read(store, slot, tensors)


def holds(store, slot, tensors):
    return all(torch.equal(a, b) for a, b in zip(read(store, slot, tensors), tensors.values(), strict=True))


def path_of(folder, slot):
    return folder / f"slot-{slot:03d}.safetensors"


@contextlib.contextmanager
def files_no_larger_than(num_bytes):
    """Writing beyond fails, as on a full disk; Python ignores the signal, so the error is EFBIG instead of ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- files ---


def test_a_window_of_any_size_keeps_no_file_open(new_store):
    store = new_store()
    before = len(os.listdir("/proc/self/fd"))
    for slot in range(200):
        write(store, slot, weights(slot, count=10))
    out = list(weights(0, count=10).values())
    store.merge_(out, range(200), [1 / 200] * 200)
    assert out[0][0].item() == pytest.approx(99.5)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the one that is being written, perhaps


def test_a_slot_is_a_safetensors_file_with_every_tensor_as_it_was(folder, new_store):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(7, generator=generator).half(),
        "scalar": torch.tensor(-0.0),
        "empty": torch.zeros(0, 5, dtype=torch.float64),
        "brain": torch.randn(3, 1, 2, generator=generator).bfloat16(),
        "double": torch.randn(2, 3, generator=generator).double(),
        "gewichte.ß_重み": torch.randn(5, generator=generator),
    }
    store = new_store(staging_bytes=32)
    write(store, 3, tensors)
    finish(store, 0, tensors)
    with safe_open(path_of(folder, 3), framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            stored = file.get_tensor(name)
            assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape), name
            assert stored.view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist(), name


@settings(deadline=None, max_examples=40)
@given(
    tensors=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
        min_size=1,
        max_size=8,
    ),
    staging_bytes=st.sampled_from([0, 16, 17, 30, 64, 1000, 10**6]),
)
def test_any_list_of_tensors_is_a_valid_file_whose_tensors_are_aligned(tmp_path_factory, tensors, staging_bytes):
    folder = tmp_path_factory.mktemp("window")
    live = {str(i): torch.randn(shape).to(dtype) for i, (shape, dtype, _) in enumerate(tensors)}
    store = DiskStore(folder, staging_bytes=staging_bytes)
    store.write(0, live, [dtype for *_, dtype in tensors])
    store.write(1, live, [dtype for *_, dtype in tensors])
    stored = load_file(path_of(folder, 0))
    for index, (name, tensor) in enumerate(live.items()):
        assert torch.equal(stored[name], tensor.to(tensors[index][2]))
    data = path_of(folder, 0).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 64 == 0
    for entry in json.loads(data[8 : 8 + length]).values():
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[entry["dtype"]]
        assert entry["data_offsets"][0] % size == 0
        assert np.prod([*entry["shape"], size]) == np.diff(entry["data_offsets"])
    store.clear()


def test_a_smaller_slot_dtype_is_rounded_once_to_nearest_even(folder, new_store):
    tensors = {"weight": torch.tensor([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 3.0])}
    store = new_store()
    write(store, 0, tensors, torch.bfloat16)
    assert read(store, 0, tensors)[0].tolist() == [1.0, 1.015625, 3.0]


def test_the_checksum_of_a_slot_is_that_of_its_bytes_on_the_disk(folder, new_store):
    store, tensors = new_store(staging_bytes=64), weights(1)
    write(store, 0, tensors)
    finish(store, 1, tensors)
    assert store._slots[0].checksum == zlib.crc32(path_of(folder, 0).read_bytes())


def test_clear_leaves_no_file(folder, new_store):
    store = new_store()
    for slot in range(3):
        write(store, slot, weights(slot))
    store.clear()
    assert list(folder.iterdir()) == []


# --- reading beside writing ---


def test_a_merge_waits_for_the_page_cache_and_not_for_the_disk(new_store, monkeypatch):
    disk_is_done, syncing = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _: (syncing.set(), disk_is_done.wait(60)))
    store, tensors = new_store(), weights(5)
    write(store, 0, tensors)
    assert holds(store, 0, tensors)
    assert syncing.wait(60)
    assert not disk_is_done.is_set()
    out = [torch.zeros_like(tensor) for tensor in tensors.values()]
    store.merge_(out, [0, 0], [0.5, 0.25])
    assert torch.equal(out[0], torch.full((1000,), 3.75))
    next_capture = threading.Thread(target=write, args=(store, 1, tensors))
    next_capture.start()
    next_capture.join(0.3)
    assert next_capture.is_alive()  # two unsynced files at once would let memory fill with dirty pages
    disk_is_done.set()
    next_capture.join(60)
    assert not next_capture.is_alive()
    assert holds(store, 1, tensors)


def test_a_read_right_after_a_capture_waits_for_every_byte(new_store, monkeypatch):
    may_open, opened = threading.Event(), os.fdopen

    def slow_open(*args, **kwargs):
        assert may_open.wait(60)
        return opened(*args, **kwargs)

    store, tensors = new_store(), weights(2)
    monkeypatch.setattr(os, "fdopen", slow_open)
    write(store, 0, tensors)  # fits into the staging buffer, so it returns
    got = []
    reader = threading.Thread(target=lambda: got.extend(read(store, 0, tensors)))
    reader.start()
    reader.join(0.3)
    assert reader.is_alive()
    assert not got
    may_open.set()
    reader.join(60)
    assert torch.equal(got[2], tensors["layer.2"])


def test_the_live_tensors_may_change_as_soon_as_a_capture_returns(new_store, monkeypatch):
    may_open, opened = threading.Event(), os.fdopen
    store, tensors = new_store(), weights(2)
    monkeypatch.setattr(os, "fdopen", lambda *a, **k: (may_open.wait(60), opened(*a, **k))[1])
    write(store, 0, tensors)
    for tensor in tensors.values():
        tensor.fill_(-1.0)
    may_open.set()
    assert holds(store, 0, weights(2))


def test_a_slot_that_is_overwritten_stays_whole_for_whoever_still_reads_it(folder, new_store):
    store, old, new = new_store(staging_bytes=512), weights(1, count=100_000), weights(9, count=100_000)
    write(store, 0, old)
    held = store._mapped(0)
    write(store, 0, new)
    finish(store, 1, new)
    assert all(torch.equal(a, b) for a, b in zip(held, old.values(), strict=True))
    assert holds(store, 0, new)
    assert torch.equal(load_file(path_of(folder, 0))["layer.1"], new["layer.1"])


def test_a_model_of_many_buffers_needs_no_more_memory_than_two(new_store):
    tensors = weights(1, count=300_000)
    store = new_store(staging_bytes=4096)  # nearly 900 pieces through two buffers
    write(store, 0, tensors)
    assert sum(buffer.numel() for buffer in store._staging) == 4096
    assert holds(store, 0, tensors)


# --- failures ---


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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:  # permissions do not bind root
            os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError, match=r"Permission denied.*Set store_folder"):
                DiskStore(folder)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


# --- several runs ---


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
