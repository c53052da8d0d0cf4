"""How fast disks are just now, measured on a sample, and how large this process is. It knows files and a clock."""

import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain_merge.errors import CheckpointError
from pretrain_merge.offline.files import Files, size_of
from pretrain_merge.offline.tensors import Source

_SAMPLE = 2**26  # bytes


def measure(sources: Sequence[Source], folder: Path) -> tuple[float | None, float | None]:
    """Bytes per second that the newest source gives and the folder takes, each by a sample.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    file = sources[-1].files[0]
    num_bytes = min(_SAMPLE, size_of(file) or 0)
    if num_bytes < _SAMPLE // 16:  # a sample that small tells nothing
        return None, None
    # the newest is the one most likely in the page cache, so this is the rate at best
    with Files() as files:
        start = time.perf_counter()
        sample = files.read(file, 0, num_bytes)
        reading = num_bytes / (time.perf_counter() - start)
    # one that is there: a plan makes no folder
    folder = next(place for place in (folder, *folder.parents) if place.is_dir())
    try:
        # under a name that nobody knows before: a link that lies there would be written through
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".rate.") as probe:
            start = time.perf_counter()
            probe.write(sample)
            probe.flush()
            os.fsync(probe.fileno())
            writing = num_bytes / (time.perf_counter() - start)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}. Write to another folder.") from error
    return reading, writing


def resident_memory() -> int:
    """Bytes of this process; where the system does not tell, the most that it ever had."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS gives bytes
    return int(pages) * resource.getpagesize()
