"""Which store is chosen, what is said of it, and what counts as free."""

import collections

import pytest
import torch

from pretrain_merge.errors import ConfigError
from pretrain_merge.runtime import ranks
from pretrain_merge.stores import choose
from pretrain_merge.stores.choose import choose_store
from pretrain_merge.stores.device import DeviceStore
from pretrain_merge.stores.disk import DiskStore
from pretrain_merge.stores.host import HostStore

GIB = 2**30
LIVE = [torch.zeros(3)]


@pytest.fixture
def free(monkeypatch):
    """Sets what is free on the device, in host memory and on disk, in GiB, and how many ranks share the host."""

    def set_free(device=80, host=512, disk=1000, num_ranks=1):
        usage = collections.namedtuple("usage", "free")(disk * GIB)
        monkeypatch.setattr(choose, "_free_device_bytes", lambda *_: device * GIB)
        monkeypatch.setattr(choose, "_free_host_bytes", lambda: host * GIB)
        monkeypatch.setattr(choose.shutil, "disk_usage", lambda _: usage)
        monkeypatch.setattr(choose, "_num_ranks_on_this_host", lambda: num_ranks)

    return set_free


@pytest.mark.parametrize(
    ("window", "expected", "why"),
    [
        (20, DeviceStore, "80.00 GiB are free there, and up to 25% of that is used"),
        (21, HostStore, "more than 25% of the 80.00 GiB free on the device"),
        (256, HostStore, "more than 25% of the 80.00 GiB free on the device"),
        (257, DiskStore, "more than 50% of the 512.00 GiB free in host memory"),
    ],
)
def test_auto_takes_the_fastest_store_with_room_and_says_why_in_one_line(free, tmp_path, window, expected, why):
    free()
    store, said = choose_store("auto", LIVE, window * GIB, tmp_path / "window", slot_bytes=0)
    assert type(store) is expected
    kind = {DeviceStore: "device", HostStore: "host", DiskStore: "disk"}[expected]
    assert said == f"window store: {kind} (the window takes {window}.00 GiB per rank; {why})."


def test_auto_without_a_folder_never_takes_the_disk(free):
    free(device=1, host=1)
    assert type(choose_store("auto", LIVE, 10 * GIB, None, slot_bytes=0)[0]) is HostStore


def test_ranks_of_one_host_share_its_memory(free, tmp_path):
    free(num_ranks=8)
    assert type(choose_store("auto", LIVE, 32 * GIB, tmp_path, slot_bytes=0)[0]) is HostStore
    assert type(choose_store("auto", LIVE, 33 * GIB, tmp_path, slot_bytes=0)[0]) is DiskStore


@pytest.mark.parametrize(("kind", "expected"), [("device", DeviceStore), ("host", HostStore), ("disk", DiskStore)])
def test_a_store_that_was_named_is_taken(free, tmp_path, kind, expected):
    free()
    store, said = choose_store(kind, LIVE, GIB, tmp_path, slot_bytes=0)
    assert type(store) is expected
    assert said == f"window store: {kind} (the window takes 1.00 GiB per rank; set by `store`)."


def test_a_store_that_was_named_and_has_no_room_is_taken_with_a_word(free):
    free(device=1)
    store, said = choose_store("device", LIVE, 2 * GIB, None, slot_bytes=0)
    assert type(store) is DeviceStore
    assert "although only 1.00 GiB are free there" in said


def test_the_disk_needs_a_folder():
    with pytest.raises(ConfigError, match=r"store: 'disk' needs a folder\. Set store_folder"):
        choose_store("disk", LIVE, GIB, None, slot_bytes=0)


def test_a_disk_without_room_for_all_ranks_is_refused_before_the_first_capture(free, tmp_path):
    free(disk=100, num_ranks=4)
    choose_store("disk", LIVE, 24 * GIB, tmp_path / "new" / "folder", slot_bytes=GIB)
    with pytest.raises(ConfigError) as caught:
        choose_store("disk", LIVE, 24 * GIB, tmp_path / "new" / "folder", slot_bytes=2 * GIB)
    message = str(caught.value)
    for part in ("store_folder: ", "25.00 GiB free per rank", "takes 24.00 GiB, with 2.00 GiB", "lower `window`"):
        assert part in message


def test_slots_that_will_be_overwritten_count_as_room(free, tmp_path):
    (tmp_path / "slot-000.safetensors").write_bytes(b"x" * 1000)
    free(disk=0)
    choose_store("disk", LIVE, 1000, tmp_path, slot_bytes=0)
    with pytest.raises(ConfigError):
        choose_store("disk", LIVE, 1001, tmp_path, slot_bytes=0)


def test_ranks_are_counted_by_the_name_of_their_host(monkeypatch):
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, "another", mine, "another", "another"])
    assert choose._num_ranks_on_this_host() == 2


def test_one_process_is_alone():
    assert choose._num_ranks_on_this_host() == 1


def test_free_memory_is_what_this_machine_says():
    in_use = torch.ones(2**20)
    assert 2**20 < choose._free_host_bytes() < 2**50
    assert choose._free_device_bytes(in_use.device, 4) == pytest.approx(choose._free_host_bytes() / 4, rel=0.5)


NO_LIMIT = {"/proc/meminfo": "MemTotal: 100 kB\nMemAvailable:   4096 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4096 * 1024),
        (  # version 2, the limit on a parent
            {
                "/proc/self/cgroup": "0::/job/step",
                "/sys/fs/cgroup/job/step/memory.max": "max",
                "/sys/fs/cgroup/job/step/memory.current": "10",
                "/sys/fs/cgroup/job/memory.max": "3000000",
                "/sys/fs/cgroup/job/memory.current": "2000000",
                "/sys/fs/cgroup/job/memory.stat": "anon 1000\ninactive_file 500000\n",
            },
            1_500_000,
        ),
        (  # version 1 in a container, which sees its own group as the root
            {
                "/proc/self/cgroup": "3:cpu,cpuacct:/docker/f00\n2:memory:/docker/f00\n0::/",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "400000",
                "/sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000\n",
            },
            700_000,
        ),
        (  # already beyond the limit
            {
                "/proc/self/cgroup": "0::/",
                "/sys/fs/cgroup/memory.max": "1000",
                "/sys/fs/cgroup/memory.current": "2000",
            },
            0,
        ),
        (  # a limit that is none
            {
                "/proc/self/cgroup": "1:memory:/",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "400000",
            },
            4096 * 1024,
        ),
    ],
    ids=["none", "v2", "v1", "beyond", "no limit"],
)
def test_a_container_or_batch_job_has_what_its_limit_leaves(monkeypatch, files, expected):
    files = NO_LIMIT | files
    monkeypatch.setattr(choose, "_lines", lambda path: files.get(str(path), "").splitlines())
    assert choose._free_host_bytes() == expected


def test_where_nothing_can_be_read_the_system_is_asked(monkeypatch):
    monkeypatch.setattr(choose, "_lines", lambda _: [])
    assert 2**20 < choose._free_host_bytes() < 2**50
