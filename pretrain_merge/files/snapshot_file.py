"""Snapshots as durable files: complete or absent, and checked to the last byte before they are used.

This module knows files, checksums and the layout of safetensors. It knows no steps and no windows. A file is named by
its own checksum, so a name stands for the same bytes for ever and is never written with others.
"""

import mmap
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, untrusted
from pretrain_merge.files.layout import Layout

_STAGING_BYTES = 16 * 2**20
_NAME = re.compile(r"[a-z]+-[0-9]{8,20}-[0-9a-f]{8}\.(safetensors|sharded)")


@dataclass(frozen=True)
class SnapshotFile:
    """What a file must be to be used.

    Attributes:
        name: Its name inside the folder, made of what it is, its step and its checksum.
        num_bytes: Its size.
        crc32: Checksum of all its bytes, header included.
    """

    name: str
    num_bytes: int
    crc32: int


def is_ours(name: str) -> bool:
    """Whether a name is one that a file or folder of a snapshot has: nothing that could leave the folder."""
    return _NAME.fullmatch(name) is not None


def write(
    folder: Path,
    stem: str,
    layout: Layout,
    tensors: Mapping[str, Sequence[Tensor]],
    *,
    batch: atomic.Batch | None = None,
) -> SnapshotFile:
    """Write a file under a temporary name, flush it to the disk, and give it its name.

    Args:
        folder: Where it goes.
        stem: What it is and its step, as in `snapshot-00001000`.
        layout: Which tensors, in which dtypes.
        tensors: By name, the flat parts of each tensor, on any device.
        batch: Flushes the file and gives it its name together with others.

    Raises:
        CheckpointError: The disk refuses.
    """
    try:
        atomic.make_folder(folder)
        with atomic.draft(folder / stem, batch=batch) as draft:
            num_bytes = checksum = 0
            for piece in _pieces(layout, tensors):
                draft.file.write(piece)
                num_bytes, checksum = num_bytes + len(piece), zlib.crc32(piece, checksum)
            entry = _entry(stem, num_bytes, checksum)
            # the name has the checksum, which is known once all is written
            draft.target = folder / entry.name
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder / stem} for the window: {error}. Free space there, or set window_folder to another "
            f"folder."
        ) from error
    return entry


def link(
    folder: Path,
    stem: str,
    path: Path,
    checksum: int,
    *,
    identity: tuple[int, int] | None,
    batch: atomic.Batch | None = None,
) -> SnapshotFile | None:
    """Give a file that is on the disk already a second name in a folder, without a copy of its bytes.

    Args:
        folder: Where the new name goes.
        stem: What it is and its step.
        path: The file; durable, and never written again under its old name.
        checksum: Of all its bytes.
        identity: Of the file that is meant, as `identity_of` gives it.
        batch: Flushes the folder after others have their names in it, too.

    Returns:
        The file under its new name; None where the file system has no links, or another one lies there.
    """
    temporary = atomic.temporary_beside(folder / stem)
    try:
        atomic.make_folder(folder)
        os.link(path, temporary, follow_symlinks=False)
        # a store may have put a new file at the name between the note and the link
        if identity_of(temporary) != identity:
            return None
        entry = _entry(stem, temporary.stat().st_size, checksum)
        atomic.publish(temporary, folder / entry.name, outlives_run=batch is None)
        if batch is not None:
            batch.flush_later(folder)
    except OSError:
        return None
    finally:
        atomic.delete(temporary)  # also afterwards: a rename between two names of one file does nothing
    return entry


def identity_of(path: Path) -> tuple[int, int] | None:
    """Device and number of a file, which its names share; None where there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def read(folder: Path, file: SnapshotFile, layout: Layout) -> list[Tensor]:
    """The tensors of a file, mapped, in the order of the live tensors.

    Args:
        folder: Where it lies.
        file: What it must be.
        layout: Which tensors it must hold, in which dtypes.

    Raises:
        CheckpointError: It is not there, or is not in every byte what was written, or belongs to another model.
    """
    path = folder / file.name
    pages = _mapped(path, file)
    # the whole of it before a single byte is used: half a window is worse than none
    found = zlib.crc32(pages)
    if found != file.crc32:
        raise CheckpointError(
            f"{path} is damaged: its checksum is {found:08x}, and {file.crc32:08x} was written. Copy it again from "
            f"where it is whole."
        )
    if pages[: len(layout.header)] != layout.header:
        raise CheckpointError(
            f"{path} is of another model: {layout.differences(bytes(pages))}. Build the model with the shapes and "
            f"dtypes it was trained with."
        )
    return layout.tensors_over(torch.frombuffer(pages, dtype=torch.uint8))


def _mapped(path: Path, file: SnapshotFile) -> mmap.mmap:
    if not is_ours(file.name):
        raise CheckpointError(f"{file.name!r} is not the name of a snapshot file. The checkpoint is damaged.")
    try:
        with untrusted.opened(path, is_ours=True) as opened:
            num_bytes = os.fstat(opened.fileno()).st_size
            # mapping an empty file raises, and one that was cut would kill the process where it is read
            if num_bytes != file.num_bytes or num_bytes <= 0:
                raise CheckpointError(
                    f"{path} has {num_bytes} bytes, and {file.num_bytes} were written. Copy it again from where it is "
                    f"whole."
                )
            # private: torch wants memory it could write
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _pieces(layout: Layout, tensors: Mapping[str, Sequence[Tensor]]) -> Iterable[memoryview | bytes]:
    yield layout.header
    staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8)
    for chunk in layout.chunks(tensors, _STAGING_BYTES):
        yield staging.numpy().data[: stage(staging, chunk)]


@torch.no_grad()
def stage(buffer: Tensor, chunk: Sequence[tuple[Tensor, torch.dtype]]) -> int:
    """Copy pieces into a staging buffer, one behind the other; returns the bytes filled."""
    offset = 0
    for source, dtype in chunk:
        stop = offset + source.numel() * dtype.itemsize
        buffer[offset:stop].view(dtype).copy_(source)
        offset = stop
    return offset


def _entry(stem: str, num_bytes: int, checksum: int) -> SnapshotFile:
    return SnapshotFile(f"{stem}-{checksum:08x}.safetensors", num_bytes, checksum)
