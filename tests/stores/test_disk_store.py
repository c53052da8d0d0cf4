"""The disk store: files that anybody can read, and reads beside the writing thread."""

import json
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from stores.slots import finish, holds, path_of, read, weights, write

from pretrain_merge.stores.disk import DiskStore

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


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
