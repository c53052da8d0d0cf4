"""How fast disks are just now, measured on a sample. This module knows files and a clock."""

import time
from collections.abc import Sequence
from pathlib import Path

from pretrain_merge.files.atomic import sync
from pretrain_merge.offline.files import Files, size_of
from pretrain_merge.offline.tensors import Source

_SAMPLE = 2**26  # bytes


def measure(sources: Sequence[Source], folder: Path) -> tuple[float | None, float | None]:
    """Bytes per second that the newest source gives and the folder takes, each by a sample."""
    file = sources[-1].files[0]
    num_bytes = min(_SAMPLE, size_of(file) or 0)
    if num_bytes < _SAMPLE // 16:  # a sample that small tells nothing
        return None, None
    # the newest is the one most likely in the page cache, so this is the rate at best
    with Files() as files:
        start = time.perf_counter()
        sample = files.read(file, 0, num_bytes)
        reading = num_bytes / (time.perf_counter() - start)
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".rate.tmp"
    try:
        start = time.perf_counter()
        probe.write_bytes(sample)
        sync(probe)
        writing = num_bytes / (time.perf_counter() - start)
    finally:
        probe.unlink(missing_ok=True)
    return reading, writing
