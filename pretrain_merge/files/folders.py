"""Folders that appear whole or not at all. This module knows files and renames, and nothing of weights."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic
from pretrain_merge.files.atomic import sync


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A new folder to fill; it takes its name when the block ends without an error, after everything is on disk.

    Args:
        target: Where the folder shall be. Nothing existing is overwritten.

    Yields:
        A temporary folder beside the target.

    Raises:
        CheckpointError: The target exists, or the disk refuses.
    """
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists and is never overwritten. Move it away, or write to another folder.")
    temporary = atomic.temporary_beside(target)
    try:
        atomic.make_folder(target.parent)
        temporary.mkdir()
        yield temporary
        mode = _mode_of_new_files(temporary)
        for path in sorted(temporary.rglob("*"), reverse=True):
            if path.is_file():
                path.chmod(mode)  # P38
            sync(path)
        sync(temporary)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        atomic.delete(temporary)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {target}: {error}. Free space there, or choose another folder.") from error
    except BaseException:
        atomic.delete(temporary)
        raise


def discard(folder: Path) -> None:
    """Delete a folder; where that is broken off, what is left does not look complete and goes with the next run."""
    temporary = atomic.temporary_beside(folder)
    with suppress(OSError):
        folder.rename(temporary)
    atomic.delete(temporary)


def move_aside(path: Path) -> Path | None:
    """Give what an earlier run left at this path a number; returns its new name, or None where there was nothing."""
    if not os.path.lexists(path):
        return None
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return path.rename(aside)


def _mode_of_new_files(folder: Path) -> int:
    """What the umask, or the folder's own rule, gives to a new file; to ask for the umask would be to change it."""
    probe = folder / ".mode"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
