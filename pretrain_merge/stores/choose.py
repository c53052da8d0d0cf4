"""Which store a window goes to: the one that was named, or the fastest with room to spare.

This module knows sizes and what is free on this host. It allocates nothing.
"""

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain_merge.errors import ConfigError
from pretrain_merge.runtime import ranks
from pretrain_merge.stores.budget import DEVICE_SHARE, HOST_SHARE, fastest_with_room
from pretrain_merge.stores.device import DeviceStore
from pretrain_merge.stores.disk import DiskStore
from pretrain_merge.stores.host import HostStore
from pretrain_merge.stores.store import Store


def choose_store(
    kind: str, live: Sequence[Tensor], num_bytes: int, folder: Path | None, *, slot_bytes: int
) -> tuple[Store, str]:
    """The store for a window, and one line that says which and why. Every rank must call it at the same point.

    Args:
        kind: "device", "host", "disk", or "auto".
        live: The live tensors; the device of the first decides what is free.
        num_bytes: Bytes of the whole window on this rank.
        folder: Where a disk store writes; None if there is none.
        slot_bytes: Bytes of one slot; on a disk its old file stays until the new one is whole.

    Raises:
        ConfigError: "disk" without a folder, or without room in it.
    """
    # ranks on one host fill the same memory and disk
    device, sharing = live[0].device, _num_ranks_on_this_host()
    free = {"device": _free_device_bytes(device, sharing), "host": _free_host_bytes() // sharing}
    needed = f"the window takes {_gib(num_bytes)} per rank"
    if kind == "auto":
        kind, why = _chosen(num_bytes, free["device"], free["host"], has_disk=folder is not None)
    elif kind in free and num_bytes > free[kind]:
        why = f"set by `store`, although only {_gib(free[kind])} are free there"
    else:
        why = "set by `store`"
    return _made(kind, folder, num_bytes, slot_bytes, sharing), f"window store: {kind} ({needed}; {why})."


def likely_store(kind: str, live: Sequence[Tensor], num_bytes: int) -> str:
    """Where a window would go by what is free now, with a folder to fall back to. Every rank must call it together.

    At the first snapshot, when the choice is made, gradients and optimizer state have taken their part of that.
    """
    if kind != "auto":
        return kind
    sharing = _num_ranks_on_this_host()
    free_device = _free_device_bytes(live[0].device, sharing)
    return fastest_with_room(num_bytes, free_device=free_device, free_host=_free_host_bytes() // sharing)


def _chosen(num_bytes: int, free_device: int, free_host: int, *, has_disk: bool) -> tuple[str, str]:
    kind = fastest_with_room(num_bytes, free_device=free_device, free_host=free_host, has_disk=has_disk)
    return kind, {
        "device": f"{_gib(free_device)} are free there, and up to {DEVICE_SHARE:.0%} of that is used",
        "host": f"more than {DEVICE_SHARE:.0%} of the {_gib(free_device)} free on the device",
        "disk": f"more than {HOST_SHARE:.0%} of the {_gib(free_host)} free in host memory",
    }[kind]


def _made(kind: str, folder: Path | None, num_bytes: int, slot_bytes: int, num_sharing: int) -> Store:
    if kind == "device":
        return DeviceStore()
    if kind == "host":
        return HostStore()
    if folder is None:
        raise ConfigError("store: 'disk' needs a folder. Set store_folder to one on local storage.")
    # the folder itself may not exist yet
    there = next(path for path in (folder, *folder.parents) if path.exists())
    old_slots = sum(path.stat().st_size for path in folder.glob("slot-*.safetensors"))  # will be overwritten
    room = shutil.disk_usage(there).free // num_sharing + old_slots
    if num_bytes + slot_bytes > room:
        raise ConfigError(
            f"store_folder: {folder} has {_gib(room)} free per rank, and the window takes {_gib(num_bytes)}, with "
            f"{_gib(slot_bytes)} for the slot that is being written. Free space there, set store_folder to another "
            f"local disk, or lower `window`."
        )
    return DiskStore(folder)


def _num_ranks_on_this_host() -> int:
    """Ranks that share this host's memory and disk, this one included."""
    return ranks.gather(socket.gethostname()).count(socket.gethostname())


def _free_device_bytes(device: torch.device, num_sharing: int) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_bytes() // num_sharing


def _free_host_bytes() -> int:
    available = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    if not available:  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([*available, *_free_bytes_of_control_groups()])


def _free_bytes_of_control_groups() -> Iterator[int]:
    """What each limit on this process (container, batch job) leaves; the host itself may have far more free."""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a container may see its own group as the root
            numbers = [word for name in (limit, used) for word in _lines(folder / name)]
            if len(numbers) == 2 and all(word.isdigit() for word in numbers):  # else "max", or no such file
                yield max(0, int(numbers[0]) - int(numbers[1]) + _droppable_cache(folder))
            if folder == root:
                break


def _droppable_cache(group: Path) -> int:
    fields = dict(line.split() for line in _lines(group / "memory.stat"))
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
