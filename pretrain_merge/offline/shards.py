"""The files of a merged checkpoint: which tensors go where, and each file written, read back and checksummed.

This module knows the layout of safetensors and a folder that is being filled. A file has its real name only when all of
it is on the disk, and a note beside it with its checksum; so a merge that was killed goes on behind the last one.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic
from pretrain_merge.files.untrusted import opened, read_json
from pretrain_merge.kernels.spread import Spread
from pretrain_merge.offline.safetensors_format import header_of
from pretrain_merge.offline.tensors import Kind

INDEX = "model.safetensors.index.json"
LARGEST_FILE = 5 * 10**9  # bytes; Hugging Face's own limit for long
NOTE = ".done.json"
# bytes that go to the disk while more are written, so that the end of a file has little left to wait for
_FLUSHED = 2**25
_BLOCK = 2**16  # bytes: larger ones get pages of their own from the system, and give them back, each time


@dataclass(frozen=True)
class Shard:
    """A file to be written: its tensors, those of large elements first, so that all are aligned."""

    file: str
    kinds: Mapping[str, Kind]

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(kind.num_bytes for kind in self.kinds.values())


@dataclass(frozen=True)
class Written:
    """What is known of a finished file.

    Attributes:
        num_bytes: Its size.
        crc32: Of all its bytes, as they were read back.
        distance: The part of its tensors in the squared distance of the sources from their mean.
        norm: The part in the squared norm of the mean.
    """

    num_bytes: int
    crc32: int
    distance: float
    norm: float


def divide(kinds: Mapping[str, Kind], largest: int, stem: str = "model") -> list[Shard]:
    """Tensors over files of at most `largest` bytes, in their order; a larger tensor has a file of its own."""
    groups: list[list[str]] = [[]]
    room = largest
    for name, kind in kinds.items():
        # the first of a group always fits, or a tensor above the limit would never be written
        if groups[-1] and kind.num_bytes > room:
            groups.append([])
            room = largest
        groups[-1].append(name)
        room -= kind.num_bytes
    names = [sorted(group, key=lambda name: -kinds[name].dtype.itemsize) for group in groups]
    if len(names) == 1:
        return [Shard(f"{stem}.safetensors", {name: kinds[name] for name in names[0]})]
    return [
        Shard(f"{stem}-{number:05d}-of-{len(names):05d}.safetensors", {name: kinds[name] for name in group})
        for number, group in enumerate(names, 1)
    ]


def finished(folder: Path, shard: Shard) -> Written | None:
    """What an earlier process wrote of a shard, if that is whole and its checksum still holds."""
    try:
        path = folder / shard.file
        before = Written(**read_json(_note_of(path), is_ours=True))
        # the size first: it tells a file that was cut off without reading it
        if path.stat().st_size == before.num_bytes and _checksum(path) == before.crc32:
            return before
    except (OSError, ValueError, TypeError):
        pass
    return None


def notes(folder: Path) -> list[Path]:
    """What says which files are finished; none in a published folder."""
    return sorted(folder.glob(f"*{NOTE}"))


class ShardWriter:
    """Appends to one file that is being written.

    Args:
        descriptor: Of the file.
        path: The name that it will have.
        shard: What it holds.
        flusher: Sends it to the disk while it is written, and it is read back; None: neither.

    Attributes:
        spread: Of its tensors; to be set before the end.
    """

    def __init__(self, descriptor: int, path: Path, shard: Shard, *, flusher: Executor | None) -> None:
        self.spread = Spread(0.0, 0.0)
        self._descriptor, self._path, self._flusher = descriptor, path, flusher
        self._flush: Future[None] | None = None
        self._flushed = 0
        starts, end = {}, 0
        for name, kind in shard.kinds.items():
            starts[name] = (kind, end)
            end += kind.num_bytes
        header = header_of(starts)
        self._expected = len(header) + end
        self._checksum = 0
        self._done = 0
        self._found = bytearray(_BLOCK)
        self.write(memoryview(header))

    def write(self, data: memoryview) -> None:
        """Append bytes, read them back, and compare.

        Raises:
            OSError: The disk refuses, or gives back something else.
        """
        sent = 0
        while sent < len(data):
            # a call may take less, as on a disk that is nearly full
            sent += os.pwrite(self._descriptor, data[sent:], self._done + sent)
        for start in range(0, 0 if self._flusher is None else len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            # a bytearray is compared as memory, and a memoryview byte by byte, ten times as slowly
            found = self._found if len(block) == _BLOCK else bytearray(len(block))
            if os.preadv(self._descriptor, [found], self._done + start) != len(block) or found != block:
                raise CheckpointError(f"{self._path}: what was read back is not what was written. Check that disk.")
            self._checksum = zlib.crc32(found, self._checksum)
        self._done += len(data)
        if self._flusher is not None and self._done - self._flushed >= _FLUSHED and self.is_flushed():
            self._flush, self._flushed = self._flusher.submit(os.fsync, self._descriptor), self._done

    def is_flushed(self, *, waits: bool = False) -> bool:
        """Whether nothing is on its way to the disk.

        Args:
            waits: Until that is so.

        Raises:
            OSError: The disk refused what was, which it tells one time only.
        """
        if self._flush is not None and (waits or self._flush.done()):
            self._flush.result()
            self._flush = None
        return self._flush is None

    def result(self) -> Written:
        """What is known of the file, when all of it was written."""
        assert self._done == self._expected, f"{self._done} bytes were written and {self._expected} planned"
        return Written(self._done, self._checksum, *self.spread)


@contextmanager
def written(folder: Path, shard: Shard, *, is_kept: bool = True) -> Iterator[ShardWriter]:
    """A file that takes its name, and gets its note, when the block ends.

    Args:
        folder: Where.
        shard: What it holds.
        is_kept: Else the file is not flushed and not read back, and gets no note.

    Raises:
        CheckpointError: The disk refuses.
    """
    path = folder / shard.file
    try:
        if not is_kept:
            # nothing that lies there is written over, even in a scratch folder
            with path.open("xb") as file:
                yield ShardWriter(file.fileno(), path, shard, flusher=None)
            return
        with atomic.draft(path) as draft, ThreadPoolExecutor(1) as flusher:
            writer = ShardWriter(draft.file.fileno(), path, shard, flusher=flusher)
            yield writer
            writer.is_flushed(waits=True)
        # after the name: a note without its file would be a promise that does not hold
        atomic.write(_note_of(path), json.dumps(asdict(writer.result())))
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot write {path}: {error}. Free space there and run the same command again, or choose another folder."
        ) from error


def index_of(shards: Sequence[Shard]) -> str:
    """The JSON that says which file holds which tensor."""
    weight_map = {name: shard.file for shard in shards for name in shard.kinds}
    total = sum(shard.num_bytes for shard in shards)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}{NOTE}")


def _checksum(path: Path) -> int:
    checksum = 0
    with opened(path, is_ours=True) as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
