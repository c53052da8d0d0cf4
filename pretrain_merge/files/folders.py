"""Folders that appear whole or not at all. This module knows files and renames, and nothing of weights."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain_merge.errors import CheckpointError


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
    if target.exists():
        raise CheckpointError(f"{target} exists and is never overwritten. Move it away, or write to another folder.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            sync(path)
        sync(temporary)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {target}: {error}. Free space there, or choose another folder.") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_unpublished(folder: Path) -> None:
    """Delete what a killed process was filling in a folder; nobody else may be writing there."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder; where that is broken off, what is left does not look complete and goes with the next run."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        folder.rename(temporary)
        shutil.rmtree(temporary)


def move_aside(path: Path) -> Path | None:
    """Give what an earlier run left at this path a number; returns its new name, or None where there was nothing."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
